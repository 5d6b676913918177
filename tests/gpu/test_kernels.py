"""Each kernel for GPUs computes what the CPU's operation of the same name does, forward and backward.

They need an NVIDIA GPU or, for their logic alone, Triton's interpreter: TRITON_INTERPRET=1. They need no part of the
service: `make test-gpu`.
"""

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
# Asked again: by the time that they run, other tests may have hidden the GPUs from this process.
pytestmark = pytest.mark.skipif("not INTERPRETED and not torch.cuda.is_available()", reason="needs an NVIDIA GPU")

from worker import rounding  # noqa: E402
from worker.training import attention, gpu, kernels, varlen  # noqa: E402
from worker.training.operations import CpuOperations  # noqa: E402
from worker.training.step import NO_TARGET  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
FP32 = 2**-16
"""Of the largest number: sums of some hundred numbers in 32 bits, in another order."""
UNIT = {torch.float32: 2**-10, torch.bfloat16: 2**-8}
"""What a factor of a product may be off by. Tensor cores read the first ten bits of 32-bit factors (TF32)."""
LENGTHS = (1, 15, 16, 17, 64, 65, 300)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def there(*tensors: torch.Tensor | None) -> list[Any]:
    """On the GPU, as tensors of their own that take gradients."""
    return [None if one is None else one.detach().to(DEVICE, copy=True).requires_grad_() for one in tensors]


def here(*tensors: torch.Tensor | None) -> list[Any]:
    return [None if one is None else one.detach().clone().requires_grad_() for one in tensors]


def assert_close(found: torch.Tensor, expected: torch.Tensor, share: float = FP32) -> None:
    """Off by no more than this share of the largest number."""
    found = found.detach().cpu().float()
    assert found.shape == expected.shape
    assert found.isfinite().all()
    off, largest = (found - expected).abs().max().item(), expected.abs().max().item()
    assert off <= share * largest, f"off by {off / largest:.2g} of the largest, {share:.2g} allowed"


def assert_rows_close(found: torch.Tensor, expected: torch.Tensor, unit: float) -> None:
    """Every vector by itself, so that one which is wrong is not small beside others."""
    found = found.detach().cpu().float()
    assert found.shape == expected.shape
    assert found.isfinite().all()
    allowed = 8 * unit * expected.abs().amax(-1, keepdim=True) + unit * expected.abs().max()
    excess = (found - expected).abs() / (allowed + 1e-5)
    worst = [int(number) for number in torch.unravel_index(excess.argmax(), excess.shape)]
    assert excess.max() <= 1, f"{excess.max():.3g} times what is allowed at {worst}"


@pytest.mark.parametrize("has_delta", [True, False], ids=["sum and norm", "norm"])
@pytest.mark.parametrize("shape", [(1, 64), (5, 576), (300, 3, 48), (4100, 64)], ids=str)
def test_norm(shape: tuple[int, ...], has_delta: bool) -> None:
    """4,100 rows are more than one program's in the backward pass."""
    x, weight = random(*shape), 1 + random(shape[-1], seed=1) / 4
    delta = random(*shape, seed=2) if has_delta else None
    d_h, d_y = random(*shape, seed=3), random(*shape, seed=4)
    results = []
    for operations, place in ((CpuOperations(), here), (gpu.GpuOperations(8), there)):
        inputs = place(x, delta, weight)
        h, y = operations.add_norm(*inputs, 1e-5)
        wanted = [one for one in inputs if one is not None]
        gradients = torch.autograd.grad([h, y], wanted, [d_h.to(h.device), d_y.to(y.device)])
        results.append([h, y, *gradients])
    for expected, found in zip(*results, strict=True):
        assert_close(found, expected.detach())


@pytest.mark.parametrize("shape", [(1, 32), (5, 1536), (300, 172)], ids=str)
def test_swiglu(shape: tuple[int, int]) -> None:
    x, d_y = random(*shape), random(shape[0], shape[1] // 2, seed=1)
    results = []
    for operations, place in ((CpuOperations(), here), (gpu.GpuOperations(8), there)):
        (gate_up,) = place(x)
        y = operations.swiglu(gate_up)
        results.append([y, *torch.autograd.grad(y, gate_up, d_y.to(y.device))])
    for expected, found in zip(*results, strict=True):
        assert_close(found, expected.detach())


@pytest.mark.parametrize("back", [False, True], ids=["forward", "back"])
@pytest.mark.parametrize(("heads", "turning", "size"), [(8, 6, 64), (5, 4, 128), (3, 2, 24)])
def test_rotary_embedding(heads: int, turning: int, size: int, back: bool) -> None:
    """In place, and into another tensor."""
    x = random(37, heads, size)
    angles = 100 * random(37, size // 2, seed=1)
    cos, sin = angles.cos(), angles.sin()
    expected = x.clone()
    attention._turn(expected[:, :turning], cos, -sin if back else sin)
    source, cos, sin = x.to(DEVICE, copy=True), cos.to(DEVICE), sin.to(DEVICE)
    target = torch.full_like(source, 7)
    kernels.turn(source, target, cos, sin, turning, back=back)
    assert_close(target, expected)
    kernels.turn(source, source, cos, sin, turning, back=back)
    assert_close(source, expected)


# The interpreter takes the bits of 16-bit floats for integers.
@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 4, 64), (6, 2, 64), (4, 2, 128), (2, 1, 24)])
@pytest.mark.parametrize(
    ("prefix", "lengths"),
    [(0, [1]), (0, LENGTHS), (20, LENGTHS), (64, [1, 2]), (130, [3, 70]), (70, [600])],
    ids=["one token", "apart", "shared beginning", "a tile begins all", "tiles begin all", "many see the beginning"],
)
def test_attention(prefix: int, lengths: Sequence[int], heads: int, groups: int, size: int, dtype: torch.dtype) -> None:
    """Of quarter turns and of numbers with few digits, so that both formats hold scores exactly and an error is a
    share of each summand: a key too much or too little is seen among hundreds."""
    tokens = prefix + sum(lengths)
    total = tokens + 37  # padding
    generator = torch.Generator().manual_seed(tokens + size)
    qkv = torch.randint(-8, 9, (total, heads + 2 * groups, size), generator=generator) / 4
    d_out = torch.randint(-8, 9, (total, heads, size), generator=generator) / 4
    quarters = torch.randint(0, 4, (total, size // 2), generator=generator)
    cos, sin = torch.tensor([1.0, 0, -1, 0])[quarters], torch.tensor([0.0, 1, 0, -1])[quarters]

    (x,) = here(qkv[:tokens])
    layout = attention.layout(prefix, lengths)
    expected = CpuOperations().attention(x, cos[:tokens], sin[:tokens], layout, heads, groups)
    (d_x,) = torch.autograd.grad(expected, x, d_out[:tokens])

    tiles = varlen.tiles(prefix, lengths, total)
    # Rows of zeros follow, as where a graph has room for more tiles.
    queries, keys = (
        torch.nn.functional.pad(torch.from_numpy(part), (0, 0, 0, 3)).to(DEVICE) for part in (tiles.queries, tiles.keys)
    )
    (y,) = there(qkv.to(dtype))
    found = gpu.GpuOperations(8).attention(
        y, cos.to(DEVICE, dtype), sin.to(DEVICE, dtype), gpu.GpuLayout(queries, keys, prefix), heads, groups
    )
    (d_y,) = torch.autograd.grad(found, y, d_out.to(DEVICE, dtype))
    assert found.isfinite().all()
    assert d_y.isfinite().all()
    assert_rows_close(found[:tokens], expected.detach(), UNIT[dtype])
    parts = heads, groups, groups
    for one, other in zip(d_y[:tokens].split(parts, 1), d_x.split(parts, 1), strict=True):  # q, k, v
        assert_rows_close(one, other, UNIT[dtype])


@pytest.mark.parametrize("chunk_rows", [16, 64], ids=["chunks", "at once"])
def test_the_heads_loss(chunk_rows: int) -> None:
    """40 rows, of which some have no target."""
    hidden, weight = random(40, 64), random(400, 64, seed=1) / 4
    targets = torch.randint(400, (40,), generator=torch.Generator().manual_seed(2))
    targets[::2] = (hidden @ weight.t()).argmax(-1)[::2]  # right answers
    real = torch.ones(40, dtype=torch.bool)
    real[[0, 17, 18, 38, 39]] = False

    h, w = here(hidden[real], weight)
    loss, correct = CpuOperations().loss_sum(h, w, targets[real])
    d_h, d_w = torch.autograd.grad(loss, [h, w], torch.tensor(0.25))

    operations = gpu.GpuOperations(chunk_rows)
    there_targets = torch.where(real, targets, NO_TARGET).to(DEVICE, torch.int32)
    a, b = there(hidden, weight)
    found, found_correct = operations.loss_sum(a, b, there_targets)
    d_a, d_b = torch.autograd.grad(found, [a, b], torch.tensor(0.25, device=DEVICE))
    assert 10 < correct.item() < 40
    assert found_correct.item() == correct.item()
    assert_close(found, loss.detach())
    assert_close(d_a[real.to(DEVICE)], d_h)
    assert_close(d_b, d_w)
    assert not d_a[~real.to(DEVICE)].any()
    with torch.no_grad():
        assert_close(operations.loss_sum(a, b, there_targets)[0], loss.detach())


def test_rounding_by_thresholds() -> None:
    master = random(rounding.PERIOD + 1001)
    target, found = (torch.empty(len(master), dtype=torch.bfloat16) for _ in range(2))
    rounding.copy(target, master)
    found = found.to(DEVICE)
    kernels.round_by_thresholds(found, master.to(DEVICE), rounding.thresholds(torch.device(DEVICE)))
    assert torch.equal(found.cpu(), target)
    no_number = torch.full((3000,), 2**31 - 1, dtype=torch.int32).view(torch.float32).to(DEVICE)  # as GPUs make them
    kernels.round_by_thresholds(found[:3000], no_number, rounding.thresholds(torch.device(DEVICE)))
    assert found[:3000].isnan().all()
