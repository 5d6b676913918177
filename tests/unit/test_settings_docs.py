"""Every setting is in the README's table, with its default, and nothing there is made up."""

import re
from pathlib import Path

from shared.settings import Settings

ROOT = Path(__file__).parents[2]
TABLE_ROW = re.compile(r"^\| `ANNEAL_([A-Z0-9_]+)` \|", re.MULTILINE)


def documented() -> set[str]:
    return {name.lower() for name in TABLE_ROW.findall((ROOT / "README.md").read_text())}


def test_every_setting_is_documented() -> None:
    assert set(Settings.model_fields) - documented() == set()


def test_every_documented_setting_exists() -> None:
    assert documented() - set(Settings.model_fields) == set()


def test_a_typo_in_a_setting_that_the_compose_file_sets_would_show() -> None:
    """Unknown variables are ignored by the service, so a misspelt one in our own files has to be caught here."""
    known = {f"ANNEAL_{name.upper()}" for name in Settings.model_fields}
    used = set(re.findall(r"\bANNEAL_[A-Z_]+\b", (ROOT / "docker-compose.yml").read_text()))
    used |= set(re.findall(r"\bANNEAL_[A-Z_]+\b", (ROOT / "Dockerfile.gpu").read_text()))
    assert used - known - {"ANNEAL_POSTGRES_PASSWORD", "ANNEAL_REDIS_PASSWORD"} == set()
