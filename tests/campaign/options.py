"""What a campaign is asked for, and the settings its service runs with."""

import os
from dataclasses import dataclass
from pathlib import Path

from shared.settings import Settings
from tests.campaign import plan as plans
from tests.campaign.loads import Pace
from tests.campaign.postgres import Postgres
from tests.campaign.service import REPOSITORY
from tests.campaign.toy_trainer import JOURNAL

CHAT_DEADLINE_S = 15.0


@dataclass(frozen=True)
class Options:
    seed: int
    faults: int = 200
    jobs: int = 150
    database: str = "sqlite"
    trainer: str = "toy"
    lease_s: float = 4
    mean_wait_s: float | None = None
    """Between two faults; None: what suits the trainer."""
    minutes: float = 60
    generators: int = 2
    """0: nobody asks anything, live or in batches."""
    batches: int = 10
    """At least so many are sent; more as long as there are faults."""
    parcels: bool = True
    """A client sends files in parts all the time."""
    garbage_age_s: float = 40
    """More than a process may stand still and then wait for SQLite: until then bytes may still get their row."""

    @property
    def generate(self) -> bool:
        return self.generators > 0


def environment_of(options: Options, folder: Path, pace: Pace, postgres: Postgres | None) -> dict[str, str]:
    """The variables of every process of the service; ours are passed on, but for those that are settings."""
    values = {
        "DATA": str(folder / "data"),
        "PORT": "0",
        "MODELS_DIR": str(folder / "models"),
        "HUB_OFFLINE": "true",
        "LEASE_S": f"{options.lease_s:g}",
        "HEARTBEAT_S": f"{options.lease_s / 4:g}",
        "POLL_S": "0.2",
        "RETRY_DELAY_S": "0",
        "MAX_ATTEMPTS": "12",
        "MAX_FAULTS": "200",
        "TRAINER_SILENT_S": f"{pace.trainer_silent_leases * options.lease_s:g}",
        "TRAINER_STOP_S": "2",
        "DEPLOY_STOP_S": "5",
        "GARBAGE_AGE_S": f"{options.garbage_age_s:g}",
        "INLINE_VALIDATION_BYTES": str(plans.INLINE_VALIDATION_BYTES),
        "GENERATION_DEADLINE_S": f"{CHAT_DEADLINE_S:g}",
        "CAMPAIGN_JOURNAL": str(folder / "journal"),
    }
    if postgres is not None:
        values["DATABASE_URL"] = postgres.url
    ours = {f"ANNEAL_{name}": value for name, value in values.items()}
    assert JOURNAL in ours
    theirs = {name: value for name, value in os.environ.items() if not name.startswith("ANNEAL_")}
    return {**theirs, **ours, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}


def settings_of(environment: dict[str, str]) -> Settings:
    """The settings a process with that environment has; ours is not looked at."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    try:
        return Settings()
    finally:
        os.environ.clear()
        os.environ.update(before)
