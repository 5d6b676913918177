"""A request's own temperature, top_p and seed inside transformers' continuous batching.

The manager has one random state for everybody, so what a request gets would depend on who shares its batch. Instead
the manager decodes greedily, and this processor adds Gumbel noise to each sampling request's scores first: the
largest of `logits / temperature + noise` is an exact draw from the softmax (Gumbel, 1954; Maddison et al., 2014).
The noise depends on the request's seed and the position alone, so the same seed gives the same text in any company.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

GREEDY_BELOW = 1e-4
"""Temperatures under this choose the likeliest token anyway, and dividing by them overflows."""


@dataclass(frozen=True)
class Row:
    """How the next token of one request is chosen."""

    temperature: float
    top_p: float
    seed: int
    position: int


class SeededSampling(ContinuousBatchingLogitsProcessor):  # type: ignore[misc] # transformers is untyped
    """Scores [requests, vocabulary] → scores whose largest entry is the token to take.

    Needs synchronous batching without CUDA graphs: what `prepare_tensor_args` notes is used by the next call.
    """

    supported_kwargs: ClassVar[dict[str, type]] = {"temperature": float, "top_p": float, "seed": int}
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, device: torch.device) -> None:
        self._generator = torch.Generator(device=device)
        self._rows: list[Row] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        self._rows = [
            Row(
                **request.state.logit_processor_kwargs,
                # Counted from the first token of the prompt: a request that was moved out of the cache starts over
                # with its answer as part of the prompt, and must go on with the same noise.
                position=len(request.state.initial_tokens) + len(request.state.generated_tokens),
            )
            for request in requests_with_new_token
        ]
        return torch.zeros(len(self._rows), dtype=torch.int32)  # the argument slot; the rows don't fit into it

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        for index, row in enumerate(self._rows):
            if row.temperature >= GREEDY_BELOW:
                scores[index] = self._perturbed(scores[index], row)
        return scores

    def _perturbed(self, logits: torch.Tensor, row: Row) -> torch.Tensor:
        logits = logits / row.temperature
        if row.top_p < 1:
            ordered, order = logits.sort(descending=True)
            probabilities = ordered.softmax(dim=-1)
            # The smallest set of likeliest tokens that reaches top_p: a token stays if those before it fall short.
            dropped = order[probabilities.cumsum(dim=-1) - probabilities >= row.top_p]
            logits[dropped] = -torch.inf
        self._generator.manual_seed(_mix(row.seed, row.position))
        noise = torch.empty_like(logits).exponential_(generator=self._generator).log_().neg_()
        return logits + noise


def _mix(seed: int, position: int) -> int:
    """One 63-bit seed a token; neighbouring seeds and positions share nothing."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
