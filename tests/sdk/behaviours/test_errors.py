"""Every kind of failure as the exception that the SDK has for it, with what a user needs to know."""

import asyncio
import contextlib
import socket
from collections.abc import Callable
from contextlib import closing
from typing import Any

import httpx
import httpx2
import pytest
from openai import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    ConflictError,
    InternalServerError,
    NotFoundError,
    OpenAI,
    PermissionDeniedError,
    RateLimitError,
)

from tests.integration.test_up import KEY
from tests.sdk.behaviours.conftest import CreateJob, openai
from tests.sdk.runs import Runs
from tests.sdk.wire import Wire

MAX_STREAMS = 200
"""Open event streams that one API process serves."""


def is_told(error: APIStatusError, kind: str) -> None:
    assert error.request_id is not None
    assert error.request_id.startswith("req_")
    assert error.response.headers["content-type"].startswith("application/json")
    assert error.type == kind
    assert error.message


@pytest.mark.parametrize(
    ("act", "expected", "status", "kind", "code"),
    [
        (lambda c: c.files.list(limit=0), BadRequestError, 400, "invalid_request_error", "invalid_value"),
        (lambda c: c.files.retrieve("file-nope"), NotFoundError, 404, "invalid_request_error", "not_found"),
        (lambda c: c.models.retrieve("nope"), NotFoundError, 404, "invalid_request_error", "model_not_found"),
        (
            lambda c: c.fine_tuning.jobs.create(model="nope", training_file="x"),
            NotFoundError,
            404,
            "invalid_request_error",
            "model_not_found",
        ),
        (
            lambda c: c.post("/fine_tuning/jobs", cast_to=object, body={"model": "test/tiny"}),
            BadRequestError,
            400,
            "invalid_request_error",
            "missing_required_parameter",
        ),
        (
            lambda c: c.fine_tuning.jobs.create(model="x", training_file="x", extra_body={"typo": 1}),
            BadRequestError,
            400,
            "invalid_request_error",
            "unknown_parameter",
        ),
        (lambda c: c.get("/nowhere", cast_to=object), NotFoundError, 404, "invalid_request_error", "unknown_url"),
        (lambda c: c.embeddings.create(model="x", input="y"), NotFoundError, 404, "invalid_request_error", None),
        (lambda c: c.responses.create(model="x", input="y"), NotFoundError, 404, "invalid_request_error", None),
        (
            lambda c: c.put("/files", cast_to=object),
            APIStatusError,
            405,
            "invalid_request_error",
            "method_not_allowed",
        ),
    ],
    ids=[
        "400",
        "404",
        "404 model",
        "404 base",
        "400 missing",
        "400 unknown",
        "404 URL",
        "embeddings",
        "responses",
        "405",
    ],
)
def test_a_failure_has_its_exception(
    act: Callable[[OpenAI], Any], expected: type[APIStatusError], status: int, kind: str, code: str, client: OpenAI
) -> None:
    with pytest.raises(expected) as raised:
        act(client)
    assert type(raised.value) is expected
    assert raised.value.status_code == status
    is_told(raised.value, kind)
    if code is not None:
        assert raised.value.code == code


@pytest.mark.parametrize("key", ["wrong", KEY[:-1], KEY + "x"])
def test_a_wrong_key_is_an_authentication_error(key: str, wire: Wire) -> None:
    with openai(wire.url, api_key=key) as client, pytest.raises(AuthenticationError) as raised:
        client.models.list()
    is_told(raised.value, "authentication_error")
    assert raised.value.code == "invalid_api_key"
    assert key not in raised.value.message


def test_a_stranger_is_refused_where_no_key_protects(open_api: str) -> None:
    stranger = openai(f"{open_api}/v1", default_headers={"host": "evil.example"})
    with stranger as client, pytest.raises(PermissionDeniedError, match=r"evil\.example") as raised:
        client.models.list()
    is_told(raised.value, "permission_error")


def test_where_no_key_is_set_any_key_will_do(open_api: str) -> None:
    with openai(f"{open_api}/v1", api_key="anything") as client:
        assert list(client.models.list())


def test_a_permanent_conflict_is_not_retried(client: OpenAI, create_job: CreateJob, wire: Wire) -> None:
    job = create_job()
    client.fine_tuning.jobs.cancel(job.id)
    with pytest.raises(ConflictError) as raised:
        client.fine_tuning.jobs.cancel(job.id)
    is_told(raised.value, "invalid_request_error")
    assert [one.status for one in wire.sent("POST", ".*/cancel")] == [200, 409]


def test_a_database_out_of_reach_is_an_internal_server_error(lost_api: str) -> None:
    wire = Wire(lost_api)
    with openai(wire.url, max_retries=1) as client, pytest.raises(InternalServerError, match="database") as raised:
        client.models.list()
    assert raised.value.status_code == 503
    assert int(raised.value.response.headers["retry-after"]) >= 1
    assert len(wire.sent("GET", "/v1/models")) == 2  # it was worth another try, and the SDK knew
    assert "127.0.0.1" not in raised.value.message
    wire.judge()
    wire.close()


def test_too_many_streams_are_a_rate_limit_error(second_api: str, runs: Runs) -> None:
    url = f"{second_api}/v1/fine_tuning/jobs/{runs.ids['held']}/events"
    query = {"stream": "true"}

    async def fill() -> RateLimitError:
        limits = httpx.Limits(max_connections=MAX_STREAMS)
        headers = {"authorization": f"Bearer {KEY}"}
        lines = []
        async with contextlib.AsyncExitStack() as stack:
            http = await stack.enter_async_context(httpx.AsyncClient(limits=limits, headers=headers, timeout=60))

            async def open_one() -> None:
                answer = await stack.enter_async_context(http.stream("GET", url, params=query))
                lines.append(answer.aiter_lines())  # kept: forgotten, it would close its stream
                await anext(lines[-1])

            await asyncio.gather(*(open_one() for _ in range(MAX_STREAMS)))
            with openai(f"{second_api}/v1", max_retries=0) as client:
                ask = client.fine_tuning.jobs.list_events
                with pytest.raises(RateLimitError) as raised:
                    await asyncio.to_thread(ask, runs.ids["held"], extra_query=query)
            return raised.value

    error = asyncio.run(fill())
    is_told(error, "rate_limit_error")
    assert error.code == "rate_limit_exceeded"
    assert int(error.response.headers["retry-after"]) >= 1


def test_nobody_at_the_address_is_a_connection_error() -> None:
    with openai("http://127.0.0.1:9/v1", max_retries=0) as client, pytest.raises(APIConnectionError):
        client.models.list()


def test_an_answer_that_takes_too_long_is_a_timeout() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:  # connections wait in its queue for ever
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        with openai(url, timeout=0.2, max_retries=1) as client, pytest.raises(APITimeoutError):
            client.models.list()


def test_a_patient_client_waits_for_a_slow_answer(client: OpenAI) -> None:
    assert list(client.with_options(timeout=httpx2.Timeout(30, connect=1)).models.list())


def test_a_body_that_is_no_json_is_a_bad_request(client: OpenAI, wire: Wire) -> None:
    answer = httpx.post(
        f"{wire.url}/fine_tuning/jobs",
        content=b"{not json",
        headers={"authorization": f"Bearer {KEY}", "content-type": "application/json"},
    )
    assert answer.status_code == 400
    assert "not JSON" in answer.json()["error"]["message"]


def test_a_success_has_a_request_id_too(client: OpenAI) -> None:
    models = client.models.with_raw_response.list()
    assert (models.request_id or "").startswith("req_")
    assert models.headers["openai-processing-ms"].isdigit()
    assert (client.files.list()._request_id or "").startswith("req_")
    assert (client.models.retrieve("test/tiny")._request_id or "").startswith("req_")


def test_two_requests_have_two_ids(client: OpenAI) -> None:
    assert client.models.retrieve("test/tiny")._request_id != client.models.retrieve("test/tiny")._request_id


def test_an_organization_and_a_project_may_be_named(wire: Wire) -> None:
    with openai(wire.url, organization="org-x", project="proj_x") as client:
        assert list(client.models.list())
