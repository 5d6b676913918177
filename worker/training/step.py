"""One optimizer step's loss and gradients, pass by pass, for plain decoders. What a pass computes is `decoder`'s."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from worker.training import attention, passes
from worker.training.data import Example
from worker.training.decoder import Decoder, Weights
from worker.training.operations import CpuOperations
from worker.training.passes import Pass

NO_TARGET = -1
"""In the place of a target where there is none: padding."""


class Abandoned(Exception):
    """A stop was asked for in the middle of a step, which leaves nothing behind."""


@dataclass(frozen=True, slots=True)
class Sums:
    """Over what was trained on or evaluated, on the device: reading one waits for it."""

    loss: Any
    """Cross-entropies in nats."""
    correct: Any
    """Targets that were the likeliest token."""
    learned: int
    """Targets."""


Arguments = tuple[Any, ...]
"""Of `Decoder.loss`."""


def arguments_of(one: Pass) -> Arguments:
    """On the CPU."""
    numbers = (one.ids, one.positions, one.learned, one.targets)
    ids, positions, learned, targets = (torch.from_numpy(part).long() for part in numbers)
    return ids, positions, attention.layout(one.prefix, one.lengths), learned, targets


class Stepper:
    """Runs passes on the engine's model.

    Args:
        model: the engine's; its parameters get the gradients.
        dtype: of the products.
        recompute: gradient checkpointing.
        most: conversations (rows, if packed) per pass.
        most_tokens: tokens per pass, of more than one row.
    """

    def __init__(
        self, model: Any, dtype: torch.dtype, *, recompute: bool, most: int, most_tokens: int | None = None
    ) -> None:
        self.weights = Weights(model, dtype, lean=recompute)
        self._decoder = Decoder(self.weights, self._operations(recompute=recompute), recompute=recompute)
        self._most, self._most_tokens = most, most_tokens
        self._device = self.weights.embedding.device

    @property
    def can_shrink(self) -> bool:
        """Whether memory is held that only makes steps faster, so that one that found too little can be done again."""
        return False

    def shrink(self) -> None:
        """Give that memory back, for good."""

    @property
    def gradients(self) -> Sequence[torch.Tensor]:
        """What `step` leaves to be summed over the ranks."""
        return self.weights.gradients

    def step(self, rows: Sequence[Example], learned: int, should_stop: Callable[[], bool]) -> Sums:
        """The loss of these rows, and its gradient over `learned` as the parameters' `.grad`.

        Raises:
            Abandoned: `should_stop()` became true between two passes.
        """
        self._refresh()
        loss, correct, first = self._zero(), self._zero(torch.long), True
        for one in passes.plan(rows, self._most, self._most_tokens):
            if not first and should_stop():
                raise Abandoned
            found = self._pass(one, 1 / learned, first=first)
            loss, correct, first = loss + found[0], correct + found[1], False
        if first:  # none of the step's conversations is ours
            self.weights.clear_gradients()
        self.weights.show_gradients()
        return Sums(loss, correct, learned)

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not analysed
    def evaluate(self, rows: Sequence[Example], most_tokens: int, should_stop: Callable[[], bool]) -> Sums | None:
        """Loss and right answers over the rows; None if `should_stop()` became true meanwhile."""
        self._refresh()
        loss, correct, learned = self._zero(), self._zero(torch.long), 0
        for one in passes.plan(rows, len(rows), most_tokens):
            if should_stop():
                return None
            found = self._decoder.loss(*self._inputs(one))
            loss, correct, learned = loss + found[0], correct + found[1], learned + len(one.targets)
        return Sums(loss, correct, learned)

    def _refresh(self) -> None:
        self.weights.refresh()

    def _operations(self, *, recompute: bool) -> Any:
        return CpuOperations()

    def _pass(self, one: Pass, scale: float, *, first: bool) -> tuple[Any, Any]:
        loss, correct = self._decoder.loss(*self._inputs(one))
        self.weights.backward(loss * scale, first=first)
        return loss.detach(), correct

    def _inputs(self, one: Pass) -> Arguments:
        return arguments_of(one)

    def _zero(self, dtype: torch.dtype = torch.float32) -> Any:
        return torch.zeros((), dtype=dtype, device=self._device)
