"""Guards of rows: moves, fences, leases, budgets, the sweep."""

from tests.mutants.checks import contention, pytest
from tests.mutants.guard import Change, Guard, guard

JOBS = "tests/shared/test_jobs.py"
MOVES = "tests/shared/test_job_moves.py"
PAUSING = "tests/shared/test_pausing.py"
SUPERVISOR = "tests/worker/test_supervisor.py"
SWEEPER = "tests/worker/test_sweeper.py"
OUTAGE = f"{SUPERVISOR}::test_after_an_outage_nothing_expires_until_everybody_had_a_lease"
EXPIRY = f"{SUPERVISOR}::test_an_expired_lease_returns_the_job_to_the_queue"
OWN_CLAIM = f"{SUPERVISOR}::test_a_run_that_lost_its_claim_commits_nothing_more"
SKIP_LOCKED = "        .with_for_update(skip_locked=True)  # two claimers take two jobs; SQLite has one writer anyway\n"

STATE = (
    guard(
        "fence of a move",
        "shared/jobs.py",
        "held = [] if fence is None else [Job.fence == fence, Job.status == JobStatus.RUNNING]",
        "held = [] if fence is None else [Job.status == JobStatus.RUNNING]",
        pytest(f"{JOBS}::test_an_old_fence_writes_nothing"),
    ),
    guard(
        "a claim's moves start from running",
        "shared/jobs.py",
        "held = [] if fence is None else [Job.fence == fence, Job.status == JobStatus.RUNNING]",
        "held = [] if fence is None else [Job.fence == fence]",
        pytest(f"{MOVES}::test_a_claim_that_gave_its_job_back_can_not_end_it_while_it_waits"),
    ),
    guard(
        "status of a move",
        "shared/jobs.py",
        ".where(Job.id == job_id, Job.status.in_(sources), *held)",
        ".where(Job.id == job_id, *held)",
        pytest(f"{MOVES}::test_a_move_that_the_diagram_does_not_have_is_refused_whoever_asks"),
    ),
    guard(
        "fence of what a run reports",
        "shared/jobs.py",
        "        .where(Job.id == job_id, Job.fence == fence, Job.status == JobStatus.RUNNING)\n"
        "        .values(updated_at=now(), **values)",
        "        .where(Job.id == job_id)\n        .values(updated_at=now(), **values)",
        pytest(OWN_CLAIM),
    ),
    guard(
        "fence of a renewal",
        "shared/jobs.py",
        "        .where(Job.id == job_id, Job.fence == fence, Job.status == JobStatus.RUNNING)\n"
        "        .values(lease_until=now() + lease_s)",
        "        .where(Job.id == job_id, Job.status == JobStatus.RUNNING)\n"
        "        .values(lease_until=now() + lease_s)",
        pytest(f"{MOVES}::test_a_lease_is_renewed_by_the_claim_that_has_it_and_by_no_earlier_one"),
    ),
    guard(
        "a lost claim stops its run",
        "worker/lease.py",
        "                self.lost.set()\n",
        "",
        pytest("tests/worker/test_lost_claim.py"),
    ),
    guard(
        "claimers pass over locked rows",
        "shared/jobs.py",
        SKIP_LOCKED,
        "",
        contention("claimers", "postgresql", 0.3),
    ),
    Guard(
        "lock and status of a claim",
        (
            Change(
                "shared/jobs.py",
                SKIP_LOCKED,
                "",
            ),
            Change(
                "shared/jobs.py",
                ".where(Job.id == first.scalar_subquery(), Job.status == JobStatus.QUEUED)",
                ".where(Job.id == first.scalar_subquery())",
            ),
        ),
        contention("claimers", "postgresql", 0.3),
    ),
    guard(
        "an idle connection is probed",
        "shared/db.py",
        '        event.listen(engine, "checkout", partial(_probe, engine))\n',
        "",
        pytest("tests/shared/test_database.py::test_a_connection_that_was_idle_is_probed_and_one_just_used_is_not"),
    ),
    guard(
        "a session for reading writes nothing",
        "shared/db.py",
        '    event.listen(sessions, "before_flush", _refuse_flush)\n',
        "",
        pytest(
            "tests/shared/test_database.py::test_reading_takes_no_transaction_on_postgresql_and_writes_nothing_anywhere"
        ),
    ),
    guard(
        "SQLite's writers queue up",
        "shared/db.py",
        '                driver.execute("BEGIN IMMEDIATE")\n',
        '                driver.execute("BEGIN")\n',
        contention("cancel against completion", "sqlite", 0.2),
    ),
    guard(
        "a claim's lease by the database's clock",
        "shared/jobs.py",
        "            lease_until=now() + lease_s,\n",
        "            lease_until=__import__('time').time() + lease_s,\n",
        pytest(f"{MOVES}::test_a_host_whose_clock_is_an_hour_off_takes_a_lease_like_everybody_else"),
    ),
    guard(
        "numbers of events count on the row",
        "shared/events.py",
        "values(last_event=Job.last_event + 1)",
        "values(last_event=session.get(Job, job.id).last_event + 1)",
        pytest(f"{JOBS}::test_events_are_numbered_without_a_gap_by_competing_writers"),
    ),
    guard(
        "a cancel wins over a job that is given back",
        "shared/jobs.py",
        "    if job.cancel_requested_at is not None:\n        return settle_cancelled(session, job.id, job.fence)\n",
        "",
        pytest(f"{SUPERVISOR}::test_a_job_with_a_cancel_requested_is_not_given_back"),
    ),
    guard(
        "a pause that was asked for keeps a job out of the queue",
        "shared/jobs.py",
        "status = JobStatus.QUEUED if job.pause_requested_at is None else JobStatus.PAUSED",
        "status = JobStatus.QUEUED",
        pytest(f"{PAUSING}::test_whatever_would_queue_a_run_pauses_it_while_a_pause_is_asked_for"),
    ),
    guard(
        "a bad file fails paused jobs too",
        "shared/waiting.py",
        "Job.status.in_((JobStatus.VALIDATING_FILES, JobStatus.PAUSED))",
        "Job.status.in_((JobStatus.VALIDATING_FILES,))",
        pytest(f"{PAUSING}::test_a_paused_job_whose_file_turns_out_invalid_fails"),
    ),
    guard(
        "budget of attempts",
        "shared/jobs.py",
        "    if job.cancel_requested_at is None and job.attempts >= max_attempts:\n",
        "    if False:\n",
        pytest(f"{SUPERVISOR}::test_a_poison_job_fails_after_three_attempts_with_its_last_words"),
    ),
    guard(
        "budget of faults",
        "shared/jobs.py",
        "    if job.cancel_requested_at is None and job.faults >= max_faults:\n",
        "    if False:\n",
        pytest(f"{SWEEPER}::test_a_job_that_takes_every_worker_down_fails_in_the_end"),
    ),
    guard(
        "a file that a job needs is not deleted",
        "shared/files.py",
        "    if user is not None:\n",
        "    if False:\n",
        pytest("tests/api/test_files.py::test_a_file_that_a_live_job_needs_can_not_be_deleted"),
    ),
)

SWEEP = (
    guard(
        "leases expire",
        "shared/jobs.py",
        "        .where(Job.status == JobStatus.RUNNING, Job.lease_until < now())\n",
        "        .where(Job.status == JobStatus.RUNNING, Job.lease_until < 0)\n",
        pytest(EXPIRY),
    ),
    guard(
        "leases that are good do not expire",
        "shared/jobs.py",
        "        .where(Job.status == JobStatus.RUNNING, Job.lease_until < now())\n",
        "        .where(Job.status == JobStatus.RUNNING)\n",
        pytest(EXPIRY),
    ),
    guard(
        "grace after an outage",
        "shared/sweeps.py",
        "    if at - row.last_pass_at > lease_s / 2:\n        row.no_expiry_before = at + lease_s\n",
        "",
        pytest(OUTAGE),
    ),
    guard(
        "the grace is everybody's",
        "shared/sweeps.py",
        "may_expire=at >= row.no_expiry_before",
        "may_expire=at - row.last_pass_at <= lease_s / 2",
        pytest(OUTAGE),
    ),
    guard(
        "lost hints are sent again",
        "worker/sweeper.py",
        "                    send(self._celery, hint)\n",
        "                    pass\n",
        pytest("tests/worker/test_hints.py"),
    ),
    guard(
        "garbage is old",
        "worker/garbage.py",
        "            may_be_registered = job is not None and job.status == JobStatus.RUNNING and fence >= job.fence\n",
        "            may_be_registered = False\n",
        pytest(f"{SWEEPER}::test_what_may_still_get_its_row_is_spared"),
    ),
    guard(
        "garbage of another database is not ours",
        "worker/garbage.py",
        "    if owner != instance:\n",
        "    if False:\n",
        pytest(f"{SWEEPER}::test_the_storage_of_another_database_is_left_alone"),
    ),
)
