"""The processes of one run on several GPUs: started by the first one, watched by it, gone with it.

    supervisor ─ stdin, signals, pipe ─▶ rank 0, the trainer that everybody else knows
                                            ├─ rank 1     same program, same process group, told by environment who
                                            └─ rank 2 …   it is; a pipe back says how it ended

Rank 0 alone speaks for the run. What ends one rank ends all: a failure that a peer names becomes the run's, a peer that
was killed takes rank 0 with it by the same signal, and the kernel kills the peers of a rank 0 that is dead. Started by
torchrun instead, each rank takes its place from torchrun's variables. Imports no torch before a store is needed.
"""

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from shared.trainer_protocol import PROTOCOL_FD, Done, Failed, Message, Stopped, parse
from shared.training_spec import TrainerSpec
from worker.training import cpus
from worker.training.environment import GPUS_IN_SIGHT, SUPERVISED_BY, count_gpus, gpus_of
from worker.training.failures import UnsupportedSetting
from worker.training.reporter import Reporter

RENDEZVOUS = "ANNEAL_RENDEZVOUS"
"""The file over which the ranks that we started ourselves find each other."""
PLACE_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", RENDEZVOUS)
THREADS = "OMP_NUM_THREADS"
MEETING_LIMIT_S = 600.0
"""How long ranks wait for each other to have imported everything."""
READ_BYTES = 2**16


@dataclass
class Place:
    """Which of `world` processes this is."""

    rank: int
    world: int
    told: Mapping[str, str] = field(repr=False)
    """The variables that said so."""

    @property
    def is_one_host(self) -> bool:
        """Whether we started all ranks ourselves."""
        return RENDEZVOUS in self.told

    @cached_property
    def store(self) -> Any:
        """Where ranks leave each other notes of bytes. Imports torch."""
        from torch import distributed

        limit = timedelta(seconds=MEETING_LIMIT_S)
        if self.is_one_host:
            store: Any = distributed.FileStore(self.told[RENDEZVOUS], self.world)
            store.set_timeout(limit)
            return store
        serves = self.rank == 0 and self.told.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
        address = self.told["MASTER_ADDR"], int(self.told["MASTER_PORT"])
        store = distributed.TCPStore(*address, self.world, serves, limit)
        return distributed.PrefixStore(f"anneal-{self.told.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def tell_spec(self, spec: TrainerSpec) -> None:
        self.store.set("spec", spec.model_dump_json())

    def told_spec(self) -> TrainerSpec:
        """Rank 0's, with a scratch folder of our own and without the leash, which is rank 0's."""
        spec = TrainerSpec.model_validate_json(self.store.get("spec"))
        return spec.model_copy(update={"work_dir": f"{spec.work_dir}/rank-{self.rank}", "leash_s": None})


def take_place() -> Place | None:
    """Who this process is, None if it was started alone.

    Takes the variables away, so that no library believes that it is to share the work too, and leaves one GPU in sight.
    Before torch is imported.
    """
    names = [name for name in os.environ if name in PLACE_VARIABLES or name.startswith("TORCHELASTIC_")]
    told = {name: os.environ.pop(name) for name in names}
    if int(told.get("WORLD_SIZE", 1)) < 2 or "RANK" not in told:
        return None
    if RENDEZVOUS not in told:  # else whoever started us has chosen
        gpus, local = gpus_in_sight(), int(told.get("LOCAL_RANK", told["RANK"]))
        if gpus and local >= len(gpus):
            raise UnsupportedSetting(f"there is no GPU for local rank {local}: {len(gpus)} in sight", "training.gpus")
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[local]
    return Place(int(told["RANK"]), int(told["WORLD_SIZE"]), told)


class PeerReporter(Reporter):
    """Says how the process ended; everything else is rank 0's to say."""

    def send(self, message: Message) -> None:
        if isinstance(message, Done | Stopped | Failed):
            with contextlib.suppress(BrokenPipeError):
                super().send(message)


def open_peer_reporter() -> PeerReporter:
    """On the pipe that rank 0 reads; torchrun's ranks have none and are heard by nobody."""
    if PROTOCOL_FD in os.environ:
        descriptor = int(os.environ[PROTOCOL_FD])
        os.set_inheritable(descriptor, False)
    else:
        descriptor = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(2, 1)
    sys.stdout = sys.stderr
    return PeerReporter(descriptor)


class Peers:
    """The other ranks, as rank 0 knows them; none where it is alone or torchrun started them."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._pipes: dict[int, int] = {}
        self._through: set[int] = set()
        """Ranks that have said their last word."""
        self._ending = threading.RLock()  # a last word that nobody reads is followed by another

    def start(self, spec: TrainerSpec) -> Place:
        """Start `training.gpus` - 1 peers, from the main thread: they die with the thread that started them.

        Returns:
            Our own place.

        Raises:
            UnsupportedSetting: there are fewer GPUs.
        """
        world = spec.training.gpus
        gpus = gpus_in_sight()
        if gpus and len(gpus) < world:
            raise UnsupportedSetting(
                f"training.gpus is {world}, and this worker sees {len(gpus)} GPU{'s' if len(gpus) > 1 else ''}; "
                f"use at most {len(gpus)}, or have the job run by a worker with more (CUDA_VISIBLE_DEVICES)",
                "training.gpus",
            )
        work = Path(spec.work_dir)
        work.mkdir(mode=0o700, parents=True, exist_ok=True)
        meeting = work / f"rendezvous-{os.getpid()}"
        meeting.unlink(missing_ok=True)  # what an earlier process of this number wrote
        os.environ.setdefault(THREADS, str(max(len(cpus.allowed()) // world, 1)))
        told = {"WORLD_SIZE": str(world), RENDEZVOUS: str(meeting)}
        for rank in range(1, world):
            self._start(rank, {**told, **({"CUDA_VISIBLE_DEVICES": gpus[rank]} if gpus else {})})
        threading.Thread(target=self._watch, name="peers", daemon=True).start()
        return Place(0, world, told)

    def pass_on(self, number: int) -> None:
        """Signal them all."""
        for process in self._processes.values():
            process.send_signal(number)

    def settle(self) -> None:
        """From here on the caller has the last word. Does not return where a peer's failure had it first."""
        self._ending.acquire()

    def close(self) -> None:
        """End them: what they had to do is done, or not wanted any more."""
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()

    def _start(self, rank: int, told: dict[str, str]) -> None:
        reader, writer = os.pipe()
        os.set_inheritable(writer, True)
        try:
            self._processes[rank] = subprocess.Popen(
                [sys.executable, "-m", "worker.training"],
                stdin=subprocess.DEVNULL,
                stdout=2,
                # The job's lock is inherited, so that it is held as long as any of us lives.
                close_fds=False,
                env={
                    **os.environ,
                    **told,
                    "RANK": str(rank),
                    PROTOCOL_FD: str(writer),
                    SUPERVISED_BY: str(os.getpid()),
                },
            )
        finally:
            os.close(writer)
        self._pipes[rank] = reader

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        rests = dict.fromkeys(self._pipes, b"")
        for rank, reader in self._pipes.items():
            selector.register(reader, selectors.EVENT_READ, rank)
        while selector.get_map():
            for key, _ in selector.select():
                rank, chunk = key.data, os.read(key.fd, READ_BYTES)
                *lines, rests[rank] = (rests[rank] + chunk).split(b"\n")
                for line in lines:
                    self._heard(rank, line)
                if not chunk:
                    selector.unregister(key.fd)
                    self._gone(rank)

    def _heard(self, rank: int, line: bytes) -> None:
        self._through.add(rank)
        try:
            message = parse(line)
        except ValueError:
            words = f"rank {rank} said what is no message, which is a fault of Anneal: {line[:200]!r}"
            message = Failed(code="trainer_error", message=words)
        if isinstance(message, Failed):
            self._ending.acquire()
            self._reporter.send(message)
            self._end(f"rank {rank} of {len(self._processes) + 1} failed: {message.message}", 1)

    def _gone(self, rank: int) -> None:
        status = self._processes[rank].wait()
        if rank in self._through:
            return
        self._ending.acquire()
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"
        self._end(f"rank {rank} of {len(self._processes) + 1} {how}", status)

    def _end(self, why: str, status: int) -> None:
        """End this process as the peer ended, whatever its main thread waits for. SIGKILL may mean lack of memory."""
        sys.stderr.write(f"{why}\n")
        sys.stderr.flush()
        self.close()
        if status == -signal.SIGKILL:
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(1)


def gpus_in_sight() -> list[str]:
    """Of what the worker was given, the GPUs that are there, by the names that CUDA_VISIBLE_DEVICES takes."""
    return gpus_of(os.environ.get(GPUS_IN_SIGHT), count_gpus())
