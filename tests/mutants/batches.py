"""Guards of batches: claims, results that are kept once, inputs that stay; and of the slots that live requests have."""

from tests.mutants.checks import pytest
from tests.mutants.guard import Guard, guard

STATE = "tests/shared/test_batches.py"
RUNS = "tests/worker/test_batches.py"

BATCHES: tuple[Guard, ...] = (
    guard(
        "a batch's runner has the newest fence",
        "shared/batches.py",
        "    return Batch.id == batch_id, Batch.fence == fence, Batch.status.in_(BATCH_LIVE), ",
        "    return Batch.id == batch_id, Batch.status.in_(BATCH_LIVE), ",
        pytest(f"{STATE}::test_a_claim_that_is_over_writes_nothing"),
    ),
    guard(
        "a batch whose lease has run out is nobody's",
        "shared/batches.py",
        "Batch.status.in_(BATCH_LIVE), Batch.lease_until.is_not(None)\n",
        "Batch.status.in_(BATCH_LIVE), Batch.id.is_not(None)\n",
        pytest(f"{STATE}::test_a_claim_that_is_over_writes_nothing"),
    ),
    guard(
        "a batch that somebody runs is not claimed",
        "shared/batches.py",
        "Batch.status.in_(BATCH_LIVE), Batch.lease_until.is_(None), ready",
        "Batch.status.in_(BATCH_LIVE), Batch.id.is_not(None), ready",
        pytest(f"{STATE}::test_the_oldest_batch_is_claimed_once"),
    ),
    guard(
        "a line that has a result keeps it",
        "shared/batches.py",
        "    kept = [result for result in results if result.line not in known]\n",
        "    kept = list(results)\n",
        pytest(f"{STATE}::test_counts_and_tokens_follow_the_results_and_a_repeat_changes_nothing"),
    ),
    guard(
        "a line that has a result is not asked again",
        "worker/batches.py",
        "waiting = (request for request in self._requests(stream) if request.line not in done)",
        "waiting = iter(self._requests(stream))",
        pytest(f"{RUNS}::test_a_killed_runner_costs_only_the_lines_it_was_at"),
    ),
    guard(
        "a file that a live batch needs does not expire",
        "shared/files.py",
        "        select(Batch.input_file_id).where(Batch.status.in_(BATCH_LIVE)),\n    )\n",
        "    )\n",
        pytest(f"{STATE}::test_a_file_that_a_live_batch_needs_neither_goes_nor_expires"),
    ),
    guard(
        "the sweep ends the claims of batches whose runners are dead",
        "shared/batches.py",
        "        .where(Batch.status.in_(BATCH_LIVE), Batch.lease_until < now())\n",
        "        .where(Batch.status.in_(BATCH_LIVE), Batch.lease_until < 0)\n",
        pytest(f"{STATE}::test_a_batch_that_takes_every_worker_down_fails_in_the_end"),
    ),
    guard(
        "a batch keeps no live request waiting",
        "worker/generation/loop.py",
        '        return self._settings.generation_slots - self._running_of("live")\n',
        "        return self._settings.generation_slots - len(self._running)\n",
        pytest("tests/generation/test_loading.py::test_a_batch_never_keeps_a_live_request_waiting"),
    ),
    guard(
        "a chunk that may have arrived is not added to",
        "worker/generation/mailbox.py",
        "            pieces, self.unwritten = joined(self.unwritten), []\n",
        "            pieces = joined(self.unwritten)\n",
        pytest("tests/generation/test_protocol.py::test_an_answer_arrives_in_order_and_leaves_nothing_queued"),
    ),
)
