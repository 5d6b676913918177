"""client.uploads: a file in parts, in any order, checked, cancelled, or sent by the SDK's own helper."""

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError, BadRequestError, NotFoundError, OpenAI
from openai.types import FileObject, Upload
from openai.types.uploads import UploadPart

from tests.sdk.behaviours.conftest import CreateJob
from tests.sdk.data import chat_rows, jsonl

PARTS = [jsonl(chat_rows(2, seed)) for seed in range(3)]
WHOLE = b"".join(PARTS)
MD5 = hashlib.md5(WHOLE).hexdigest()


def begin(client: OpenAI, size: int = len(WHOLE), **choices: Any) -> Upload:
    body = {"filename": "rows.jsonl", "purpose": "fine-tune", "mime_type": "application/jsonl"}
    return client.uploads.create(bytes=size, **body | choices)


def add(client: OpenAI, upload: Upload, *parts: bytes) -> list[str]:
    return [client.uploads.parts.create(upload.id, data=part).id for part in parts]


def test_an_upload_begins_pending(client: OpenAI) -> None:
    upload = begin(client)
    assert type(upload) is Upload
    assert (upload.status, upload.bytes, upload.filename, upload.purpose) == (
        "pending",
        len(WHOLE),
        "rows.jsonl",
        "fine-tune",
    )
    assert upload.expires_at == upload.created_at + 3600
    assert upload.file is None
    assert abs(upload.created_at - time.time()) < 10


def test_a_part_belongs_to_its_upload(client: OpenAI) -> None:
    upload = begin(client)
    part = client.uploads.parts.create(upload.id, data=PARTS[0])
    assert (type(part), part.upload_id, part.object) == (UploadPart, upload.id, "upload.part")


@pytest.mark.parametrize("md5", [None, MD5], ids=["unchecked", "md5"])
def test_parts_become_a_file(md5: str | None, client: OpenAI) -> None:
    upload = begin(client)
    ids = add(client, upload, *PARTS)
    done = client.uploads.complete(upload.id, part_ids=ids, **({"md5": md5} if md5 else {}))
    assert (done.id, done.status, done.bytes) == (upload.id, "completed", len(WHOLE))
    assert type(done.file) is FileObject
    assert (done.file.filename, done.file.bytes, done.file.purpose) == ("rows.jsonl", len(WHOLE), "fine-tune")
    assert client.files.retrieve(done.file.id) == done.file
    assert client.files.content(done.file.id).content == WHOLE


def test_the_order_is_that_of_completion(client: OpenAI) -> None:
    upload = begin(client)
    last, first, middle = add(client, upload, PARTS[2], PARTS[0], PARTS[1])
    done = client.uploads.complete(upload.id, part_ids=[first, middle, last], md5=MD5)
    assert done.file is not None
    assert client.files.content(done.file.id).content == WHOLE


def test_parts_may_come_at_once(client: OpenAI) -> None:
    upload = begin(client)
    with ThreadPoolExecutor(3) as pool:
        ids = list(pool.map(lambda part: add(client, upload, part)[0], PARTS))
    assert client.uploads.complete(upload.id, part_ids=ids, md5=MD5).status == "completed"


def test_a_wrong_md5_is_told_and_can_be_put_right(client: OpenAI) -> None:
    upload = begin(client)
    ids = add(client, upload, *PARTS)
    with pytest.raises(BadRequestError, match="md5"):
        client.uploads.complete(upload.id, part_ids=ids, md5="0" * 32)
    assert client.uploads.complete(upload.id, part_ids=ids, md5=MD5).status == "completed"


def test_a_missing_part_is_told_and_can_be_added(client: OpenAI) -> None:
    upload = begin(client)
    ids = add(client, upload, *PARTS[:2])
    with pytest.raises(BadRequestError, match=str(len(WHOLE))):
        client.uploads.complete(upload.id, part_ids=ids)
    ids += add(client, upload, PARTS[2])
    assert client.uploads.complete(upload.id, part_ids=ids).status == "completed"


def test_a_part_of_another_upload_is_refused(client: OpenAI) -> None:
    (stranger,) = add(client, begin(client), PARTS[0])
    upload = begin(client)
    with pytest.raises(BadRequestError, match=stranger):
        client.uploads.complete(upload.id, part_ids=[stranger])


def test_a_part_named_twice_is_refused(client: OpenAI) -> None:
    upload = begin(client, 2 * len(PARTS[0]))
    (part,) = add(client, upload, PARTS[0])
    with pytest.raises(BadRequestError, match=part):
        client.uploads.complete(upload.id, part_ids=[part, part])


def test_no_parts_are_refused(client: OpenAI) -> None:
    with pytest.raises(BadRequestError):
        client.uploads.complete(begin(client).id, part_ids=[])


def test_completing_again_answers_the_same(client: OpenAI) -> None:
    upload = begin(client)
    ids = add(client, upload, *PARTS)
    assert client.uploads.complete(upload.id, part_ids=ids) == client.uploads.complete(upload.id, part_ids=ids)


def test_a_cancelled_upload_takes_nothing_more(client: OpenAI) -> None:
    upload = begin(client)
    ids = add(client, upload, *PARTS)
    cancelled = client.uploads.cancel(upload.id)
    assert (cancelled.id, cancelled.status, cancelled.file) == (upload.id, "cancelled", None)
    with pytest.raises(BadRequestError, match="cancelled"):
        add(client, upload, PARTS[0])
    with pytest.raises(APIStatusError, match="cancelled"):
        client.uploads.complete(upload.id, part_ids=ids)


def test_a_completed_upload_takes_nothing_more(client: OpenAI) -> None:
    upload = begin(client)
    ids = add(client, upload, *PARTS)
    client.uploads.complete(upload.id, part_ids=ids)
    with pytest.raises(BadRequestError, match="completed"):
        add(client, upload, PARTS[0])
    with pytest.raises(APIStatusError, match="completed"):
        client.uploads.cancel(upload.id)


@pytest.mark.parametrize("act", ["cancel", "complete", "add"])
def test_an_upload_that_is_not_there_is_not_found(act: str, client: OpenAI) -> None:
    with pytest.raises(NotFoundError, match="upload_nope"):
        if act == "cancel":
            client.uploads.cancel("upload_nope")
        elif act == "complete":
            client.uploads.complete("upload_nope", part_ids=["part_1"])
        else:
            client.uploads.parts.create("upload_nope", data=b"x")


@pytest.mark.parametrize(
    ("choices", "param"),
    [
        ({"size": 0}, "bytes"),
        ({"size": 2**50}, "bytes"),
        ({"purpose": "vision"}, "purpose"),
        ({"filename": ""}, "filename"),
        ({"expires_after": {"anchor": "created_at", "seconds": 1}}, "expires_after"),
    ],
    ids=["no bytes", "too many bytes", "purpose", "no name", "expiry"],
)
def test_an_upload_that_can_not_be_is_refused(choices: dict[str, Any], param: str, client: OpenAI) -> None:
    with pytest.raises(APIStatusError) as raised:
        begin(client, **choices)
    assert raised.value.status_code in (400, 413)
    assert (raised.value.param or "").startswith(param)


def test_the_file_of_an_upload_can_expire(client: OpenAI) -> None:
    upload = begin(client, expires_after={"anchor": "created_at", "seconds": 3600})
    done = client.uploads.complete(upload.id, part_ids=add(client, upload, *PARTS))
    assert done.file is not None
    assert done.file.expires_at == done.file.created_at + 3600


def test_the_sdk_sends_a_path_in_parts(client: OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(WHOLE)
    done = client.uploads.upload_file_chunked(
        file=path, mime_type="application/jsonl", purpose="fine-tune", part_size=100, md5=MD5
    )
    assert done.status == "completed"
    assert done.file is not None
    assert client.files.content(done.file.id).content == WHOLE


def test_the_sdk_sends_bytes_in_parts(client: OpenAI) -> None:
    content = bytes(range(256)) * 8192
    done = client.uploads.upload_file_chunked(
        file=content,
        filename="data.bin",
        bytes=len(content),
        mime_type="application/octet-stream",
        purpose="user_data",
        part_size=2**19,
    )
    assert done.file is not None
    assert client.files.content(done.file.id).content == content


def test_an_uploaded_file_can_be_trained_on(client: OpenAI, create_job: CreateJob) -> None:
    upload = begin(client)
    done = client.uploads.complete(upload.id, part_ids=add(client, upload, *PARTS))
    assert done.file is not None
    assert client.files.wait_for_processing(done.file.id, poll_interval=0.1).status == "processed"
    assert create_job(training_file=done.file.id).status == "queued"
