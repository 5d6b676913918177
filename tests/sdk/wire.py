"""The wire between a client and the service: everything passes, is judged, and can get lost.

`Wire` is an HTTP proxy on loopback. Clients of any language get its address as `base_url` and know nothing of it. Every
JSON answer is held against the SDK's types (`strict`), every answer against what all answers have. `lose_answer` makes
the next answer of a kind vanish after the service has done its work, as a network does.
"""

import http.client
import json
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from openai.types import Batch, FileDeleted, FileObject, Model, ModelDeleted, Upload
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint
from openai.types.uploads import UploadPart

from tests.sdk.strict import ErrorBody, ListPage, WholeList, problems

CHUNK_BYTES = 64 * 1024
HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length", "host"})
JOB = r"/v1/fine_tuning/jobs/[^/]+"
ANSWERS: list[tuple[str, str, Any]] = [
    ("POST", r"/v1/files", FileObject),
    ("GET", r"/v1/files", ListPage[FileObject]),
    ("GET", r"/v1/files/[^/]+", FileObject),
    ("DELETE", r"/v1/files/[^/]+", FileDeleted),
    ("POST", r"/v1/uploads(/[^/]+/(complete|cancel))?", Upload),
    ("POST", r"/v1/uploads/[^/]+/parts", UploadPart),
    ("POST", rf"/v1/fine_tuning/jobs|{JOB}/(cancel|pause|resume)", FineTuningJob),
    ("GET", JOB, FineTuningJob),
    ("GET", r"/v1/fine_tuning/jobs", ListPage[FineTuningJob]),
    ("GET", rf"{JOB}/events", ListPage[FineTuningJobEvent]),
    ("GET", rf"{JOB}/checkpoints", ListPage[FineTuningJobCheckpoint]),
    ("POST", r"/v1/batches(/[^/]+/cancel)?", Batch),
    ("GET", r"/v1/batches", ListPage[Batch]),
    ("GET", r"/v1/batches/[^/]+", Batch),
    ("GET", r"/v1/models", WholeList[Model]),
    ("GET", r"/v1/models/.+", Model),
    ("DELETE", r"/v1/models/.+", ModelDeleted),
]
"""What each route answers with, by method and path. Answers of other routes are Anneal's own or not JSON."""


@dataclass
class Exchange:
    """One request and what came back."""

    method: str
    path: str
    query: str
    request_headers: dict[str, str]
    status: int
    headers: dict[str, str]
    body: Any
    """Decoded, if it was JSON."""

    def __str__(self) -> str:
        return f"{self.method} {self.path} → {self.status}"


@dataclass
class Loss:
    """An answer that is going to get lost."""

    method: str
    path: re.Pattern[str]
    times: int
    requests: list[dict[str, str]] = field(default_factory=list)
    """Headers of the requests whose answer was lost."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # five, the default, lose connections of clients that come together


class Wire:
    """A proxy before the service at `target`; `url` is what clients are given."""

    def __init__(self, target: str) -> None:
        self._target = urlsplit(target)
        self._lock = threading.Lock()
        self._losses: list[Loss] = []
        self._problems: list[str] = []
        self.exchanges: list[Exchange] = []
        """Since the last `judge`, in the order in which they ended."""
        self._server = _Server(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def judge(self) -> None:
        """Fail if any answer since the last call was not what the SDK's types say. Forgets the exchanges."""
        with self._lock:
            found, self._problems = self._problems, []
            self.exchanges = []
            self._losses = []
        assert not found, "answers that are not OpenAI's:\n" + "\n".join(found)

    def lose_answer(self, method: str, path: str, times: int = 1) -> Loss:
        """The next `times` answers to `method` on a path like `path` never arrive; the service has done the work."""
        loss = Loss(method, re.compile(path), times)
        with self._lock:
            self._losses.append(loss)
        return loss

    def sent(self, method: str, path: str) -> list[Exchange]:
        """Exchanges since the last `judge` that match; lost ones are not among them."""
        with self._lock:
            return [one for one in self.exchanges if one.method == method and re.fullmatch(path, one.path)]

    def _is_lost(self, method: str, path: str, headers: dict[str, str]) -> bool:
        with self._lock:
            for loss in self._losses:
                if loss.times > 0 and loss.method == method and loss.path.fullmatch(path):
                    loss.times -= 1
                    loss.requests.append(headers)
                    return True
        return False

    def _record(self, exchange: Exchange) -> None:
        found = [f"{exchange}: {problem}" for problem in problems_of(exchange)]
        with self._lock:
            self.exchanges.append(exchange)
            self._problems += found

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        wire = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *_: Any) -> None:
                pass

            def forward(self) -> None:
                content = b"".join(self._content())
                headers = {name.lower(): value for name, value in self.headers.items()}
                upstream = http.client.HTTPConnection(wire._target.hostname or "", wire._target.port, timeout=120)
                try:
                    kept = {name: value for name, value in headers.items() if name not in HOP_BY_HOP}
                    upstream.request(self.command, self.path, body=content or None, headers=kept)
                    answer = upstream.getresponse()
                    path, _, query = self.path.partition("?")
                    if wire._is_lost(self.command, path, headers):
                        answer.read()
                        self._hang_up()
                        return
                    self._pass_on(answer, path, query, headers)
                except (http.client.HTTPException, ConnectionError):
                    self._hang_up()  # the service went away in the middle: so does its answer
                finally:
                    upstream.close()

            do_GET = do_POST = do_DELETE = do_PUT = do_PATCH = forward

            def _content(self) -> Iterator[bytes]:
                if "chunked" in self.headers.get("transfer-encoding", "").lower():
                    while size := int(self.rfile.readline().split(b";")[0], 16):
                        yield self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                else:
                    yield self.rfile.read(int(self.headers.get("content-length", 0)))

            def _pass_on(self, answer: http.client.HTTPResponse, path: str, query: str, sent: dict[str, str]) -> None:
                headers = {name.lower(): value for name, value in answer.getheaders()}
                is_json = headers.get("content-type", "").startswith("application/json")
                content = answer.read() if is_json else None
                body = json.loads(content) if content else None
                # Recorded first: whoever has the answer in hand may look for it here at once.
                wire._record(Exchange(self.command, path, query, sent, answer.status, headers, body))
                self.send_response_only(answer.status)
                for name, value in headers.items():
                    if name not in HOP_BY_HOP:
                        self.send_header(name, value)
                if content is not None:
                    self.send_header("content-length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                    return
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                while chunk := answer.read1(CHUNK_BYTES):
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
                self.wfile.write(b"0\r\n\r\n")

            def _hang_up(self) -> None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

        return Handler


def problems_of(exchange: Exchange) -> list[str]:
    """What is wrong with one answer, whoever asked."""
    found = [f"the header {name} is missing" for name in ("x-request-id",) if not exchange.headers.get(name)]
    if not exchange.headers.get("openai-processing-ms", "").isdigit():
        found.append(f"openai-processing-ms is {exchange.headers.get('openai-processing-ms')!r}")
    if exchange.status >= 400:
        if not exchange.headers.get("content-type", "").startswith("application/json"):
            return [*found, f"an error as {exchange.headers.get('content-type')}"]
        return found + problems(ErrorBody, exchange.body)
    for method, path, expected in ANSWERS:
        if method == exchange.method and re.fullmatch(path, exchange.path):
            found += problems(expected, exchange.body)
            break
    return found
