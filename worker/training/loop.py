"""One attempt at a run, read top to bottom: load, render, train, evaluate, publish.

Speaks through the reporter only; raises what `failures.describe` puts into words.
"""

import contextlib
import importlib.metadata
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from shared.trainer_protocol import Done, Message, Started
from shared.training_spec import Resolved, TrainerSpec
from worker.training import checkpoint, data, data_plan, memory, resolve, templates, token_cache
from worker.training.data_plan import DataPlan
from worker.training.failures import BadBaseModel, TrainingFailed, UnsupportedSetting, describe
from worker.training.ranks import Peers, Place
from worker.training.reporter import Reporter
from worker.training.standby import Warm
from worker.training.stopping import StopRequests

REASON_LIMIT_S = 10.0
"""How long a rank that lost another one waits to be ended by whoever knows why."""
REPORTED_VERSIONS = ("torch", "transformers", "trl", "unsloth", "unsloth_zoo", "accelerate", "bitsandbytes", "datasets")


class Run:
    """The state of one attempt, so that a failure can be told with what was running."""

    def __init__(
        self,
        spec: TrainerSpec,
        reporter: Reporter,
        stops: StopRequests,
        warm: Warm | None = None,
        place: Place | None = None,
    ) -> None:
        self.spec = spec
        self.reporter = reporter
        self.stops = stops
        self.warm = warm or Warm()
        self.place = place
        """Among several processes; None: alone, unless `spec` asks for more."""
        self.peers = Peers(reporter)
        self.running: Resolved | None = None
        """Set once the model is loaded: before that, no choice of the client could make it fit."""

    def attempt(self) -> int:
        """Run to the end, a stop or a failure; the protocol's last message is sent. Returns the exit status."""
        try:
            self._run()
        except Exception as error:
            import traceback

            traceback.print_exc(file=sys.stderr)
            failed = describe(error, self.spec.training, self.running)
            vague = failed.code in ("trainer_error", "device_error")
            if self.place is not None and vague and not isinstance(error, TrainingFailed):
                time.sleep(REASON_LIMIT_S)  # most likely another rank is gone; what it says about it says more
            self._end(failed)
            return 1
        return 0

    def _gather(self) -> None:
        """Have as many processes as the run asks for.

        Raises:
            UnsupportedSetting: there are others.
        """
        wanted = self.spec.training.gpus
        if self.place is None and wanted > 1:
            self.place = self.peers.start(self.spec)
            self.stops.pass_on = self.peers.pass_on
        elif self.place is not None and self.place.world != wanted:
            raise UnsupportedSetting(
                f"training.gpus is {wanted}, but {self.place.world} processes were started for it", "training.gpus"
            )
        if self.place is not None and self.place.rank == 0:
            self.place.tell_spec(self.spec)

    def _end(self, message: Message) -> None:
        """Say the last word, unless a peer's failure was it."""
        self.peers.settle()
        self.reporter.send(message)

    def _run(self) -> None:
        spec = self.spec
        self._gather()
        prepare_work_dir(spec.work_dir)
        from worker.training import engine  # isort: skip - imports unsloth, which must come first
        from worker.training import callbacks, model, parallel, sharding
        from worker.training.step import Abandoned

        # Load.
        group = parallel.join(self.place)
        hardware = self.warm.hardware(spec.memory_limit_bytes, group.world)
        # All decide by the memory of the rank that has least: on the first GPU others may live too.
        hardware = replace(hardware, memory_bytes=-group.most(-hardware.memory_bytes))
        if spec.memory_limit_bytes is not None:
            share = 1 if hardware.is_gpu else group.world
            memory.limit(spec.memory_limit_bytes // share, is_gpu=hardware.is_gpu)
        base = Path(spec.base_model_dir)
        tokenizer = model.load_tokenizer(base)
        template = templates.choose(spec.training.chat_template, tokenizer)

        # Data.
        longest = resolve.longest_conversation(spec, model.position_limit(base))
        rows, validation, plan = self._read_data(template, tokenizer, hardware, longest)
        resolved = resolve.resolve(
            spec,
            hardware,
            lengths=[len(row.ids) for row in rows],
            longest=longest,
            needs=model.needs(base),
            has_validation=spec.validation_file is not None,
            chat_template=template.name,
            begun_with=plan.sizes,
        )
        plan = plan.model_copy(update={"sizes": resolve.sizes(resolved, hardware)})
        if spec.resume_from is None:
            for warning in resolve.advice(spec, resolved, len(rows)):
                self.reporter.warn(warning)

        if resolved.sharding == "on":
            assert isinstance(group, parallel.Together)
            weights = sharding.load_model(
                base, group, precision=resolved.precision, master_weights=resolved.master_weights
            )
        else:
            weights = self.warm.load_model(
                base,
                hardware,
                max_seq_length=resolved.max_seq_length,
                master_weights=resolved.master_weights,
                gradient_checkpointing=resolved.gradient_checkpointing,
            )
        trainer = engine.build(weights, tokenizer, rows, resolved, Path(spec.work_dir), plan, group)
        first_step, tokens_before = self._where_to_resume()
        callback = callbacks.RunCallback(
            spec,
            resolved,
            template,
            validation,
            self.reporter,
            self.stops,
            first_step=first_step,
            tokens_before=tokens_before,
            group=group,
        )
        callback.attach(trainer)
        engine.add_callback(trainer, callback)
        self.running = resolved
        self.reporter.send(
            Started(
                resolved=resolved.shown(),
                total_steps=resolved.max_steps,
                first_step=first_step,
                train_examples=sum(len(row.lengths) for row in rows),
                validation_examples=len(validation),
                train_tokens=sum(len(row.ids) for row in rows),
                device=hardware.name,
                versions=versions(),
                parameters=sum(p.numel() for p in weights.parameters() if p.requires_grad),
            )
        )

        # Train.
        self.stops.stepping(first_step - 1)
        callback.meet()
        with contextlib.suppress(Abandoned):
            trainer.train(resume_from_checkpoint=spec.resume_from)
        if trainer.state.global_step < resolved.max_steps:
            self._end(self.stops.message)
            return

        # Evaluate, publish.
        self.stops.finishing()
        callback.evaluate(trainer)
        callback.publish(trainer, resumable=False)
        callback.meet()
        self._end(
            Done(
                step=resolved.max_steps,
                tokens=callback.tokens(trainer),
                elapsed_s=callback.elapsed_s(),
            )
        )

    def _read_data(
        self, template: templates.Template, tokenizer: templates.Tokenizer, hardware: resolve.Hardware, longest: int
    ) -> tuple[list[data.Example], list[data.Example], DataPlan]:
        """The training rows, packed if asked for, the validation conversations, never packed, and the rows' plan."""
        spec, training = self.spec, self.spec.training
        load, load_held_out = (token_cache.cached(spec, load) for load in (data.load_training, data.load_validation))
        examples = load(Path(spec.training_file), template, tokenizer, longest, training.train_on)
        self._tell_losses(examples, "training", longest)
        rows = examples.rows
        digest = data_plan.sha256_of(rows)
        plan = None if spec.resume_from is None else data_plan.read(Path(spec.resume_from), digest)
        if plan is None:
            row_length = resolve.packed_row_length(longest, hardware)
            packed = data.plan_rows(rows, row_length, spec.seed) if training.packing == "rows" else None
            plan = DataPlan(conversations_sha256=digest, packed=packed, epoch=0, order=[])
        if plan.packed is not None:
            rows = data.pack(rows, plan.packed)
        validation: list[data.Example] = []
        if spec.validation_file is not None:
            held_out = load_held_out(Path(spec.validation_file), template, tokenizer, longest, training.train_on)
            self._tell_losses(held_out, "validation", longest)
            validation = held_out.rows
        return rows, validation, plan

    def _tell_losses(self, examples: data.Examples, which: str, longest: int) -> None:
        # A resumed attempt has said so before, unless its sequences have become shorter since.
        if examples.cut and (self.spec.resume_from is None or self.spec.training.on_oom == "truncate"):
            self.reporter.warn(
                f"{examples.cut} {which} rows are longer than {longest} tokens and were cut"
                + (f"; {examples.dropped} of them had no answer left and were dropped" if examples.dropped else "")
                + ". Raise training.max_seq_length to keep them whole.",
                cut=examples.cut,
                dropped=examples.dropped,
                file=which,
            )

    def _where_to_resume(self) -> tuple[int, int]:
        """(first step, tokens before it)."""
        if self.spec.resume_from is None:
            return 1, 0
        manifest = checkpoint.read_manifest(Path(self.spec.resume_from))
        if not manifest.resumable:
            raise BadBaseModel(f"checkpoint {manifest.step} is a finished model and can't be resumed from")
        return manifest.step + 1, manifest.tokens


def prepare_work_dir(folder: str) -> None:
    """Make the scratch folder the current one, with the caches inside it. Before unsloth is imported."""
    work = Path(folder)
    work.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ["UNSLOTH_COMPILE_LOCATION"] = str(work / "unsloth_compiled_cache")
    os.environ["HF_DATASETS_CACHE"] = str(work / "datasets")
    os.chdir(work)


def versions() -> dict[str, str]:
    found = {}
    for name in REPORTED_VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
