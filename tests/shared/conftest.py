"""Storage of every kind: a folder, S3 (a real server on loopback), and another store of fsspec's."""

import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.settings import Settings
from tests.shared.places import Place


def make_place(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if kind == "s3":
        url = f"s3://{request.getfixturevalue('bucket')}/some/prefix"
    else:
        url = str(tmp_path / "storage") if kind == "folder" else f"memory://bucket{tmp_path}"
    return Place(kind, Settings(data=tmp_path / "host", storage_url=url))


@pytest.fixture(params=["folder", "s3", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Every kind of storage in turn."""
    return make_place(request.param, request, tmp_path)


@pytest.fixture(params=["s3", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Every kind of object store in turn."""
    return make_place(request.param, request, tmp_path)


@pytest.fixture
def s3(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return make_place("s3", request, tmp_path)


@pytest.fixture
def requests(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the S3 server was asked for so far, in order: `PUT /bucket/key`."""
    caplog.set_level(logging.INFO, logger="werkzeug")

    def seen() -> list[str]:
        lines = (re.search(r"(GET|PUT|POST|DELETE) (\S+)", record.getMessage()) for record in caplog.records)
        return [f"{line[1]} {line[2].partition('?')[0]}" for line in lines if line is not None]

    return seen
