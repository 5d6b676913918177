"""A job's result file: its loss curve as CSV, made when it succeeds, in OpenAI's columns."""

import csv
import io
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from shared import files, storage
from shared.db import reading
from shared.ids import new_id
from shared.models import FileStatus, Job, Metric
from shared.settings import Settings

COLUMNS = {
    "train_loss": "loss",
    "train_accuracy": "mean_token_accuracy",
    "valid_loss": "eval_loss",
    "valid_mean_token_accuracy": "eval_mean_token_accuracy",
}
"""OpenAI's names after `step`, and ours."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A result file in storage that no row names yet."""

    file_id: str
    stored: storage.Stored
    rows: int


def write_curve(settings: Settings, job: Job) -> Curve:
    """Write the job's metrics to storage; `register` makes the file known, or the caller deletes it."""
    with reading() as session:
        metrics = session.scalars(select(Metric).where(Metric.job_id == job.id).order_by(Metric.step)).all()
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["step", *COLUMNS])
    for row in metrics:
        writer.writerow([row.step, *(row.values.get(name, "") for name in COLUMNS.values())])
    file_id = new_id("file")
    content = text.getvalue().encode()
    stored = storage.save_file(settings, file_id, [content], max_bytes=len(content))
    return Curve(file_id, stored, len(metrics))


def register(session: Session, job: Job, curve: Curve) -> None:
    """Add the result file's row."""
    files.create(
        session,
        file_id=curve.file_id,
        project_id=job.project_id,
        filename="step_metrics.csv",
        purpose=files.RESULTS_PURPOSE,
        size_bytes=curve.stored.bytes,
        sha256=curve.stored.sha256,
        status=FileStatus.PROCESSED,
        rows=curve.rows,
    )
