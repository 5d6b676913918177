"""The seeded draw is a draw from the right distribution, and depends on seed and position only."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from worker.generation.sampling import Choosing, SeededSampling

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])


def request(seed: int, position: int, temperature: float = 1.0, top_p: float = 1.0) -> Any:
    choosing = Choosing(temperature=temperature, top_p=top_p, seed=seed, prompt_tokens=position)
    options = {"choosing": choosing}
    state = SimpleNamespace(logit_processor_kwargs=options, initial_tokens=[0] * position, generated_tokens=[])
    return SimpleNamespace(state=state)


def draw(requests: list[Any]) -> list[int]:
    sampling = SeededSampling(torch.device("cpu"))
    arguments = sampling.prepare_tensor_args(requests)
    scores = sampling(LOGITS.repeat(len(requests), 1), arguments)
    return scores.argmax(dim=-1).tolist()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.8)])
def test_tokens_are_drawn_from_the_softmax(temperature: float, top_p: float) -> None:
    count = 8_000
    drawn = draw([request(1, position, temperature, top_p) for position in range(count)])
    expected = (LOGITS / temperature).softmax(dim=-1)
    if top_p < 1:  # 0.64 of the mass is on the first, 0.88 on the first two: both are needed for 0.8
        expected[2:] = 0
        expected /= expected.sum()
    frequencies = torch.bincount(torch.tensor(drawn), minlength=5) / count
    error = (expected * (1 - expected) / count).sqrt()
    assert torch.all((frequencies - expected).abs() <= 4 * error + 1e-9), (frequencies, expected)


def test_temperature_zero_takes_the_likeliest_whatever_the_seed() -> None:
    assert draw([request(seed, 5, temperature=0) for seed in range(50)]) == [0] * 50


def test_a_tiny_top_p_takes_the_likeliest() -> None:
    assert draw([request(seed, 5, top_p=1e-9) for seed in range(50)]) == [0] * 50


def test_company_and_order_change_nothing() -> None:
    mine = request(42, 7)
    alone = draw([mine])
    assert [draw([*[request(seed, 7) for seed in range(count)], mine])[-1] for count in range(20)] == alone * 20


def test_every_position_and_seed_is_drawn_anew() -> None:
    assert len(set(draw([request(3, position) for position in range(50)]))) > 1
    assert len(set(draw([request(seed, 3) for seed in range(50)]))) > 1


def test_what_was_moved_into_the_prompt_counts_as_position() -> None:
    """Continuous batching restarts a request it had to push out with its answer as part of the prompt."""
    before, after = request(9, 10), request(9, 6)
    after.state.generated_tokens = [0] * 4
    assert draw([before]) == draw([after])


def test_penalties_follow_openais_formula() -> None:
    mine = request(1, 2, temperature=0)
    mine.state.generated_tokens = [0, 0, 1]
    choosing = mine.state.logit_processor_kwargs["choosing"]
    choosing.frequency_penalty, choosing.presence_penalty, choosing.logit_bias = 0.25, 0.125, {3: 7.0}
    choosing.top_logprobs = 1
    sampling = SeededSampling(torch.device("cpu"))
    scores = sampling(LOGITS[None].clone(), sampling.prepare_tensor_args([mine]))
    assert scores[0].tolist() == [2 - 2 * 0.25 - 0.125, 1 - 0.25 - 0.125, 0, -1 + 7, -torch.inf]
    (noted,) = choosing.noted
    raw = LOGITS.log_softmax(dim=-1)
    assert (noted.token_id, noted.logprob) == (3, pytest.approx(float(raw[3])))
    assert noted.top == [(0, pytest.approx(float(raw[0])))], "of the model's own opinion"
