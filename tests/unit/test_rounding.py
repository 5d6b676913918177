"""Copies in 16 bits: what is bf16 stays, what is between two of its numbers shows in proportion."""

import pytest
import torch

from worker import rounding

NUMBERS = 3 * rounding.PERIOD + 1000


def copied(master: torch.Tensor) -> torch.Tensor:
    target = torch.empty_like(master, dtype=torch.bfloat16)
    rounding.copy(target, master)
    return target


def test_what_is_bf16_already_stays() -> None:
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.finfo(torch.bfloat16).tiny])
    whole = torch.cat((torch.randn(NUMBERS).bfloat16().float(), special))
    assert torch.equal(copied(whole).float(), whole)
    assert copied(torch.tensor([torch.nan])).isnan()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("share", [0.01, 1 / 3, 0.5, 0.9])
def test_of_equal_changes_a_proportionate_number_shows(share: float, sign: float) -> None:
    digit = 2**-7  # of numbers from 1 to 2
    found = copied(torch.full((NUMBERS,), sign * (1 + share * digit))).float()
    assert set(found.tolist()) == {sign, sign * (1 + digit)}
    assert (found != sign).float().mean().item() == pytest.approx(share, abs=0.005)


def test_the_same_masters_give_the_same_copies_wherever_they_are() -> None:
    master = torch.randn(NUMBERS)
    assert torch.equal(copied(master), copied(master.clone()))
    assert torch.equal(copied(master), copied(master.view(-1, 8)).view(-1))


def test_other_formats_are_just_copied() -> None:
    master, same, half = torch.randn(10), torch.empty(10), torch.empty(10, dtype=torch.float16)
    rounding.copy(same, master)
    rounding.copy(half, master)
    assert torch.equal(same, master)
    assert torch.equal(half, master.half())
