"""Faults: who is hit how. Each is written down with its time, its process and the job whose run it hit."""

import json
import random
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from shared.models import BATCH_LIVE, Batch
from tests.campaign import procfs
from tests.campaign.damage import Damage, damage_newest_checkpoint
from tests.campaign.evidence import engine_of
from tests.campaign.plan import FaultPlan
from tests.campaign.postgres import Postgres
from tests.campaign.service import Member, Service
from tests.campaign.sqlite_locks import SqliteLocks


@dataclass(frozen=True)
class Fault:
    """One fault that found somebody."""

    number: int
    at: float
    """Seconds since 1970."""
    action: str
    role: str
    name: str
    pid: int
    job_id: str | None = None
    """The job whose run it hit."""
    fence: int | None = None
    hold_s: float | None = None
    restart_s: float | None = None
    is_alone: bool = False
    trainers: tuple[procfs.Process, ...] = ()
    """Trainers that must be gone soon after, because whoever started them is."""


class Injector:
    """Carries out planned faults and undoes what must be undone: a stopped process goes on after a while."""

    def __init__(self, service: Service, postgres: Postgres | None, log: Path, database_url: str) -> None:
        self._service = service
        self._postgres = postgres
        self._log = log.open("a")
        self._database_url = database_url
        self._to_continue: list[tuple[float, procfs.Process, int]] = []
        """(when, who, number of the fault that stopped it)."""
        self._deploys: dict[str, tuple[float, procfs.Process]] = {}
        self.faults: list[Fault] = []
        self.damages: list[Damage] = []
        self.missed = 0
        """Planned faults that found nobody."""
        self.stuck_deploys: list[str] = []
        self.locking: set[int] = set()
        """Numbers of the faults that stopped a process inside an SQLite transaction."""
        path = make_url(database_url).database if database_url.startswith("sqlite") else None
        self._locks = SqliteLocks(Path(path)) if path is not None else None

    def inject(self, plan: FaultPlan) -> Fault | None:
        """Do it; None if there is nobody to do it to."""
        fault = self._inject(plan)
        if fault is None:
            self.missed += 1
            return None
        self.faults.append(fault)
        shown = {
            name: value for name, value in asdict(fault).items() if name != "trainers" and value not in (None, False)
        }
        self._log.write(json.dumps(shown) + "\n")
        self._log.flush()
        return fault

    def tend(self) -> None:
        """Let stopped processes go on whose time is over; end workers that don't obey a deploy."""
        now = time.monotonic()
        if self._locks is not None and self._to_continue:
            holders = self._locks.holders()
            self.locking |= {number for _, process, number in self._to_continue if process.pid in holders}
        for at, process, _ in self._to_continue:
            if at <= now:
                procfs.send(process, signal.SIGCONT)
        self._to_continue = [entry for entry in self._to_continue if entry[0] > now]
        for name, (deadline, process) in list(self._deploys.items()):
            if not procfs.lives(process):
                del self._deploys[name]
            elif now > deadline:
                self.stuck_deploys.append(f"{name} ({process.pid}) did not end within its time after SIGTERM")
                procfs.send(process, signal.SIGKILL)
                del self._deploys[name]

    @property
    def is_calm(self) -> bool:
        """Whether nobody is stopped or on the way out, and everybody has had time to start."""
        return not self._to_continue and not self._deploys and all(m.is_ready for m in self._service.members)

    def finish(self) -> None:
        """Let everybody go on."""
        for _, process, _ in self._to_continue:
            procfs.send(process, signal.SIGCONT)
        self._to_continue.clear()

    def _inject(self, plan: FaultPlan) -> Fault | None:
        match plan.action, plan.role:
            case _, "trainer":
                return self._hit_trainer(plan)
            case _, "standby":
                return self._hit_standby(plan)
            case _, "supervisor":
                return self._hit_supervisor(plan)
            case _, "worker":
                return self._hit_worker(plan)
            case _, "runner":
                return self._hit_runner(plan)
            case "damage", _:
                return self._damage(plan)
            case "kill", "connection":
                return self._kill_connection(plan)
            case "kill", "postgres":
                return self._kill_postgres(plan)
            case _:
                return self._hit_member(plan)

    def _hit_trainer(self, plan: FaultPlan) -> Fault | None:
        trainer = _pick(procfs.trainers(self._service.settings.run_dir), plan.choice)
        if trainer is None or not self._strike(trainer.process, plan):
            return None
        return self._fault(plan, f"trainer of {trainer.job_id}", trainer.process, run=trainer)

    def _hit_standby(self, plan: FaultPlan) -> Fault | None:
        process = _pick(procfs.standbys(self._service.settings.run_dir), plan.choice)
        if process is None or not self._strike(process, plan):
            return None
        return self._fault(plan, "a trainer started ahead", process)

    def _hit_supervisor(self, plan: FaultPlan) -> Fault | None:
        mains = [member.identity for member in self._service.of("train")]
        supervisors = [child for main in mains if main is not None for child in procfs.children(main.pid)]
        if plan.is_alone:
            supervisors = [child for child in supervisors if self._run_under({child.pid}) is not None]
        supervisor = _pick(supervisors, plan.choice)
        if supervisor is None:
            return None
        run = self._run_under({supervisor.pid})
        if not self._strike(supervisor, plan):
            return None
        trainers = (run.process,) if run is not None and plan.action == "kill" else ()
        return self._fault(plan, "supervisor", supervisor, run=run, trainers=trainers)

    def _hit_worker(self, plan: FaultPlan) -> Fault | None:
        member, main = self._pick_member("train", plan.choice)
        if member is None or main is None:
            return None
        pool = procfs.children(main.pid)
        run = self._run_under({child.pid for child in pool})
        if plan.is_alone and run is None:
            return None
        if plan.action == "freeze":  # as when the whole host is suspended: nobody of it sees the time pass
            family = [main, *pool, *([run.process] if run is not None else [])]
            struck = [self._strike(process, plan) for process in family]
            if not all(struck):
                return None
        elif plan.action == "deploy":
            settings = self._service.settings
            if not procfs.send(main, signal.SIGTERM):
                return None
            limit_s = settings.deploy_stop_s + settings.trainer_stop_s + 20
            self._deploys.setdefault(member.name, (time.monotonic() + limit_s, main))
        elif not self._strike(main, plan):
            return None
        if plan.action == "kill":
            self._service.restart_s[member.name] = plan.restart_s
        trainers = (run.process,) if run is not None and plan.action == "kill" else ()
        return self._fault(plan, member.name, main, run=run, trainers=trainers)

    def _hit_runner(self, plan: FaultPlan) -> Fault | None:
        """A child of a `worker batch` that has claimed a batch; its parent starts another child."""
        held = select(Batch.id, Batch.worker).where(Batch.status.in_(BATCH_LIVE), Batch.lease_until.is_not(None))
        try:
            with Session(engine_of(self._database_url)) as session:
                holders = {int(worker.rpartition(":")[2]): name for name, worker in session.execute(held).tuples()}
        except SQLAlchemyError:
            return None
        mains = [member.identity for member in self._service.of("batch")]
        children = [child for main in mains if main is not None for child in procfs.children(main.pid)]
        runner = _pick([child for child in children if child.pid in holders], plan.choice)
        if runner is None or not self._strike(runner, plan):
            return None
        return self._fault(plan, f"runner of {holders[runner.pid]}", runner)

    def _hit_member(self, plan: FaultPlan) -> Fault | None:
        member, process = self._pick_member(plan.role, plan.choice)
        if member is None or process is None:
            return None
        if plan.action == "deploy":
            if not procfs.send(process, signal.SIGTERM):
                return None
            self._service.restart_s[member.name] = plan.restart_s
            self._deploys.setdefault(member.name, (time.monotonic() + member.stop_s + 20, process))
            return self._fault(plan, member.name, process)
        if plan.action == "wipe":
            member.wipe = self._service.settings.data / "valkey"
        if plan.action != "stop":
            self._service.restart_s[member.name] = plan.restart_s
        return self._fault(plan, member.name, process) if self._strike(process, plan) else None

    def _kill_postgres(self, plan: FaultPlan) -> Fault | None:
        assert self._postgres is not None
        member, process = self._pick_member("postgres", plan.choice)
        if member is None or process is None or not procfs.send(process, signal.SIGKILL):
            return None
        self._service.restart_s[member.name] = plan.restart_s
        return self._fault(plan, member.name, process)

    def _kill_connection(self, plan: FaultPlan) -> Fault | None:
        """kill -9 of one server process: PostgreSQL drops every connection and recovers from its log."""
        assert self._postgres is not None
        try:
            with self._postgres.connect() as connection:
                query = "select pid from pg_stat_activity where datname = %s and pid <> pg_backend_pid() order by pid"
                pids = [row[0] for row in connection.execute(query, ["anneal"])]
        except psycopg.Error:
            return None
        pid = _pick(pids, plan.choice)
        seen = procfs.look(pid) if pid is not None else None
        if seen is None or not procfs.send(seen.process, signal.SIGKILL):
            return None
        return self._fault(plan, "a server process of postgres", seen.process)

    def _damage(self, plan: FaultPlan) -> Fault | None:
        """Spoil the newest checkpoint of a run and kill its trainer, so that the next attempt meets it."""
        draw = random.Random(plan.choice)
        trainers = procfs.trainers(self._service.settings.run_dir)
        draw.shuffle(trainers)
        for trainer in trainers:
            done = damage_newest_checkpoint(self._database_url, self._service.settings, trainer, draw)
            if done is not None:
                self.damages.append(done)
                return self._fault(plan, f"{done.location}/{done.file}", trainer.process, run=trainer)
        return None

    def _strike(self, process: procfs.Process, plan: FaultPlan) -> bool:
        if plan.action in ("kill", "wipe"):
            return procfs.send(process, signal.SIGKILL)
        if not procfs.send(process, signal.SIGSTOP):
            return False
        self._to_continue.append((time.monotonic() + plan.hold_s, process, len(self.faults) + 1))
        return True

    def _pick_member(self, role: str, choice: float) -> tuple[Member | None, procfs.Process | None]:
        alive = [(member, identity) for member in self._service.of(role) if (identity := member.identity) is not None]
        return _pick(alive, choice) or (None, None)

    def _run_under(self, supervisors: set[int]) -> procfs.Trainer | None:
        for trainer in procfs.trainers(self._service.settings.run_dir):
            seen = procfs.look(trainer.process.pid)
            if seen is not None and seen.parent_pid in supervisors:
                return trainer
        return None

    def _fault(
        self,
        plan: FaultPlan,
        name: str,
        process: procfs.Process,
        *,
        run: procfs.Trainer | None = None,
        trainers: tuple[procfs.Process, ...] = (),
    ) -> Fault:
        return Fault(
            number=len(self.faults) + 1,
            at=time.time(),
            action=plan.action,
            role=plan.role,
            name=name,
            pid=process.pid,
            job_id=run.job_id if run else None,
            fence=run.fence if run else None,
            hold_s=plan.hold_s if plan.action in ("stop", "freeze") else None,
            restart_s=plan.restart_s if plan.action in ("kill", "wipe", "deploy") else None,
            is_alone=plan.is_alone,
            trainers=trainers,
        )


def _pick(candidates: list[Any], choice: float) -> Any:
    return candidates[int(choice * len(candidates))] if candidates else None
