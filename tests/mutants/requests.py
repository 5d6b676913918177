"""Guards of what clients ask for: uploads in parts, expiry, keys, pauses, priorities, deleted models."""

from tests.mutants.checks import failpoints, pytest
from tests.mutants.guard import Change, Guard, guard

UPLOADS = "tests/api/test_uploads.py"
EXPIRY = "tests/worker/test_expiry.py"
ONCE = "tests/api/test_idempotency.py"
MODELS = "tests/api/test_models.py"
PAUSING = "tests/shared/test_pausing.py"
DELETED_WHILE_USED = f"{MODELS}::test_a_model_stays_while_a_job_that_starts_from_it_has_not_ended"

REQUESTS = (
    guard(
        "reads wait apart from writes",
        "api/model_route.py",
        "_in_turn(endpoint, _reads if reads else _writes)",
        "_in_turn(endpoint, _writes)",
        pytest("tests/api/test_model_route.py::test_a_lock_that_holds_up_writes_holds_up_no_read"),
    ),
    guard(
        "nobody waits for a turn for ever",
        "api/model_route.py",
        "            with fail_after(MOST_WAIT_S):\n",
        "            with fail_after(60):\n",
        pytest("tests/api/test_model_route.py::test_who_waits_too_long_for_a_turn_is_told_and_nothing_was_done"),
    ),
    guard(
        "a job that leaves during a look is taken out of it",
        "shared/queue_view.py",
        "                change(view, place)\n            self._view = view\n",
        "                pass\n            self._view = view\n",
        pytest("tests/shared/test_queue_view.py::test_what_comes_and_leaves_during_a_look_is_not_lost"),
    ),
    guard(
        "a try is told what its last try was",
        "shared/answers.py",
        "        .order_by(Creation.told_to.desc(), Creation.created_at.desc())\n",
        "        .order_by(Creation.created_at.desc())\n",
        pytest(
            "tests/worker/test_expiry.py::test_who_lost_an_answer_twice_is_told_of_the_same_object_and_of_nobody_elses"
        ),
    ),
    guard(
        "an upload ends once",
        "shared/uploads.py",
        "        .where(Upload.id == upload_id, Upload.status == UploadStatus.PENDING, *also)\n",
        "        .where(Upload.id == upload_id, *also)\n",
        pytest(f"{UPLOADS}::test_a_completion_loses_against_a_cancel_that_comes_meanwhile"),
    ),
    guard(
        "an upload that has ended takes no part",
        "shared/uploads.py",
        "    upload = get_pending(session, project_id, upload_id, hold=True)\n",
        "    upload = session.get_one(Upload, upload_id)\n",
        pytest(f"{UPLOADS}::test_a_part_that_arrives_while_its_upload_ends_leaves_nothing"),
    ),
    guard(
        "an upload has an hour",
        "shared/uploads.py",
        "    if row.status != UploadStatus.PENDING or has_passed(session, row.expires_at):\n",
        "    if row.status != UploadStatus.PENDING:\n",
        pytest(f"{UPLOADS}::test_an_upload_counts_as_expired_before_the_sweep_comes"),
    ),
    guard(
        "parts amount to what was announced",
        "shared/uploads.py",
        "    if total != upload.bytes:\n",
        "    if False:\n",
        pytest(f"{UPLOADS}::test_a_wrong_completion_says_why_and_can_be_mended"),
    ),
    guard(
        "a completed upload has no parts",
        "shared/uploads.py",
        "    return row, file, _remove_parts(session, [upload_id])\n",
        "    return row, file, []\n",
        failpoints("upload-complete"),
    ),
    Guard(
        "a completed upload does not expire",
        (
            Change(
                "shared/uploads.py",
                "            .where(Upload.status == UploadStatus.PENDING, Upload.expires_at <= now())\n",
                "            .where(Upload.expires_at <= now())\n",
            ),
            Change(
                "shared/uploads.py",
                "Upload.id.in_(mine), Upload.status == UploadStatus.PENDING, Upload.expires_at <= now()",
                "Upload.id.in_(mine), Upload.expires_at <= now()",
            ),
        ),
        pytest(f"{EXPIRY}::test_a_completed_upload_never_expires"),
    ),
    guard(
        "a part's row owns its bytes",
        "worker/garbage.py",
        "(select(model.id).where(model.id.in_(file_ids)) for model in (File, UploadPart))",
        "(select(model.id).where(model.id.in_(file_ids)) for model in (File, File))",
        pytest(f"{EXPIRY}::test_parts_of_a_pending_upload_are_no_garbage_and_lost_bytes_are"),
    ),
    guard(
        "a row that comes while garbage is collected keeps its bytes",
        "worker/garbage.py",
        "            if not _without_row([file_id]):\n",
        "            if False:\n",
        pytest(f"{EXPIRY}::test_a_row_that_comes_while_garbage_is_collected_keeps_its_bytes"),
    ),
    guard(
        "no row stays without its bytes",
        "shared/files.py",
        "        if not storage.has_file(settings, object_id):\n",
        "        if False:\n",
        pytest(f"{UPLOADS}::test_bytes_that_were_collected_before_the_commit_leave_no_row"),
    ),
    guard(
        "bytes of an upload that lost a race are removed",
        "shared/files.py",
        "    if not known:\n        with suppress(storage.StorageUnavailable):  # then it is garbage",
        "    if False:\n        with suppress(storage.StorageUnavailable):  # then it is garbage",
        pytest(f"{UPLOADS}::test_of_completions_at_once_one_wins_and_all_are_told_of_it"),
    ),
    guard(
        "a file that a live job needs does not expire",
        "shared/files.py",
        "    return File.expires_at <= at, File.id.not_in(needed)\n",
        "    return (File.expires_at <= at,)\n",
        pytest(f"{EXPIRY}::test_an_expired_file_stays_while_a_live_job_needs_it"),
    ),
    guard(
        "no job begins with a file that has expired",
        "shared/job_creation.py",
        " or (file.expires_at is not None and file.expires_at <= at)",
        "",
        pytest("tests/api/test_file_expiry.py::test_an_expired_file_is_not_there_for_anybody"),
    ),
    guard(
        "an answer commits with what it is about",
        "api/idempotency.py",
        "            if not answers.keep(session, request, 200, answer.model_dump_json()):\n"
        "                raise Replay(_winner(session, request))\n"
        "        elif",
        "            import threading\n"
        "            body = answer.model_dump_json()\n\n"
        "            def later() -> None:\n"
        "                with transaction() as another:\n"
        "                    answers.keep(another, request, 200, body)\n\n"
        "            threading.Timer(0.2, later).start()\n"
        "        elif",
        failpoints("submit-with-key", "commit", "kill after"),
    ),
    guard(
        "a creation without a key is remembered in its transaction",
        "api/idempotency.py",
        "            answers.remember_creation("
        "session, self._project_id, self._sha256, object_id, body, self._retries or 0)\n",
        "            pass\n",
        pytest(f"{ONCE}::test_a_retry_without_a_key_is_told_once_what_was_created"),
    ),
    guard(
        "a key belongs to one body",
        "shared/answers.py",
        "    if row.request_sha256 != request.sha256:\n",
        "    if False:\n",
        pytest(f"{ONCE}::test_a_key_belongs_to_one_body"),
    ),
    guard(
        "of requests at once with one key the first counts",
        "shared/answers.py",
        "    return written.one_or_none() is not None\n",
        "    written.one_or_none()\n    return True\n",
        pytest(f"{ONCE}::test_requests_that_arrive_together_with_one_key_create_once"),
    ),
    guard(
        "a retry is told once",
        "shared/answers.py",
        "        .values(told_to=retries)\n",
        "        .values(told_to=0)\n",
        pytest(f"{ONCE}::test_a_retry_without_a_key_is_told_once_what_was_created"),
    ),
    guard(
        "a failure of ours leaves the key free",
        "api/idempotency.py",
        "        will_stay = error.status_code < 500 and error.status_code not in NOT_FINAL\n",
        "        will_stay = True\n",
        pytest(f"{ONCE}::test_a_failure_of_ours_leaves_the_key_free"),
    ),
    guard(
        "a pause wins over the queue",
        "shared/jobs.py",
        "    status = JobStatus.QUEUED if job.pause_requested_at is None else JobStatus.PAUSED\n",
        "    status = JobStatus.QUEUED\n",
        pytest(f"{PAUSING}::test_whatever_would_queue_a_run_pauses_it_while_a_pause_is_asked_for"),
    ),
    guard(
        "a cancel wins over a pause",
        "shared/jobs.py",
        "    if job.cancel_requested_at is not None:\n        return settle_cancelled(session, job.id, job.fence)\n",
        "    if job.cancel_requested_at is not None and job.pause_requested_at is None:\n"
        "        return settle_cancelled(session, job.id, job.fence)\n",
        failpoints("pause-and-cancel"),
    ),
    Guard(
        "a paused job is not claimed",
        (
            Change(
                "shared/jobs.py",
                "    return (Job.status == JobStatus.QUEUED, or_(Job.not_before",
                "    return (Job.status.in_((JobStatus.QUEUED, JobStatus.PAUSED)), or_(Job.not_before",
            ),
            Change(
                "shared/jobs.py",
                ".where(Job.id == first.scalar_subquery(), Job.status == JobStatus.QUEUED)",
                ".where(Job.id == first.scalar_subquery())",
            ),
        ),
        failpoints("pause-waiting"),
    ),
    guard(
        "only a live job is resumed",
        "shared/waiting.py",
        '    _demand_live(job, "resumed")\n',
        "",
        pytest(f"{PAUSING}::test_terminal_states_take_neither_pause_nor_resume"),
    ),
    guard(
        "only a live job is paused",
        "shared/waiting.py",
        '    _demand_live(job, "paused")\n',
        "",
        pytest(f"{PAUSING}::test_terminal_states_take_neither_pause_nor_resume"),
    ),
    guard(
        "a job is resumed to where its files let it",
        "shared/waiting.py",
        "        ready = _files_are_checked(session, job)\n",
        "        ready = True\n",
        pytest(f"{PAUSING}::test_a_job_paused_while_its_file_is_unchecked_waits_for_it_again"),
    ),
    guard(
        "a paused job with a bad file fails",
        "shared/waiting.py",
        "            Job.status.in_((JobStatus.VALIDATING_FILES, JobStatus.PAUSED)),\n",
        "            Job.status == JobStatus.VALIDATING_FILES,\n",
        pytest(f"{PAUSING}::test_a_paused_job_whose_file_turns_out_invalid_fails"),
    ),
    guard(
        "a pause ends with the run it was asked of",
        "shared/jobs.py",
        ".values(status=to, updated_at=now(), pause_requested_at=None, estimated_finish=None, **values)",
        ".values(status=to, updated_at=now(), estimated_finish=None, **values)",
        pytest(f"{PAUSING}::test_whatever_would_queue_a_run_pauses_it_while_a_pause_is_asked_for"),
    ),
    guard(
        "the highest priority is claimed first",
        "shared/jobs.py",
        "        .order_by(Job.priority.desc(), Job.created_at, Job.id)\n",
        "        .order_by(Job.created_at, Job.id)\n",
        pytest("tests/shared/test_queue_view.py::test_the_highest_priority_is_claimed_first_then_the_oldest"),
    ),
    guard(
        "a model in use is not deleted",
        "shared/checkpoints.py",
        '    if user is not None:\n        why = "it belongs to"',
        '    if False:\n        why = "it belongs to"',
        pytest(DELETED_WHILE_USED),
    ),
    guard(
        "a paused job uses its model",
        "shared/checkpoints.py",
        "(Job.model_location == model.location), Job.status.not_in(TERMINAL))\n",
        '(Job.model_location == model.location), Job.status.not_in((*TERMINAL, "paused")))\n',
        pytest(DELETED_WHILE_USED),
    ),
    guard(
        "weights stay while another name has them",
        "shared/checkpoints.py",
        "    return [model.location] if len(doomed) == len(rows) else []\n",
        "    return [model.location]\n",
        pytest(f"{MODELS}::test_a_deleted_checkpoint_leaves_the_model_made_of_it"),
    ),
)
