"""A request's own way to choose tokens inside transformers' continuous batching, and what is noted about them.

The manager has one random state for everybody, so what a request gets would depend on who shares its batch. Instead
the manager decodes greedily, and this processor adds Gumbel noise to each sampling request's scores first: the
largest of `logits / temperature + noise` is an exact draw from the softmax (Gumbel, 1954; Maddison et al., 2014).
The noise depends on the request's seed and the position alone, so the same seed gives the same text in any company.
"""

import hashlib
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

GREEDY_BELOW = 1e-4
"""Temperatures under this choose the likeliest token anyway, and dividing by them overflows."""


@dataclass(frozen=True)
class TokenScores:
    """What the model thought of one place, before anything was done to its logits."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]
    """(token id, log-probability), likeliest first."""


@dataclass
class Choosing:
    """How one request's tokens are chosen. `temperature` 0 takes the likeliest."""

    temperature: float
    top_p: float
    seed: int
    prompt_tokens: int
    frequency_penalty: float = 0
    presence_penalty: float = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None
    """How many of the likeliest are noted beside each token; None: nothing is."""
    noted: "deque[TokenScores]" = field(default_factory=deque)
    """One entry a token, in order; whoever takes the tokens takes these, too."""

    @property
    def changes_scores(self) -> bool:
        return bool(self.frequency_penalty or self.presence_penalty or self.logit_bias)


@dataclass(frozen=True)
class _Row:
    choosing: Choosing
    tokens: list[int]
    """The prompt, and the answer so far."""


class SeededSampling(ContinuousBatchingLogitsProcessor):  # type: ignore[misc] # transformers is untyped
    """Scores [requests, vocabulary] → scores whose largest entry is the token to take.

    Needs synchronous batching without CUDA graphs: what `prepare_tensor_args` notes is used by the next call.
    """

    supported_kwargs: ClassVar[dict[str, type]] = {"choosing": Choosing}
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, device: torch.device) -> None:
        self._generator = torch.Generator(device=device)
        self._rows: list[_Row] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        self._rows = [
            # Counted from the first token of the prompt: a request that was moved out of the cache starts over with its
            # answer as part of the prompt, and must go on with the same noise and the same penalties.
            _Row(
                request.state.logit_processor_kwargs["choosing"],
                [*request.state.initial_tokens, *request.state.generated_tokens],
            )
            for request in requests_with_new_token
        ]
        return torch.zeros(len(self._rows), dtype=torch.int32)  # the argument slot; the rows don't fit into it

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        for index, row in enumerate(self._rows):
            choosing = row.choosing
            raw = scores[index]
            changed = _with_penalties(raw, row) if choosing.changes_scores else raw
            if choosing.temperature >= GREEDY_BELOW:
                changed = self._perturbed(changed, row)
            if choosing.top_logprobs is not None:
                choosing.noted.append(_scores_of(raw, int(changed.argmax()), choosing.top_logprobs))
            if changed is not raw:
                scores[index] = changed
        return scores

    def _perturbed(self, logits: torch.Tensor, row: _Row) -> torch.Tensor:
        logits = logits / row.choosing.temperature
        if row.choosing.top_p < 1:
            ordered, order = logits.sort(descending=True)
            probabilities = ordered.softmax(dim=-1)
            # The smallest set of likeliest tokens that reaches top_p: a token stays if those before it fall short.
            dropped = order[probabilities.cumsum(dim=-1) - probabilities >= row.choosing.top_p]
            logits[dropped] = -torch.inf
        self._generator.manual_seed(_mix(row.choosing.seed, len(row.tokens)))
        noise = torch.empty_like(logits).exponential_(generator=self._generator).log_().neg_()
        return logits + noise


def _with_penalties(logits: torch.Tensor, row: _Row) -> torch.Tensor:
    """OpenAI's formula: a token that the answer has `count` times loses `count · frequency + presence`."""
    choosing, logits = row.choosing, logits.clone()
    counts = Counter(row.tokens[choosing.prompt_tokens :])
    if counts:
        ids = torch.tensor(list(counts), device=logits.device)
        losses = [count * choosing.frequency_penalty + choosing.presence_penalty for count in counts.values()]
        logits[ids] -= torch.tensor(losses, device=logits.device, dtype=logits.dtype)
    if choosing.logit_bias:
        ids = torch.tensor(list(choosing.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(choosing.logit_bias.values()), device=logits.device, dtype=logits.dtype)
    return logits


def _scores_of(logits: torch.Tensor, token_id: int, count: int) -> TokenScores:
    logprobs = logits.float().log_softmax(dim=-1)
    values, ids = logprobs.topk(count)
    return TokenScores(token_id, float(logprobs[token_id]), list(zip(ids.tolist(), values.tolist(), strict=True)))


def _mix(seed: int, position: int) -> int:
    """One 63-bit seed a token; neighbouring seeds and positions share nothing."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
