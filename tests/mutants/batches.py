"""Guards of batches: claims, results that are kept once, inputs that stay; and of the slots that live requests have."""

from tests.mutants.checks import pytest
from tests.mutants.guard import Guard, guard

STATE = "tests/shared/test_batches.py"
RUNS = "tests/worker/test_batches.py"
PROTOCOL = "tests/generation/test_protocol.py"
LOADING = "tests/generation/test_loading.py"

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
        "            waiting = self._requests(stream, done)\n            feeders",
        "            waiting = self._requests(stream, set())\n            feeders",
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
    guard(
        "a batch at its wits' end keeps its answers",
        "shared/batches.py",
        "        has_answers = batch.status == BatchStatus.IN_PROGRESS and batch.completed + batch.failed > 0\n",
        "        has_answers = False\n",
        pytest(f"{STATE}::test_a_batch_at_its_wits_end_keeps_the_answers_it_has"),
    ),
    guard(
        "whoever is silent because the broker forgot him is not given up",
        "worker/generation/mailbox.py",
        "if now - since >= GONE_S}",
        "if now >= since}",
        pytest(f"{PROTOCOL}::test_a_reader_is_gone_only_after_some_silence"),
    ),
    guard(
        "a takeover looks past the requests of the living",
        "worker/generation/mailbox.py",
        '                if cursor == b"0-0":\n',
        "                if cursor:\n",
        pytest(f"{PROTOCOL}::test_a_request_behind_many_of_the_living_is_taken_over"),
    ),
    guard(
        "what waits is bounded in bytes",
        "shared/generation_client.py",
        "if (redis.call('MEMORY', 'USAGE', KEYS[1]) or 0) > tonumber(ARGV[5]) then return false end\n",
        "",
        pytest(f"{PROTOCOL}::test_requests_that_wait_are_bounded_in_bytes"),
    ),
    guard(
        "what has no room beside pinned models is refused",
        "worker/generation/cache.py",
        "        self._refuse_beside_pinned(plan, location, name)\n",
        "",
        pytest(f"{LOADING}::test_a_model_too_large_beside_the_pinned_ones_is_refused_and_stops_nobody"),
    ),
    guard(
        "the log-probabilities of a request are bounded",
        "worker/generation/engine.py",
        "    refuse_too_many_scores(request, room)\n",
        "",
        pytest("tests/shared/test_generation_bounds.py::test_log_probabilities_of_one_request_are_bounded"),
    ),
)
