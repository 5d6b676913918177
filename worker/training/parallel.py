"""What the ranks of one run compute together: sums over all of them, and decisions that all take at once.

    whole step ─ share ─ passes ─ gradients ─┐
    whole step ─ share ─ passes ─ gradients ─┴─ one sum ─ clipping and optimizer, the same on every rank

Gradients are of the step's loss over the tokens learned by all ranks, so that their sum is what one rank alone would
have computed, but for rounding. Weights start equal and stay so, for all ranks do the same to them; nothing is sent but
gradients. Sums are taken in 32 bits or more.

The groups here are torch's backends without its default group: the Trainer and Unsloth ask for that one, and would
share the work out once more. Only a model in shards (`sharding`) has it, for FSDP can't do without.
"""

import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh

from worker.training import passes
from worker.training.data import Example
from worker.training.failures import TrainingFailed
from worker.training.ranks import Place

LIMIT = timedelta(hours=6)
"""How long ranks wait for one that neither comes nor dies: it may be writing and hashing a checkpoint of a terabyte. A
rank that dies is noticed at once, by its pipe."""
BUCKET_NUMBERS = 2**26
"""Gradients that are put together for one sum, where they are not in one piece already."""


class RanksDiffer(TrainingFailed):
    """The weights are not the same on all ranks."""


class Alone:
    """The only rank: everything is its own already."""

    rank, world = 0, 1

    def share(self, rows: Sequence[Example]) -> list[Example]:
        """What this rank computes of these rows."""
        return list(rows)

    def add_up(self, gradients: Sequence[torch.Tensor], loss: Any, correct: Any) -> tuple[Any, Any]:
        """Sum gradients over the ranks, in place, and return the sums of the other two."""
        return loss, correct

    def total(self, numbers: tuple[float, float, float] | None) -> tuple[float, float, float] | None:
        """Sums over the ranks; None if a rank has None."""
        return numbers

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return number

    def agree(self, cancelled: bool, interrupted: bool) -> tuple[bool, bool]:
        """What rank 0 says."""
        return cancelled, interrupted

    def demand_same(self, model: Any, step: int) -> None:
        """Compare the weights.

        Raises:
            RanksDiffer: they are not the same bits on all ranks.
        """


class Together(Alone):
    """One of several ranks. All of them call the same methods in the same order; each waits for the others."""

    def __init__(self, place: Place) -> None:
        self.rank, self.world = place.rank, place.world
        self._place = place
        options = distributed.ProcessGroupGloo._Options()
        options._timeout = LIMIT
        make = distributed.ProcessGroupGloo
        local = place.is_one_host
        options._devices = [make.create_device(hostname="127.0.0.1") if local else make.create_default_device()]
        store = distributed.PrefixStore("gloo", place.store)
        self._hosts = distributed.ProcessGroupGloo(store, self.rank, self.world, options)
        self._device = torch.device("cpu")
        self._gpus = self._hosts
        if torch.cuda.is_available():
            fast = distributed.ProcessGroupNCCL.Options()
            fast._timeout = LIMIT
            store = distributed.PrefixStore("nccl", place.store)
            self._device = torch.device("cuda")
            self._gpus = distributed.ProcessGroupNCCL(store, self.rank, self.world, fast)

    def mesh(self) -> DeviceMesh:
        """The ranks as FSDP takes them. Makes torch's default group, of which accelerate must not have been told."""
        kind = self._device.type
        if self._place.is_one_host:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        distributed.init_process_group(
            "nccl" if kind == "cuda" else "gloo",
            store=distributed.PrefixStore("default", self._place.store),
            rank=self.rank,
            world_size=self.world,
            timeout=LIMIT,
        )
        return DeviceMesh.from_group(distributed.group.WORLD, kind)

    def share(self, rows: Sequence[Example]) -> list[Example]:
        return passes.share(rows, self.rank, self.world)

    def add_up(self, gradients: Sequence[torch.Tensor], loss: Any, correct: Any) -> tuple[Any, Any]:
        for bucket in _buckets(gradients):
            if len(bucket) == 1 and bucket[0].dtype == torch.float32 and bucket[0].is_contiguous():
                self._sum(self._gpus, bucket[0])
                continue
            joined = torch.cat([gradient.reshape(-1).float() for gradient in bucket])
            self._sum(self._gpus, joined)
            parts = joined.split([gradient.numel() for gradient in bucket])
            torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket, strict=True)])
        numbers = [torch.as_tensor(number, device=self._device).detach().double() for number in (loss, correct)]
        sums = torch.stack(numbers)
        self._sum(self._gpus, sums)
        return sums[0].float(), sums[1].long()

    def total(self, numbers: tuple[float, float, float] | None) -> tuple[float, float, float] | None:
        sums = torch.tensor([0.0, *(numbers or (0, 0, 0))], dtype=torch.double)
        sums[0] = numbers is None
        self._sum(self._hosts, sums)
        stopped, *found = sums.tolist()
        return None if stopped else (found[0], found[1], found[2])

    def most(self, number: int) -> int:
        return int(self._largest(torch.tensor([number]))[0])

    def agree(self, cancelled: bool, interrupted: bool) -> tuple[bool, bool]:
        said = torch.tensor([cancelled, interrupted], dtype=torch.int32)
        options = distributed.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        self._hosts.broadcast([said], options).wait()
        first, second = said.tolist()
        return bool(first), bool(second)

    def demand_same(self, model: Any, step: int) -> None:
        found = checksum(model)
        extremes = self._largest(torch.tensor([found, -found]))
        most, least = int(extremes[0]), -int(extremes[1])
        if most != least:
            raise RanksDiffer(
                f"after step {step} the weights of the {self.world} processes are no longer the same, which is a fault "
                "of the hardware or of Anneal; nothing of this step is published. Checkpoints published before are "
                "kept; training.gpus 1 needs no agreement",
                "training.gpus",
            )

    def _largest(self, numbers: torch.Tensor) -> torch.Tensor:
        options = distributed.AllreduceOptions()
        options.reduceOp = distributed.ReduceOp.MAX
        self._hosts.allreduce([numbers], options).wait()
        return numbers

    def _sum(self, group: Any, tensor: torch.Tensor) -> None:
        """For the host's work it is waited here, for the GPU's on the GPU."""
        group.allreduce([tensor]).wait()


def join(place: Place | None) -> Alone:
    """The group of this process; waits until all ranks are here."""
    return Alone() if place is None else Together(place)


def checksum(model: Any) -> int:
    """Of the weights' bits, at most 62 bits long. Equal models have equal ones; others hardly ever."""
    sums = []
    for index, parameter in enumerate(model.parameters()):
        kind = torch.int32 if parameter.element_size() == 4 else torch.int16
        sums.append(parameter.detach().view(kind).sum(dtype=torch.int64) * (2 * index + 1))
    return int(torch.stack(sums).sum()) % 2**62


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    numbers = 0
    for tensor in tensors:
        if bucket and numbers + tensor.numel() > BUCKET_NUMBERS:
            yield bucket
            bucket, numbers = [], 0
        bucket.append(tensor)
        numbers += tensor.numel()
    if bucket:
        yield bucket
