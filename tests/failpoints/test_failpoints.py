"""A sample of the failpoints at each change; `python -m tests.failpoints` runs them all."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import delete, update

from shared.db import transaction
from shared.models import Batch, BatchLine
from tests.failpoints import cuts, runner
from tests.failpoints.ledger import Ledger
from tests.failpoints.points import Point
from tests.failpoints.runner import Case, Outcome
from tests.failpoints.scenarios import SCENARIOS, Facts, Scenario
from tests.failpoints.services import Databases, databases
from tests.failpoints.world import World

LANES = 3
SAMPLE = 16
OPERATIONS = {"create", "write", "fsync", "rename", "mkdir", "unlink", "rmdir", "commit", "publish", "send", "report"}


@pytest.fixture(scope="module")
def source() -> Iterator[Databases]:
    with databases("sqlite") as source:
        yield source


@pytest.fixture(scope="module")
def counted(source: Databases) -> list[Outcome]:
    """Every scenario once, with nothing broken."""
    return runner.run_all([Case(scenario) for scenario in SCENARIOS], source, LANES, {}, lambda outcome: None)


def points(counted: list[Outcome]) -> dict[str, list[Point]]:
    return {outcome.scenario: runner.points_of(outcome) for outcome in counted}


def told(outcomes: list[Outcome]) -> list[str]:
    return [
        f"{outcome.replay} at {outcome.point}: {sentence}"
        for outcome in outcomes
        for sentence in (*outcome.problems, *outcome.debts)
    ]


def test_undisturbed_every_scenario_leaves_things_as_they_should_be_and_owes_no_fsync(counted: list[Outcome]) -> None:
    assert told(counted) == []


def test_there_are_hundreds_of_points_of_every_kind(counted: list[Outcome]) -> None:
    found = [point for some in points(counted).values() for point in some]
    assert len(found) >= 300
    assert {point.operation for point in found} >= OPERATIONS


def test_a_sample_of_all_faults_does_no_harm(source: Databases, counted: list[Outcome]) -> None:
    known = points(counted)
    cases = [case for scenario in SCENARIOS for case in runner.cases_of(scenario, known[scenario.name], False)]
    sample = cases[7 :: len(cases) // SAMPLE]
    outcomes = runner.run_all(sample, source, LANES, {}, lambda outcome: None)
    assert told(outcomes) == []
    struck = sum(outcome.struck for outcome in outcomes)
    assert struck >= 0.85 * len(outcomes), "where threads compete, a few points may not be met again"


def test_the_harness_sees_what_it_looks_for(source: Databases) -> None:
    def spoil(world: object, facts: dict[str, object]) -> None:
        from worker import tasks

        tasks.train()
        (model,) = Path(facts["root"]).glob("checkpoints/*/*/2/model.safetensors")  # type: ignore[arg-type]
        model.write_bytes(b"not what was trained")

    by_name = {scenario.name: scenario for scenario in SCENARIOS}
    whole = by_name["heartbeat"]
    scenario = Scenario(
        "spoilt",
        lambda world: {**whole.prepare(world), "root": str(world.settings.storage_root)},
        spoil,
    )
    (outcome,) = runner.run_all([Case(scenario)], source, 1, {}, lambda outcome: None)
    assert any("is not whole" in sentence for sentence in outcome.problems)


def _forget_results(batch_id: str) -> None:
    with transaction() as session:
        session.execute(delete(BatchLine))
        session.execute(update(Batch).where(Batch.id == batch_id).values(completed=0, failed=0))


def _count_one_more(batch_id: str) -> None:
    with transaction() as session:
        session.execute(update(Batch).where(Batch.id == batch_id).values(completed=Batch.completed + 1))


def _lose_the_output(batch_id: str) -> None:
    with transaction() as session:
        session.execute(update(Batch).where(Batch.id == batch_id).values(output_file_id=None))


@pytest.mark.parametrize(
    ("before", "after", "sentences"),
    [
        (_forget_results, None, ("was recorded, and is in no file", "and was asked again")),
        (_count_one_more, None, ("lines, its file",)),
        (None, _lose_the_output, ("0 batches name the file", "not one for each of")),
    ],
)
def test_the_harness_sees_what_it_looks_for_in_batches(
    source: Databases,
    before: Callable[[str], None] | None,
    after: Callable[[str], None] | None,
    sentences: tuple[str, ...],
) -> None:
    def spoil(world: World, facts: Facts) -> None:
        if before is not None:
            before(facts["batch"])
        whole.act(world, facts)
        if after is not None:
            after(facts["batch"])

    whole = next(scenario for scenario in SCENARIOS if scenario.name == "batch-resume")
    scenario = dataclasses.replace(whole, name="spoilt", act=spoil)
    (outcome,) = runner.run_all([Case(scenario)], source, 1, {}, lambda outcome: None)
    for sentence in sentences:
        assert any(sentence in problem for problem in outcome.problems), outcome.problems


def test_a_checkpoint_cut_at_any_byte_is_not_accepted() -> None:
    result = cuts.run_all()
    assert result["tried"] > 500
    assert result["accepted_which"] == []


def test_a_ledger_forgives_nothing_that_was_not_synced(tmp_path: Path) -> None:
    owed: list[str] = []
    folder, file = tmp_path / "a", tmp_path / "a" / "b"
    ledger = Ledger(tmp_path, owed.append, lambda: {str(folder)})
    folder.mkdir()
    ledger.entry_changed(str(folder))
    file.write_bytes(b"x")
    ledger.entry_changed(str(file))
    ledger.content_changed(str(file))
    with file.open("rb") as stream:
        ledger.synced(stream.fileno())
    ledger.committed()
    assert [sentence.split()[0] for sentence in owed] == ["a", "a/b"]
    assert all("its folder is not synced" in sentence for sentence in owed)
