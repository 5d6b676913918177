"""Guards of bytes: fsyncs, renames, manifests, retention, what goes with a row."""

from tests.mutants.checks import failpoints, pytest
from tests.mutants.guard import Change, Guard, guard

MOVES = "tests/shared/test_job_moves.py"
SUPERVISOR = "tests/worker/test_supervisor.py"
CHECKPOINT = "tests/unit/test_training_checkpoint.py"

BYTES = (
    guard(
        "fsync of an uploaded file",
        "shared/storage/folder.py",
        "                os.fsync(stream.fileno())\n            Path(name).rename(target)\n",
        "            Path(name).rename(target)\n",
        failpoints("upload"),
    ),
    guard(
        "fsync of the folder of an uploaded file",
        "shared/storage/folder.py",
        "            Path(name).rename(target)\n            sync(target.parent)\n",
        "            Path(name).rename(target)\n",
        failpoints("upload"),
    ),
    guard(
        "fsync of a checkpoint's files",
        "worker/training/checkpoint.py",
        "    sync(path)\n    return FileRecord(",
        "    return FileRecord(",
        failpoints("run"),
    ),
    guard(
        "fsync of a checkpoint's manifest",
        "worker/training/checkpoint.py",
        "        sync(temporary / MANIFEST)\n",
        "",
        failpoints("run"),
    ),
    guard(
        "fsync of a checkpoint's folder",
        "worker/training/checkpoint.py",
        "        sync(temporary)\n",
        "",
        failpoints("run"),
    ),
    guard(
        "fsync of the folder around a checkpoint",
        "worker/training/checkpoint.py",
        "        sync(folder.parent)\n",
        "",
        failpoints("run"),
    ),
    guard(
        "fsync of a new folder's entry",
        "shared/disk.py",
        "        if made != made.parent:\n            sync(made.parent)\n",
        "        pass\n",
        failpoints("run"),
    ),
    Guard(
        "a checkpoint appears by a rename",
        (
            Change(
                "worker/training/checkpoint.py",
                '    temporary = folder.parent / f"{TEMPORARY_PREFIX}{folder.name}-{os.getpid()}"\n',
                "    temporary = folder\n",
            ),
            Change(
                "worker/training/checkpoint.py", "        if folder.exists():\n", "        if temporary != folder:\n"
            ),
        ),
        failpoints("run", "trainer: write storage", "kill before"),
    ),
    guard(
        "digests in the manifest are compared",
        "shared/checkpoint_files.py",
        "        if sha256_of(path / name) != record.sha256:\n",
        "        if False:\n",
        pytest(f"{CHECKPOINT}::test_a_changed_byte_is_noticed"),
    ),
    guard(
        "sizes in the manifest are compared",
        "shared/checkpoint_files.py",
        "        if size != record.size:\n",
        "        if False:\n",
        pytest("tests/unit/test_checkpoint_sizes.py"),
    ),
    guard(
        "unlisted files are refused",
        "shared/checkpoint_files.py",
        "    if present != listed:\n",
        "    if not listed <= present:\n",
        pytest("tests/failpoints/test_failpoints.py::test_a_checkpoint_cut_at_any_byte_is_not_accepted"),
    ),
    guard(
        "the manifest is uploaded last",
        "shared/storage/object_store.py",
        "            manifest = verify_sizes(path)\n",
        '            manifest = verify_sizes(path)\n            self._keys.create(f"{location}/{MANIFEST}", content)\n',
        pytest("tests/shared/test_storage.py::test_the_manifest_is_uploaded_last_and_deleted_first"),
    ),
    guard(
        "a checkpoint is checked before it is resumed from",
        "worker/preparation.py",
        "            except CorruptCheckpoint as error:\n                # Anything else",
        "            except ZeroDivisionError as error:\n                # Anything else",
        pytest(f"{SUPERVISOR}::test_a_damaged_checkpoint_is_passed_over_for_the_one_before"),
    ),
    guard(
        "a checkpoint is checked before it is registered",
        "worker/recorder.py",
        "        verify(folder)\n",
        "",
        pytest(f"{SUPERVISOR}::test_a_final_checkpoint_damaged_before_it_is_registered_is_not_a_model"),
    ),
    guard(
        "checkpoints are registered by fence",
        "shared/checkpoints.py",
        "    job = jobs.owned(session, job.id, fence, attempts=0, faults=0, trained_tokens=tokens)\n",
        "",
        pytest(f"{MOVES}::test_a_checkpoint_is_registered_by_the_claim_that_runs_and_by_no_earlier_one"),
    ),
    guard(
        "the best checkpoint is kept",
        "shared/checkpoints.py",
        "if row is not best and row.location not in in_use]",
        "if row.location not in in_use]",
        pytest(f"{SUPERVISOR}::test_only_the_newest_checkpoints_and_the_best_are_kept"),
    ),
    guard(
        "a checkpoint in use is kept",
        "shared/checkpoints.py",
        "if row is not best and row.location not in in_use]",
        "if row is not best]",
        pytest(f"{MOVES}::test_a_checkpoint_that_a_live_job_starts_from_is_kept_until_that_job_has_ended"),
    ),
    guard(
        "room is looked for before a save",
        "worker/training/checkpoint.py",
        "    _demand_space(folder.parent, expected_bytes)\n    temporary",
        "    temporary",
        pytest(f"{CHECKPOINT}::test_a_disk_without_room_is_noticed_before_writing"),
    ),
    guard(
        "a step that is trained again is told once",
        "worker/recorder.py",
        "        row.values = {**row.values, **values}\n        return\n    session.add(Metric(",
        "        row.values = {**row.values, **values}\n    else:\n        session.add(Metric(",
        pytest(f"{SUPERVISOR}::test_a_poison_job_fails_after_three_attempts_with_its_last_words"),
    ),
    guard(
        "what is shown live was committed before",
        "worker/recorder.py",
        "                    written = events.written(session)\n            except UNAVAILABLE as error:\n",
        "                    written = events.written(session)\n"
        "                    session.flush()\n                    self._publisher.publish(written)\n"
        "            except UNAVAILABLE as error:\n",
        failpoints("run", "commit in worker/recorder.py", "kill before"),
    ),
    guard(
        "bytes of a refused upload are removed",
        "shared/files.py",
        "        discard_bytes(settings, object_id)\n",
        "        pass\n",
        pytest("tests/api/test_files.py::test_a_bad_file_is_refused_with_its_line_and_leaves_nothing"),
    ),
    guard(
        "bytes are not removed before the row was looked for",
        "shared/files.py",
        "    if not known:\n",
        "    if True:\n",
        failpoints("run", "commit in worker/supervisor", "confirmation lost"),
    ),
)
