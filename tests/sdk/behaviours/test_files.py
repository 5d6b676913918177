"""client.files: every way to send a file, to find it again, to read it and to be rid of it."""

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError, BadRequestError, ConflictError, NotFoundError, OpenAI
from openai.types import FileDeleted, FileObject

from tests.sdk.behaviours.conftest import MAX_UPLOAD_BYTES, CreateJob, Upload
from tests.sdk.data import chat_rows, jsonl

CONTENT = jsonl(chat_rows(3))
LARGE_ROWS = 12_000
"""More than is checked before the answer (ANNEAL_INLINE_VALIDATION_BYTES)."""


def as_path(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(CONTENT)
    return path


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (as_path, "rows.jsonl"),
        (lambda folder: as_path(folder).open("rb"), "rows.jsonl"),
        (lambda _: ("mine.jsonl", CONTENT), "mine.jsonl"),
        (lambda _: ("mine.jsonl", io.BytesIO(CONTENT)), "mine.jsonl"),
        (lambda _: ("mine.jsonl", CONTENT, "application/jsonl"), "mine.jsonl"),
        (lambda _: ("mine.jsonl", CONTENT, "text/plain", {"x-part": "1"}), "mine.jsonl"),
        (lambda _: ("Übung 1.jsonl", CONTENT), "Übung 1.jsonl"),
        (lambda _: CONTENT, "upload"),
        (lambda _: io.BytesIO(CONTENT), "upload"),
    ],
    ids=["path", "open file", "tuple", "tuple of a stream", "with type", "with headers", "umlaut", "bytes", "stream"],
)
def test_a_file_is_created_from(make: Callable[[Path], Any], name: str, client: OpenAI, tmp_path: Path) -> None:
    before = int(time.time())
    file = client.files.create(file=make(tmp_path), purpose="fine-tune")
    assert type(file) is FileObject
    assert (file.filename, file.bytes, file.purpose, file.status) == (name, len(CONTENT), "fine-tune", "processed")
    assert before - 1 <= file.created_at <= time.time() + 1
    assert client.files.content(file.id).content == CONTENT


@pytest.mark.parametrize("purpose", ["fine-tune", "batch", "evals", "user_data"])
def test_a_purpose_is_kept(purpose: Any, upload: Upload, client: OpenAI) -> None:
    file = upload(purpose=purpose)
    assert file.purpose == purpose
    assert client.files.retrieve(file.id).purpose == purpose


@pytest.mark.parametrize("purpose", ["assistants", "vision", "fine-tune-results", "nonsense"])
def test_another_purpose_is_refused(purpose: Any, upload: Upload) -> None:
    with pytest.raises(BadRequestError) as raised:
        upload(purpose=purpose)
    assert raised.value.param == "purpose"
    assert purpose in raised.value.message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"{}\n", "line 1"),
        (CONTENT + b'{"messages": []}\n', "line 4"),
        (b"not json\n", "line 1"),
        (b"\xff\xfe\n", "line 1"),
        (jsonl([{"messages": [{"role": "user", "content": "no answer"}]}]), "line 1"),
    ],
    ids=["empty", "no form", "empty conversation", "no JSON", "no text", "no answer"],
)
def test_a_bad_training_file_is_refused_with_its_line(content: bytes, said: str, upload: Upload) -> None:
    with pytest.raises(BadRequestError) as raised:
        upload(content)
    assert said in raised.value.message.lower()


def test_a_refused_file_leaves_nothing(upload: Upload, client: OpenAI) -> None:
    before = {file.id for file in client.files.list()}
    with pytest.raises(BadRequestError):
        upload(b"not json\n")
    assert {file.id for file in client.files.list()} == before


def test_what_is_too_large_is_refused_with_the_bound(upload: Upload) -> None:
    with pytest.raises(APIStatusError) as raised:
        upload(b"x" * (MAX_UPLOAD_BYTES + 1), purpose="user_data")
    assert raised.value.status_code == 413
    assert str(MAX_UPLOAD_BYTES) in raised.value.message


def test_an_unknown_field_is_refused(upload: Upload) -> None:
    with pytest.raises(BadRequestError, match="purpos"):
        upload(extra_body={"purpos": "typo"})


def test_a_file_is_retrieved_as_it_was_created(upload: Upload, client: OpenAI) -> None:
    file = upload()
    assert client.files.retrieve(file.id) == file


def test_the_list_begins_with_the_newest(upload: Upload, client: OpenAI) -> None:
    files = [upload(purpose="user_data") for _ in range(3)]
    listed = client.files.list(limit=3)
    assert [file.id for file in listed.data] == [file.id for file in reversed(files)]
    assert listed.has_more is True
    assert (listed.data[0], type(listed.data[0])) == (files[-1], FileObject)


def test_the_list_can_begin_with_the_oldest(client: OpenAI, upload: Upload) -> None:
    upload()
    ascending = [file.id for file in client.files.list(order="asc")]
    assert ascending == [file.id for file in client.files.list(order="desc")][::-1]


def test_the_list_is_filtered_by_purpose(upload: Upload, client: OpenAI) -> None:
    file = upload(purpose="evals")
    listed = list(client.files.list(purpose="evals"))
    assert file.id in [one.id for one in listed]
    assert {one.purpose for one in listed} == {"evals"}


def test_a_purpose_that_nothing_has_lists_nothing(client: OpenAI) -> None:
    listed = client.files.list(purpose="vision")
    assert (listed.data, listed.has_more) == ([], False)


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_pages_of_any_size_hold_every_file_once(order: Any, limit: int, upload: Upload, client: OpenAI) -> None:
    upload(purpose="batch")
    whole = [file.id for file in client.files.list(purpose="batch", order=order, limit=100)]
    assert [file.id for file in client.files.list(purpose="batch", order=order, limit=limit)] == whole


def test_after_takes_the_last_id_of_the_page_before(upload: Upload, client: OpenAI) -> None:
    files = [upload(purpose="user_data") for _ in range(3)]
    listed = client.files.list(after=files[2].id, limit=2)
    assert [file.id for file in listed.data] == [files[1].id, files[0].id]


def test_the_page_after_the_last_is_empty(client: OpenAI, upload: Upload) -> None:
    upload()
    *_, oldest = client.files.list()
    assert client.files.list(after=oldest.id).data == []


def test_after_must_be_a_file(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as raised:
        client.files.list(after="file-nope")
    assert raised.value.param == "after"


def test_a_limit_of_ten_thousand_is_allowed(client: OpenAI) -> None:
    assert client.files.list(limit=10_000).has_more is False


@pytest.mark.parametrize(("name", "value"), [("limit", 0), ("limit", 10_001), ("order", "random")])
def test_a_bound_of_the_list_is_told(name: str, value: Any, client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as raised:
        client.files.list(**{name: value})
    assert raised.value.param == name


def test_content_comes_back_byte_by_byte(upload: Upload, client: OpenAI, tmp_path: Path) -> None:
    content = bytes(range(256)) * 4096
    file = upload(content, purpose="user_data")
    answer = client.files.content(file.id)
    assert answer.content == content
    answer.write_to_file(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content


def test_content_is_text_if_it_was(upload: Upload, client: OpenAI) -> None:
    file = upload("Übung\n".encode(), purpose="user_data")
    assert client.files.content(file.id).text == "Übung\n"


def test_content_is_streamed(upload: Upload, client: OpenAI, tmp_path: Path) -> None:
    content = b"0123456789abcdef" * 2**16
    file = upload(content, purpose="user_data")
    with client.files.with_streaming_response.content(file.id) as answer:
        assert b"".join(answer.iter_bytes(10_000)) == content
    with client.files.with_streaming_response.content(file.id) as answer:
        answer.stream_to_file(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content


def test_a_stream_of_content_can_be_left(upload: Upload, client: OpenAI) -> None:
    file = upload(b"x" * 2**22, purpose="user_data")
    with client.files.with_streaming_response.content(file.id) as answer:
        assert next(answer.iter_bytes(1000))
    assert client.files.retrieve(file.id).bytes == 2**22


def test_the_deprecated_retrieve_content_works(upload: Upload, client: OpenAI) -> None:
    file = upload(b"some words", purpose="user_data")
    with pytest.warns(DeprecationWarning):
        content = client.files.retrieve_content(file.id)
    assert content == "some words"


@pytest.mark.parametrize("act", ["retrieve", "content", "delete"])
def test_a_file_that_is_not_there_is_not_found(act: str, client: OpenAI) -> None:
    with pytest.raises(NotFoundError, match="file-nope"):
        getattr(client.files, act)("file-nope")


def test_a_deleted_file_is_gone(upload: Upload, client: OpenAI) -> None:
    file = upload()
    deleted = client.files.delete(file.id)
    assert (type(deleted), deleted.id, deleted.deleted) == (FileDeleted, file.id, True)
    for act in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(NotFoundError):
            act(file.id)
    assert file.id not in [one.id for one in client.files.list()]


@pytest.mark.parametrize("field", ["training_file", "validation_file"])
def test_a_file_that_a_job_needs_stays(field: str, upload: Upload, client: OpenAI, create_job: CreateJob) -> None:
    file = upload()
    job = create_job(**{field: file.id})
    with pytest.raises(ConflictError, match=job.id):
        client.files.delete(file.id)
    client.fine_tuning.jobs.cancel(job.id)
    assert client.files.delete(file.id).deleted


def test_a_file_that_a_paused_job_needs_stays(upload: Upload, client: OpenAI, create_job: CreateJob) -> None:
    file = upload()
    job = create_job(training_file=file.id)
    client.fine_tuning.jobs.pause(job.id)
    with pytest.raises(ConflictError):
        client.files.delete(file.id)
    client.fine_tuning.jobs.cancel(job.id)
    assert client.files.delete(file.id).deleted


def test_waiting_for_a_small_file_ends_at_once(upload: Upload, client: OpenAI) -> None:
    file = upload()
    assert client.files.wait_for_processing(file.id, poll_interval=0.1, max_wait_seconds=5).status == "processed"


def test_waiting_for_a_large_file_ends_when_it_has_been_checked(upload: Upload, client: OpenAI) -> None:
    content = jsonl(chat_rows(100)) * (LARGE_ROWS // 100) + b"\n" * 2**22
    file = upload(content)
    assert file.status == "uploaded"
    assert client.files.wait_for_processing(file.id, poll_interval=0.2, max_wait_seconds=60).status == "processed"


def test_waiting_for_a_large_bad_file_ends_with_the_reason(upload: Upload, client: OpenAI) -> None:
    file = upload(jsonl(chat_rows(100)) + b"\n" * 2**22 + b"not json\n")
    ended = client.files.wait_for_processing(file.id, poll_interval=0.2, max_wait_seconds=60)
    assert ended.status == "error"
    assert "line" in (ended.status_details or "")


@pytest.mark.parametrize("seconds", [3600, 86_400, 2_592_000])
def test_a_file_can_expire(seconds: int, upload: Upload, client: OpenAI) -> None:
    file = upload(expires_after={"anchor": "created_at", "seconds": seconds})
    assert file.expires_at == file.created_at + seconds
    assert client.files.retrieve(file.id).expires_at == file.expires_at


def test_a_file_expires_only_if_asked(upload: Upload) -> None:
    assert upload().expires_at is None


@pytest.mark.parametrize(
    "expires_after",
    [
        {"anchor": "created_at", "seconds": 3599},
        {"anchor": "created_at", "seconds": 2_592_001},
        {"anchor": "last_used", "seconds": 3600},
        {"anchor": "created_at"},
        {"seconds": 3600},
        {"anchor": "created_at", "seconds": "soon"},
    ],
    ids=["too soon", "too late", "other anchor", "no seconds", "no anchor", "no number"],
)
def test_an_expiry_that_can_not_be_kept_is_refused(expires_after: Any, upload: Upload) -> None:
    with pytest.raises(BadRequestError) as raised:
        upload(expires_after=expires_after)
    assert (raised.value.param or "").startswith("expires_after")
