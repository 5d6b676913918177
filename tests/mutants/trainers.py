"""Guards of trainers: how they end, and what ends a run."""

from tests.mutants.checks import pytest
from tests.mutants.guard import guard

SUPERVISOR = "tests/worker/test_supervisor.py"
DEPLOY = f"{SUPERVISOR}::test_a_worker_that_shuts_down_saves_and_gives_the_job_back"
BONDS = "tests/worker/test_bonds.py"
STANDBY = "tests/training/test_standby.py"

TRAINER = (
    guard(
        "parent-death signal",
        "worker/lifecycle.py",
        "    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:\n",
        "    if False:\n",
        pytest("tests/worker/test_trainer_group.py::test_a_trainer_that_was_stopped_dies_with_its_killed_supervisor"),
    ),
    guard(
        "leash",
        "worker/training/leash.py",
        "            elif now - heard_at > self._leash_s",
        "            elif False",
        pytest(f"{BONDS}::test_a_trainer_of_a_stopped_supervisor_ends_before_the_lease_could"),
    ),
    guard(
        "a lost claim drops the leash",
        "worker/trainer_process.py",
        "            while not self._stopped.wait(ALIVE_EVERY_S) and not self._claim_lost.is_set():\n",
        "            while not self._stopped.wait(ALIVE_EVERY_S):\n",
        pytest(f"{BONDS}::test_a_trainer_whose_claim_is_lost_ends_itself_while_its_supervisor_is_busy"),
    ),
    guard(
        "signs of life",
        "worker/supervisor.py",
        "                if time.monotonic() - trainer.heard_at > self._settings.trainer_silent_s:\n",
        "                if False:\n",
        pytest(f"{BONDS}::test_a_trainer_that_was_stopped_is_killed_and_its_job_goes_on", limit_s=90, hang_counts=True),
    ),
    guard(
        "host lock",
        "worker/host_lock.py",
        "                _end_holder(descriptor)\n",
        "",
        pytest(f"{BONDS}::test_a_new_supervisor_ends_the_stopped_trainer_of_an_earlier_claim"),
    ),
    guard(
        "the standby's lock names it",
        "worker/standby.py",
        "            lock.note(self.pid)\n",
        "",
        pytest(f"{STANDBY}::test_the_lock_is_the_standbys_once_it_has_the_job"),
    ),
    guard(
        "the lock goes with the job to a standby",
        "worker/training/standby.py",
        "            self.lock += descriptors\n",
        "            self.lock += descriptors and [os.close(descriptors[0]) or 0]\n",
        pytest(f"{STANDBY}::test_the_lock_is_the_standbys_once_it_has_the_job"),
    ),
    guard(
        "a standby is on the job's leash",
        "worker/standby.py",
        "            self._leash.ends_with(claim_lost)\n",
        "",
        pytest(f"{STANDBY}::test_a_claim_that_is_lost_ends_the_standby_that_took_it"),
    ),
    guard(
        "a stale standby is put away",
        "worker/standby.py",
        "        if self.exit_status() is not None or not self._is_as_fresh_for(spec):\n",
        "        if self.exit_status() is not None:\n",
        pytest(f"{STANDBY}::test_a_standby_that_is_no_use_is_gone_and_leaves_the_lock[stale environment]"),
    ),
    guard(
        "a standby that can't take the job is killed",
        "worker/standby.py",
        '            log.warning("the standby %d did not take job %s: %s; %s", self.pid, spec.job_id, error, how)\n'
        "            self.close()\n",
        '            log.warning("the standby %d did not take job %s: %s; %s", self.pid, spec.job_id, error, how)\n',
        pytest(f"{STANDBY}::test_a_standby_that_is_no_use_is_gone_and_leaves_the_lock[stopped]"),
    ),
    guard(
        "a standby's model is the job's own",
        "worker/training/standby.py",
        "        if ahead is not None and same and self._files == _state_of(folder):\n",
        "        if ahead is not None and same:\n",
        pytest(f"{STANDBY}::test_what_was_loaded_ahead_is_used_for_the_same_files_and_choices_only", limit_s=120),
    ),
    guard(
        "damaged tokens are not trained on",
        "worker/training/token_cache.py",
        "    if hashlib.sha256(body).digest() != digest or not body.startswith(MAGIC):\n",
        "    if not body.startswith(MAGIC):\n",
        pytest("tests/unit/test_token_cache.py::test_a_damaged_entry_is_no_entry"),
    ),
    guard(
        "the whole group is killed",
        "worker/trainer_process.py",
        "            os.killpg(group, signal.SIGKILL)\n",
        "            os.kill(group, signal.SIGKILL)\n",
        pytest("tests/worker/test_trainer_group.py::test_what_a_trainer_started_is_gone_once_it_was_killed"),
    ),
    guard(
        "SIGTERM asks for a checkpoint",
        "worker/training/stopping.py",
        "        signal.signal(signal.SIGTERM, self._interrupt)\n        signal.signal(signal.SIGUSR1, self._cancel)\n",
        "        signal.signal(signal.SIGUSR1, self._cancel)\n",
        pytest(DEPLOY),
    ),
    guard(
        "a deploy reaches the trainer",
        "worker/orders.py",
        "            self.close()  # it stays readable; do not spin on it\n            self._interrupt()\n",
        "            self.close()\n",
        pytest(DEPLOY, limit_s=90, hang_counts=True),
    ),
    guard(
        "a deaf trainer is killed",
        "worker/supervisor.py",
        "            if orders.overdue:\n",
        "            if False:\n",
        pytest(f"{SUPERVISOR}::test_a_trainer_deaf_to_signals_is_killed", limit_s=90, hang_counts=True),
    ),
    guard(
        "a loss that is not finite ends the run",
        "worker/training/callbacks.py",
        "        if math.isfinite(loss) and (math.isfinite(norm) or not norm_matters):\n",
        "        if True:\n",
        pytest("tests/training/test_engine.py::test_a_loss_that_is_not_finite_ends_the_run_as_diverged"),
    ),
    guard(
        "memory that only makes steps faster is given up before an attempt",
        "worker/training/engine.py",
        "            if not stepper.can_shrink or not is_out_of_memory(error):\n",
        "            if True:\n",
        pytest("tests/training/test_engine.py::test_a_step_is_done_again_with_the_memory_that_made_it_faster"),
    ),
    guard(
        "only a step that ran out of memory is done again",
        "worker/training/engine.py",
        "            if not stepper.can_shrink or not is_out_of_memory(error):\n",
        "            if not stepper.can_shrink:\n",
        pytest("tests/training/test_engine.py::test_a_step_that_fails_for_good_fails_once"),
    ),
    guard(
        "a step is done again only with memory that was given up",
        "worker/training/engine.py",
        "            if not stepper.can_shrink or not is_out_of_memory(error):\n",
        "            if not is_out_of_memory(error):\n",
        pytest("tests/training/test_engine.py::test_a_step_that_fails_for_good_fails_once"),
    ),
    guard(
        "a step that is done again keeps nothing of the pass that failed",
        "worker/training/decoder.py",
        "                leaf.grad = None  # of a pass that broke off\n",
        "                pass\n",
        pytest("tests/training/test_engine.py::test_a_step_is_done_again_with_the_memory_that_made_it_faster"),
    ),
    guard(
        "a resumed run keeps its passes",
        "worker/training/loop.py",
        "            begun_with=plan.sizes,\n",
        "",
        pytest(
            "tests/training/test_exact_resume.py::test_a_run_that_is_resumed_with_less_memory_free_is_exact",
            limit_s=120,
        ),
    ),
    guard(
        "a rung of tokens halves them",
        "worker/training/resolve.py",
        "min(most_tokens, largest)",
        "most_tokens",
        pytest(
            "tests/unit/test_training_ladder.py::test_where_we_chose_the_passes_each_rung_halves_their_tokens",
        ),
    ),
    guard(
        "a rung keeps the batch",
        "worker/training/ladder.py",
        '{**kept, "micro_batch_size": smaller, "gradient_accumulation_steps": batch // smaller}',
        '{**kept, "micro_batch_size": smaller}',
        pytest("tests/unit/test_training_ladder.py::test_micro_batches_shrink_first_and_the_batch_never_changes"),
    ),
)
