"""Supervision with checkpoints and files in S3 (a real server on loopback) and hosts that share nothing else."""

from collections.abc import Callable
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer
from sqlalchemy import select

from shared import storage
from shared.checkpoint_files import sha256_of
from shared.db import reading
from shared.models import Checkpoint, Metric
from shared.settings import Settings, get_settings
from tests.waiting import wait_until
from tests.worker.steps import at_step, claim, expected, in_thread, job_of, messages, run_next
from worker import garbage


@pytest.fixture
def server(bucket: str, monkeypatch: pytest.MonkeyPatch) -> ThreadedMotoServer:
    """A server of the test's own, which it may stop. It shares its buckets with the others."""
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    return running


@pytest.fixture
def settings(settings: Settings, bucket: str, server: ThreadedMotoServer, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("ANNEAL_STORAGE_URL", f"s3://{bucket}/anneal")
    get_settings.cache_clear()
    return get_settings()


def keys(bucket: str) -> list[str]:
    found = boto3.client("s3").list_objects_v2(Bucket=bucket).get("Contents", ())
    return sorted(key["Key"].removeprefix("anneal/") for key in found)


def steps_in(bucket: str, job_id: str) -> list[int]:
    """Steps whose checkpoint is published, over all claims."""
    manifests = (key.split("/") for key in keys(bucket) if key.endswith("/manifest.json"))
    return sorted(int(step) for _, job, _, step, _ in manifests if job == job_id)


def test_a_job_goes_on_at_another_host_from_its_checkpoint_in_the_bucket(
    settings: Settings, submit: Callable[..., str], bucket: str, tmp_path: Path
) -> None:
    job_id = submit(steps=5, save_steps=1, behaviour="kill_at_3")
    run_next(settings)
    assert job_of(job_id).status == "queued"
    assert steps_in(bucket, job_id) == [1, 2]
    elsewhere = Settings(data=tmp_path / "another-host")
    run_next(elsewhere)
    job = job_of(job_id)
    assert (job.status, job.fence) == ("succeeded", 2), job.error
    assert "Resumed from step 2" in messages(job_id)
    with reading() as session:
        assert list(session.scalars(select(Metric.step).order_by(Metric.step))) == [1, 2, 3, 4, 5]
        location = session.scalars(select(Checkpoint.location).where(Checkpoint.step == 5)).one()
    weights = storage.local_checkpoint(Settings(data=tmp_path / "a-third-host"), location) / "model.safetensors"
    assert sha256_of(weights) == expected(settings, job, 5).weights_sha256
    for host in (settings, elsewhere):
        assert not list(storage.staging_dir(host, job_id, job.fence).glob("*"))


def test_checkpoints_wait_while_the_bucket_is_away_and_training_goes_on(
    settings: Settings,
    submit: Callable[..., str],
    server: ThreadedMotoServer,
    bucket: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    job_id = submit(steps=20, save_steps=5, step_s=0.4)
    thread = in_thread(claim(settings), settings)
    wait_until(lambda: at_step(job_id, 2))
    _, port = server.get_host_and_port()
    server.stop()
    wait_until(lambda: "waits for the storage" in caplog.text)  # the client itself has tried again before
    assert thread.is_alive()
    again = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    again.start()
    thread.join(60)
    job = job_of(job_id)
    assert (job.status, job.fence, job.faults) == ("succeeded", 1, 0), job.error
    with reading() as session:
        rows = session.scalars(select(Checkpoint).order_by(Checkpoint.step)).all()
    assert steps_in(bucket, job_id) == [row.step for row in rows]
    assert rows[-1].step == 20
    again.stop()


def test_garbage_in_the_bucket_is_collected_and_nothing_else(
    settings: Settings, submit: Callable[..., str], bucket: str
) -> None:
    job_id = submit(steps=5, save_steps=2)
    run_next(settings)
    before = keys(bucket)
    garbage.collect(settings, "this database")
    client = boto3.client("s3")
    doomed = ["files/file-x", f"checkpoints/{job_id}/9/1/model.safetensors", "checkpoints/ftjob-gone/1/1/manifest.json"]
    for key in doomed:
        client.put_object(Bucket=bucket, Key=f"anneal/{key}", Body=b"garbage")
    assert garbage.collect(settings.model_copy(update={"garbage_age_s": 0}), "this database") == 3
    assert [key for key in keys(bucket) if not key.startswith(".")] == before
