"""Files that come in parts, what has had its time, and models that are deleted."""

from sqlalchemy import update

from shared import storage, uploads
from shared.db import now, reading, transaction
from shared.ids import new_id
from shared.models import Answer, Creation, File, Job, Upload
from shared.upload_schemas import UploadCreate
from tests.failpoints import toy
from tests.failpoints.client_scenarios import request, until_answered
from tests.failpoints.scenario import LARGE, Facts, Scenario, facts_of
from tests.failpoints.world import World
from worker import tasks
from worker.sweeper import Sweeper

CONTENT = toy.rows() + LARGE
"""Too large to be checked before the completion is answered."""
MIDDLE = len(CONTENT) // 2
PIECES = (CONTENT[:MIDDLE], CONTENT[MIDDLE:])


def begin(world: World, *pieces: bytes) -> Facts:
    """A pending upload that has these parts already."""
    body = {"filename": "a.jsonl", "purpose": "fine-tune", "bytes": len(CONTENT), "mime_type": "application/jsonl"}
    with transaction() as session:
        upload_id = uploads.create(session, "default", UploadCreate.model_validate(body)).id
    parts = [new_id("part", "_") for _ in pieces]
    for part_id, piece in zip(parts, pieces, strict=True):
        stored = storage.save_file(world.settings, part_id, [piece], max_bytes=len(CONTENT))
        with transaction() as session:
            uploads.add_part(session, "default", upload_id, part_id, stored)
    return {"upload": upload_id, "parts": parts, "status": 200}


def _add_parts(world: World, facts: Facts) -> None:
    for piece in PIECES:
        path = f"/v1/uploads/{facts['upload']}/parts"
        request(world, "part", "POST", path, files={"data": ("part", piece)})


def _add_parts_again(world: World, facts: Facts) -> None:
    """Every part once more, which does no harm; then the completion with one of each."""
    _add_parts(world, facts)
    ids = [entry["body"]["id"] for entry in world.journal() if entry["status"] == 200]
    if len(ids) >= len(PIECES):
        _complete(world, facts | {"parts": ids[-len(PIECES) :]})


def _complete(world: World, facts: Facts) -> None:
    request(world, "complete", "POST", f"/v1/uploads/{facts['upload']}/complete", json={"part_ids": facts["parts"]})


def _cancel(world: World, facts: Facts) -> None:
    request(world, "cancel-upload", "POST", f"/v1/uploads/{facts['upload']}/cancel")


def _prepare_overdue(world: World) -> Facts:
    """An upload, a file and an answer that have had their time, and a file that expired while a job needs it."""
    facts = begin(world, *PIECES)
    rows = toy.rows(steps=2)
    needed = world.add_file(rows)
    unneeded = world.add_file(toy.rows())
    job_id = world.submit(needed)
    age = {"project_id": "default", "request_sha256": "", "body": "{}", "created_at": now() - 10**6}
    with transaction() as session:
        session.execute(update(Upload).values(expires_at=now() - 1))
        session.execute(update(File).values(expires_at=now() - 1))
        session.add(Answer(route="POST /v1/files", key="old", status_code=200, **age))
        session.add(Creation(object_id="file-old", **age))
    gone = {"gone": [needed, unneeded, *facts["parts"]], "contents": {job_id: rows.decode()}}
    return facts | facts_of(world, job_id) | gone | {"upload_ends": "expired", "status": None}


def _remove_expired(world: World, facts: Facts) -> None:
    Sweeper(world.settings).remove_expired()


def _prepare_tuned(world: World) -> Facts:
    job_id = world.add_job({"steps": 2, "save_steps": 1})
    tasks.train()
    with reading() as session:
        tuned = session.get_one(Job, job_id).fine_tuned_model
    return facts_of(world, job_id) | {"tuned": tuned, "status": 200, "status_again": 404}


def _delete_model(world: World, facts: Facts) -> None:
    request(world, "delete-model", "DELETE", f"/v1/models/{facts['tuned']}")


UPLOAD_SCENARIOS = (
    Scenario(
        "upload-part",
        lambda world: {**begin(world), "upload_ends": "completed"},
        _add_parts,
        _add_parts_again,
    ),
    Scenario(
        "upload-complete",
        lambda world: {**begin(world, *PIECES), "upload_ends": "completed"},
        _complete,
        until_answered(_complete),
    ),
    Scenario(
        "upload-cancel",
        lambda world: {**begin(world, *PIECES), "upload_ends": "cancelled"},
        _cancel,
        until_answered(_cancel),
    ),
    Scenario("expire", _prepare_overdue, _remove_expired),
    Scenario("delete-model", _prepare_tuned, _delete_model, until_answered(_delete_model)),
)
