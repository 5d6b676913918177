"""Files sent as uploads in parts: side by side, some parts twice, some uploads cancelled, some left alone for ever."""

import hashlib
import itertools
import math
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.campaign.notebook import Notebook, SentFile, SentUpload
from tests.campaign.patience import Client, GaveUp

PARTS_AT_ONCE = 3
PAUSE_S = 0.6
ENDS = (("completed", 50), ("cancelled", 20), ("abandoned", 30))
ABANDONED_FOR_S = 3.0
LONG_SHARE = 0.4
"""Of abandoned uploads wait for longer than it takes to be called garbage, before their hour is over."""
DELETED_SHARE = 0.5


def send(client: Client, notebook: Notebook, content: bytes, mark: str, purpose: str, draw: random.Random) -> str:
    """Send a file in parts. Returns the file's id."""
    uses_keys = draw.random() < 0.5
    upload = begin(client, notebook, content, mark, purpose, uses_keys=uses_keys)
    part_ids = add_parts(client, upload, content, draw)
    body: dict[str, Any] = {"part_ids": part_ids}
    if draw.random() < 0.5:
        body["md5"] = hashlib.md5(content, usedforsecurity=False).hexdigest()
    path = f"/v1/uploads/{upload.upload_id}/complete"
    answer = client.call("POST", path, json=body, key=f"{mark}-complete" if uses_keys else None).json()
    upload.end, upload.file_id = answer["status"], str(answer["file"]["id"])
    with notebook.lock:
        notebook.files.append(SentFile(upload.file_id, _sha256(content)))
    return upload.file_id


def begin(
    client: Client, notebook: Notebook, content: bytes, mark: str, purpose: str, *, uses_keys: bool
) -> SentUpload:
    """Create an upload for that content. Its name is `mark`."""
    body = {"filename": mark, "purpose": purpose, "bytes": len(content), "mime_type": "application/jsonl"}
    if uses_keys:
        upload_id = client.create_with_key("upload", "/v1/uploads", mark, json=body)
    else:
        upload_id = client.call("POST", "/v1/uploads", counts=True, json=body).json()["id"]
    upload = SentUpload(upload_id)
    with notebook.lock:
        notebook.uploads.append(upload)
    return upload


def add_parts(client: Client, upload: SentUpload, content: bytes, draw: random.Random) -> list[str]:
    """Send all of the content, some parts twice. Returns ids of parts that make it up, in order."""
    cuts = sorted({0, len(content), *(draw.randrange(1, len(content)) for _ in range(draw.randint(0, 4)))})
    pieces = [content[start:end] for start, end in itertools.pairwise(cuts)]
    sent = [(number, piece) for number, piece in enumerate(pieces) for _ in range(draw.choice((1, 1, 2)))]
    draw.shuffle(sent)

    def add(one: tuple[int, bytes]) -> tuple[int, str]:
        number, piece = one
        answer = client.call("POST", f"/v1/uploads/{upload.upload_id}/parts", files={"data": ("part", piece)})
        part_id = str(answer.json()["id"])
        upload.parts[part_id] = _sha256(piece)
        return number, part_id

    with ThreadPoolExecutor(PARTS_AT_ONCE) as threads:
        added = dict(threads.map(add, sent))
    return [added[number] for number in range(len(pieces))]


class ParcelClient:
    """Sends one file in parts after another, until it is told to stop."""

    def __init__(
        self,
        url: str,
        notebook: Notebook,
        seed: int,
        *,
        garbage_age_s: float,
        end_its_hour: Callable[[SentUpload], list[str]],
    ) -> None:
        """
        Args:
            end_its_hour: makes a pending upload one that was created an hour ago. Returns what is wrong with it.
        """
        self._url = url
        self._notebook = notebook
        self._seed = seed
        self._long_s = 1.5 * garbage_age_s
        self._end_its_hour = end_its_hour
        self._abandoned: list[tuple[float, SentUpload]] = []
        """With the time at which their hour is over."""
        self._stop = threading.Event()
        self.thread = threading.Thread(target=self._run, name="parcels", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """Begin no more; what is on its way is seen to its end."""
        self._stop.set()

    def _run(self) -> None:
        client = Client(self._url, self._notebook)
        number = 0
        while not self._stop.wait(PAUSE_S):
            number += 1
            try:
                self._send(client, f"parcel-{number}", random.Random(f"{self._seed}/parcel/{number}"))
            except GaveUp as error:
                with self._notebook.lock:
                    self._notebook.refusals.append(f"parcel {number}: {error}")
            self._forget(time.monotonic())
        self._forget(math.inf)

    def _send(self, client: Client, mark: str, draw: random.Random) -> None:
        content = draw.randbytes(draw.randint(2, 40_000))
        end = draw.choices([name for name, _ in ENDS], [weight for _, weight in ENDS])[0]
        if end == "completed":
            file_id = send(client, self._notebook, content, mark, "user_data", draw)
            if client.call("GET", f"/v1/files/{file_id}/content").content != content:
                raise GaveUp(f"{file_id}: other bytes came back than were sent")
            if draw.random() < DELETED_SHARE:
                self._delete(client, file_id)
            return
        upload = begin(client, self._notebook, content, mark, "user_data", uses_keys=draw.random() < 0.5)
        add_parts(client, upload, content, draw)
        if end == "cancelled":
            answer = client.call("POST", f"/v1/uploads/{upload.upload_id}/cancel")
            upload.end = str(answer.json()["status"])
        else:
            upload.end = end
            wait_s = self._long_s if draw.random() < LONG_SHARE else ABANDONED_FOR_S
            self._abandoned.append((time.monotonic() + wait_s, upload))

    def _delete(self, client: Client, file_id: str) -> None:
        client.call("DELETE", f"/v1/files/{file_id}", expect=(200, 404))  # 404: the answer before was lost
        for sent in self._notebook.files:
            sent.is_deleted |= sent.file_id == file_id

    def _forget(self, until: float) -> None:
        """Let the hours end that are over by then."""
        for at, upload in self._abandoned:
            if at <= until:
                problems = self._end_its_hour(upload)
                with self._notebook.lock:
                    self._notebook.parts_gone += problems
        self._abandoned = [(at, upload) for at, upload in self._abandoned if at > until]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
