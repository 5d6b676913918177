"""One campaign: the service, its clients and its faults, from the first start to the verdict."""

import contextlib
import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from shared.models import BATCH_LIVE, TERMINAL, Batch, BatchLine, Checkpoint, Job, JobStatus, Upload, UploadStatus
from tests.campaign import batch_plan, hours, loads, procfs, recovery
from tests.campaign import plan as plans
from tests.campaign.batch_clients import BatchClients
from tests.campaign.batch_plan import BatchPlan
from tests.campaign.batch_watch import LineWatch
from tests.campaign.chat import Chat, Chatter
from tests.campaign.clients import JobClients
from tests.campaign.evidence import Evidence, collect, compare_storage, engine_of
from tests.campaign.faults import Fault, Injector
from tests.campaign.findings import Finding, Known
from tests.campaign.notebook import Notebook, SentUpload
from tests.campaign.options import CHAT_DEADLINE_S, Options, environment_of, settings_of
from tests.campaign.parcels import ParcelClient
from tests.campaign.plan import FaultPlan, JobPlan
from tests.campaign.postgres import Postgres
from tests.campaign.service import Service
from tests.campaign.verdict import chats_wrong, judge
from tests.campaign.watch import Watch

TICK_S = 0.02
FOUND_WITHIN_S = {"trainer": 2.0, "checkpoint": 10.0, "runner": 2.0}
"""How long a fault waits for somebody it can hit."""
UNRIPE_SHARE = 0.3
"""Of the faults strike at any moment, with a trainer that takes long to start too."""
COLLECTED_WITHIN_S = 120.0
ANSWERS_AGAIN_WITHIN_S = 90.0
LEFT_WITHIN_S = 10.0
CHATTERS = 3
BATCH_CLIENTS = 3
BATCH_WORKERS = 2
"""With generators, so that one can take over what another was stopped in."""
CHAT_LIMIT_S = CHAT_DEADLINE_S + 20
"""A question may be late by as long as the API was stopped."""


class Campaign:
    """Make it, `run` it, read what it found."""

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        self.options = options
        self.folder = Path(tempfile.mkdtemp(prefix="anneal-campaign-"))
        self.folder.chmod(0o755)  # PostgreSQL may run as another user
        self.notebook = Notebook()
        self.evidence = Evidence((), ())
        self.findings: list[Finding] = []
        self.times_s: dict[str, float] = {}
        self.began = time.time()
        self._say = say
        self.plans: dict[int, JobPlan] = {}
        self.batch_plans: dict[int, BatchPlan] = {}
        self._looked_for_ripe_at = 0.0
        self.load = loads.LOADS[options.trainer](options.seed)
        self._postgres = Postgres(self.folder / "postgres") if options.database == "postgresql" else None
        environment = environment_of(options, self.folder, self.load.pace, self._postgres)
        self.settings = settings_of(environment)
        self.database_url = self.settings.resolved_database_url
        pace, toy = self.load.pace, options.trainer == "toy"
        batch_workers = BATCH_WORKERS if options.batches else 1
        roles = {"train": pace.train_workers, "batch": batch_workers, "sweep": 2, "generate": options.generators}
        self.service = Service(self.settings, environment, self.folder / "logs", roles, toy=toy)
        self.injector = Injector(self.service, self._postgres, self.folder / "faults.jsonl", self.database_url)
        self.watch = Watch(self.settings.run_dir)
        self.lines = LineWatch(lambda: engine_of(self.database_url))
        self.chatters = [Chatter(self.service.url, seed=seed) for seed in range(CHATTERS if options.generate else 0)]
        self.parcels = ParcelClient(
            self.service.url,
            self.notebook,
            options.seed,
            garbage_age_s=options.garbage_age_s,
            end_its_hour=self._end_hour_of,
        )
        self.clients = JobClients(
            self.service.url,
            self._plan,
            self.notebook,
            clients=max(2, pace.train_workers - 1),
            at_least=options.jobs,
            patience_s=pace.patience_s,
        )
        self.batch_clients = BatchClients(
            self.service.url,
            self._plan_batch,
            self.notebook,
            clients=BATCH_CLIENTS if options.batches else 0,
            at_least=options.batches,
            patience_s=pace.patience_s,
        )

    def run(self) -> None:
        """All of it; `findings` then holds what must not have been."""
        try:
            (self.folder / "journal").mkdir()
            self.load.prepare(self.folder, self._say, loadable=self.options.generate)
            self.service.start(self._postgres)
            self._mark("started")
            self.clients.start()
            self.batch_clients.start()
            for chatter in self.chatters:
                chatter.start()
            if self.options.parcels:
                self.parcels.start()
            self._strike()
            self.clients.stop()
            self.batch_clients.stop()
            self.parcels.stop()
            self.injector.finish()
            self._mark("struck")
            self._settle()
            self._mark("settled")
            self._answers_again()
            hours.end_all_hours(self.database_url)
            self._wait_for_collection()
            stubborn = self.service.stop("train", "batch", "api", "generate", "sweep")
            leftovers = self._leftovers()
            evidence = collect(self.database_url, self.settings, self.folder / "journal")
            self.evidence = dataclasses.replace(evidence, leftovers=tuple(leftovers))
            engine_of(self.database_url).dispose()
            stubborn += self.service.stop("valkey", "postgres")
            self._judge(stubborn)
            self._mark("judged")
        finally:
            self.injector.finish()
            self.service.kill()

    @property
    def chats(self) -> list[Chat]:
        """Every question that was asked live."""
        return [chat for chatter in self.chatters for chat in chatter.chats]

    def recoveries(self) -> list[recovery.Recovery]:
        injector = self.injector
        workers = self.load.pace.train_workers
        return recovery.recoveries(self.evidence.jobs, injector.faults, self.settings, injector.locking, workers)

    def clean_up(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _plan(self, index: int) -> JobPlan:
        self.plans[index] = self.load.job(index)
        return self.plans[index]

    def _plan_batch(self, index: int) -> BatchPlan:
        self.batch_plans[index] = batch_plan.batch(self.options.seed, index)
        return self.batch_plans[index]

    def _strike(self) -> None:
        """Faults until there were enough, of jobs too."""
        options = self.options
        weights = {**plans.FAULTS, **(plans.POSTGRESQL_FAULTS if self._postgres is not None else {})}
        if self.options.trainer == "unsloth":  # a toy's worker keeps no standby
            weights |= plans.STANDBY_FAULTS
        if not options.generate:
            weights = {kind: weight for kind, weight in weights.items() if kind[1] not in plans.OF_GENERATION}
        planned = plans.faults(
            options.seed,
            lease_s=options.lease_s,
            mean_wait_s=options.mean_wait_s or self.load.pace.mean_wait_s,
            weights=weights,
        )
        ends_at = time.monotonic() + options.minutes * 60
        for fault in planned:
            self._pause(fault.wait_s)
            if fault.choice > UNRIPE_SHARE and fault.role != "standby":  # they are there before anything is ripe
                self._wait(self._is_ripe, min(ends_at, time.monotonic() + self.load.pace.ripe_s))
            if fault.is_alone:
                self._wait(lambda: self.injector.is_calm, ends_at)
            struck = self._inject(fault, ends_at)
            if struck is not None:
                self.watch.expect_gone(struck)
                if struck.number % 25 == 0:
                    self._say(f"{struck.number} faults, {self._sent()} sent")
            if fault.is_alone:
                self._pause(recovery.LIMIT_LEASES * options.lease_s)
            if len(self.injector.faults) >= options.faults or time.monotonic() >= ends_at:
                return

    def _inject(self, fault: FaultPlan, ends_at: float) -> Fault | None:
        """Strike; wait a little for somebody to hit, or as long as it takes for one alone, which must hit a run."""
        within_s = FOUND_WITHIN_S.get(fault.role, 0)
        deadline = ends_at if fault.is_alone else min(ends_at, time.monotonic() + within_s)
        while True:
            struck = self.injector.inject(fault) if self.injector.is_calm or not fault.is_alone else None
            if struck is not None or time.monotonic() >= deadline:
                return struck
            self._pause(0.2)

    def _pause(self, pause_s: float) -> None:
        ends_at = time.monotonic() + pause_s
        self._wait(lambda: False, ends_at)

    def _wait(self, until: Callable[[], bool], ends_at: float) -> None:
        while not until() and time.monotonic() < ends_at:
            self._tend()

    def _is_ripe(self) -> bool:
        """Whether some run has published a checkpoint of its own. Looks twice a second."""
        if time.monotonic() - self._looked_for_ripe_at < 0.5:
            return False
        self._looked_for_ripe_at = time.monotonic()
        ripe = select(Job.id).join(Checkpoint, Checkpoint.job_id == Job.id)
        ripe = ripe.where(Job.status == JobStatus.RUNNING, Checkpoint.fence == Job.fence, Checkpoint.resumable)
        try:
            with Session(engine_of(self.database_url)) as session:
                return session.scalar(ripe.limit(1)) is not None
        except SQLAlchemyError:
            return False

    def _tend(self) -> None:
        self.service.tend()
        self.injector.tend()
        self.watch.look()
        if self.options.batches:
            self.lines.look()
        time.sleep(TICK_S)

    def _settle(self) -> None:
        """Until every job and batch has ended and every client knows, or nothing has changed for long."""
        before: tuple[object, ...] | None = None
        changed_at = looked_at = time.monotonic()
        clients = (self.clients, self.batch_clients)
        while not all(c.is_done for c in clients) or self.parcels.thread.is_alive() or self._open_work() != 0:
            self._tend()
            now = time.monotonic()
            if now - looked_at < 1:
                continue
            looked_at = now
            state = self._state()
            if state is not None and state != before:
                before, changed_at = state, now
            if now - changed_at > self.load.pace.stalled_s:
                return

    def _state(self) -> tuple[object, ...] | None:
        """What changes as long as jobs or batches go on; None while the database is away."""
        jobs = select(func.count(), func.max(Job.updated_at)).select_from(Job)
        batches = select(func.count(), func.sum(Batch.completed + Batch.failed), func.sum(Batch.fence))
        try:
            with Session(engine_of(self.database_url)) as session:
                return (*session.execute(jobs).one(), *session.execute(batches.select_from(Batch)).one())
        except SQLAlchemyError:
            return None

    def _open_work(self) -> int | None:
        jobs = select(func.count()).select_from(Job).where(Job.status.not_in(TERMINAL))
        batches = select(func.count()).select_from(Batch).where(Batch.status.in_(BATCH_LIVE))
        try:
            with Session(engine_of(self.database_url)) as session:
                return session.scalars(jobs).one() + session.scalars(batches).one()
        except SQLAlchemyError:
            return None

    def _is_collected(self) -> bool:
        if any(compare_storage(self.database_url, self.settings)) or self._pending_uploads() != 0:
            return False
        with Session(engine_of(self.database_url)) as session:
            return session.scalar(select(func.count()).select_from(BatchLine)) == 0

    def _pending_uploads(self) -> int | None:
        with Session(engine_of(self.database_url)) as session:
            pending = select(func.count()).select_from(Upload).where(Upload.status == UploadStatus.PENDING)
            return session.scalar(pending)

    def _end_hour_of(self, upload: SentUpload) -> list[str]:
        return hours.end_hour_of(self.database_url, self.settings, upload)

    def _answers_again(self) -> None:
        """Every client that asks live has an answer; none of them was left without a slot for ever."""
        began, deadline = time.time(), time.monotonic() + ANSWERS_AGAIN_WITHIN_S
        for chatter in self.chatters:
            while not any(chat.outcome == "answer" and chat.asked_at > began for chat in chatter.chats[-20:]):
                if time.monotonic() > deadline:
                    what = f"no answer within {ANSWERS_AGAIN_WITHIN_S:g} s after the last fault"
                    self.findings.append(Finding("chat_wrong", chatter.thread.name, what))
                    break
                self._tend()
        for chatter in self.chatters:
            chatter.stop()
        while any(chatter.thread.is_alive() for chatter in self.chatters):
            self._tend()

    def _wait_for_collection(self) -> None:
        """What no row names must be collected by itself; the verdict names what is left."""
        deadline = time.monotonic() + COLLECTED_WITHIN_S
        while time.monotonic() < deadline:
            with contextlib.suppress(SQLAlchemyError):
                if self._is_collected():
                    return
            for _ in range(25):
                self._tend()

    def _leftovers(self) -> list[str]:
        deadline = time.monotonic() + LEFT_WITHIN_S
        stores = {m.process.pid for m in self.service.members if m.process is not None}
        while True:
            left = [seen for seen in procfs.of_service(self.settings.data) if seen.process.pid not in stores]
            if not left or time.monotonic() > deadline:
                return [f"process {seen.process.pid} in state {seen.state}" for seen in left]
            time.sleep(0.1)

    def _judge(self, stubborn: list[str]) -> None:
        told = self.notebook
        known = Known(
            plans=self.plans,
            references=self.load.reference,
            submitted=told.submitted,
            followed=told.followed,
            damages=self.injector.damages,
            keyed=told.keyed,
            files=told.files,
            uploads=told.uploads,
            batch_plans=self.batch_plans,
            batches=told.batches,
            lines_recorded=self.lines.recorded,
            lines_changed=self.lines.changed,
            lease_s=self.options.lease_s,
        )
        found = self.findings
        done = (len(self.injector.faults), len(self.evidence.jobs), len(self.evidence.batches))
        asked = (self.options.faults, self.options.jobs, self.options.batches)
        if any(one < least for one, least in zip(done, asked, strict=True)):
            what = "{} faults, {} jobs and {} batches are too few".format(*done)
            found.append(Finding("incomplete", "campaign", what))
        found += [Finding("internal_error", "client", what) for what in told.internal_errors]
        found += [Finding("upload_wrong", "pending", what) for what in told.parts_gone]
        found += judge(self.evidence, known)
        found += [Finding("stuck", name, "it did not obey SIGTERM in time") for name in stubborn]
        found += [Finding("stuck", "deploy", what) for what in self.injector.stuck_deploys]
        found += [Finding("two_trainers", "processes", what) for what in self.watch.pairs]
        found += [Finding("orphan", "processes", what) for what in self.watch.orphans]
        found += [Finding("refused", "client", what) for what in told.refusals]
        found += chats_wrong(self.chats, CHAT_LIMIT_S)
        share = recovery.percentile(
            [one.seconds / one.limit_s for one in self.recoveries() if one.is_undisturbed], 0.99
        )
        if share >= 1:
            found.append(Finding("slow_recovery", "undisturbed", f"p99 is {share:.2f} times the limit"))

    def _sent(self) -> str:
        return f"{len(self.notebook.submitted)} jobs and {len(self.notebook.batches)} batches"

    def _mark(self, what: str) -> None:
        self.times_s[what] = round(time.time() - self.began, 1)
        self._say(f"{what} after {self.times_s[what]:.0f} s")
