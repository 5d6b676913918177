"""Whole steps on a GPU, as graphs and without, compute what the CPU's do. `make test-gpu`."""

import copy
import gc
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
# Asked again: by the time that they run, other tests may have hidden the GPUs from this process.
pytestmark = pytest.mark.skipif("not torch.cuda.is_available()", reason="needs an NVIDIA GPU")

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from worker.training import gpu, passes  # noqa: E402
from worker.training.data import IGNORED, Example  # noqa: E402
from worker.training.step import Stepper  # noqa: E402

OFF = {torch.float32: 2**-7, torch.bfloat16: 2**-4}
"""Length of a gradient's error over its own, for products in this format.

A number is rounded by up to 2^-9 of itself in bf16, and by 2^-11 as a factor in TF32, some dozen times on its way
through two layers and back; errors of a whole tensor add up like a random walk. The rest is a margin.
"""
SAME_OFF = 2**-5
"""Between two ways of the same arithmetic in bf16, of which no more than the order of sums may differ."""
LENGTHS = (14, 15, 16, 17, 40, 64, 65, 300)
LONG = (300, 310, 320, 650)


@pytest.fixture
def model() -> LlamaForCausalLM:
    """Two layers with random norms; heads of 64, two for each of keys and values."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    found = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(torch.randn_like(parameter) / 20)
    return found


def conversations(lengths: Sequence[int], seed: int, beginning: int = 12) -> list[Example]:
    """All of one beginning; the first third of each is not learned."""
    generator = random.Random(seed)
    shared = [generator.randrange(400) for _ in range(beginning)]
    found = []
    for length in lengths:
        ids = shared + [generator.randrange(400) for _ in range(length - beginning)]
        found.append(Example(ids, [IGNORED] * (length // 3) + ids[length // 3 :], (length,)))
    return found


def step(stepper: Stepper, rows: list[Example]) -> tuple[float, int]:
    """(loss, right answers); the gradients are the model's."""
    sums = stepper.step(rows, passes.count_learned(rows), lambda: False)
    return float(sums.loss) / sums.learned, int(sums.correct)


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.detach().float().cpu().clone() for name, parameter in model.named_parameters()}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], off: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.any(), name
        share = float((found[name] - tensor).norm() / tensor.norm())
        assert share <= off, f"{name}: {share:.2g} off, {off:.2g} allowed"


def on_gpu(model: Any) -> Any:
    return copy.deepcopy(model).cuda()


def stepper_on_gpu(model: Any, dtype: torch.dtype = torch.bfloat16, *, recompute: bool = False) -> gpu.GraphStepper:
    """A step of eight rows is two passes."""
    return gpu.GraphStepper(model, dtype, recompute=recompute, most=4)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_has_the_cpus_loss_and_gradients(model: LlamaForCausalLM, dtype: torch.dtype, recompute: bool) -> None:
    rows = conversations(LENGTHS, seed=1)
    other = on_gpu(model)
    loss, correct = step(Stepper(model, torch.float32, recompute=False, most=4), rows)
    found, found_correct = step(stepper_on_gpu(other, dtype, recompute=recompute), rows)
    assert found == pytest.approx(loss, rel=OFF[dtype])
    assert found_correct == pytest.approx(correct, abs=0.02 * passes.count_learned(rows))
    assert_close(gradients_of(other), gradients_of(model), OFF[dtype])


def test_an_evaluation_has_the_cpus_loss(model: LlamaForCausalLM) -> None:
    rows = conversations(LENGTHS, seed=2)
    other = on_gpu(model)
    sums = Stepper(model, torch.float32, recompute=False, most=4).evaluate(rows, 400, lambda: False)
    found = stepper_on_gpu(other).evaluate(rows, 400, lambda: False)
    assert sums is not None
    assert found is not None
    assert float(found.loss) == pytest.approx(float(sums.loss), rel=2**-8)
    assert found.learned == sums.learned
    assert all(parameter.grad is None for parameter in other.parameters())


def test_graphs_do_what_single_launches_do(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager, recorded with other tokens of the same shape, another shape, replayed; the weights change meanwhile."""
    first, others, longer = (conversations(lengths, seed) for seed, lengths in enumerate((LENGTHS, LENGTHS, LONG)))
    steps = [first, others, longer, first]
    results = []
    for most_graphs in (0, gpu.MOST_GRAPHS):
        monkeypatch.setattr(gpu, "MOST_GRAPHS", most_graphs)
        if not most_graphs:
            monkeypatch.setattr(gpu.GraphStepper, "_refresh", Stepper._refresh)
        trained = on_gpu(model)
        stepper = stepper_on_gpu(trained)
        optimizer = torch.optim.SGD(trained.parameters(), lr=1.0)
        found = []
        for rows in steps:
            found.append((step(stepper, rows), gradients_of(trained)))
            optimizer.step()
            optimizer.zero_grad()  # takes the gradients away, as the Trainer does: a replay must show them again
        monkeypatch.undo()
        assert bool(stepper._graphs) == bool(stepper._copying) == bool(most_graphs)
        results.append(found)
    learned = passes.count_learned(steps[0])
    for (expected, expected_gradients), (numbers, gradients) in zip(*results, strict=True):
        assert numbers[0] == pytest.approx(expected[0], rel=2**-10)
        assert numbers[1] == pytest.approx(expected[1], abs=0.02 * learned)
        assert_close(gradients, expected_gradients, SAME_OFF)
    losses = [numbers[0] for numbers, _ in results[1]]
    assert losses[3] < losses[0] - 0.05, "the graph sees the weights of its time"


LARGE = (2048,) * 4
"""Conversations whose pass takes far more memory than the model."""


def pass_bytes(model: LlamaForCausalLM, rows: list[Example]) -> int:
    """What a step over the rows takes of the GPU's memory beside what there is."""
    stepper = stepper_on_gpu(on_gpu(model))
    step(stepper, rows[:1])  # gradients, compilers' and libraries' own
    empty_cache()
    held_bytes = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    step(stepper, rows)
    return torch.cuda.max_memory_reserved() - held_bytes


def empty_cache() -> None:
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def limit() -> Iterator[Callable[[float], None]]:
    """Lets this process take so many bytes more."""

    def limit(more_bytes: float) -> None:
        empty_cache()
        most_bytes = torch.cuda.memory_reserved() + more_bytes
        torch.cuda.set_per_process_memory_fraction(most_bytes / torch.cuda.get_device_properties(0).total_memory)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)


def run_out_and_shrink(stepper: gpu.GraphStepper, rows: list[Example]) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        step(stepper, rows)
    assert stepper.can_shrink
    stepper.shrink()
    assert not stepper.can_shrink


def test_graphs_are_given_up_where_their_memory_is_wanted(
    model: LlamaForCausalLM, limit: Callable[[float], None]
) -> None:
    """A pass of a new shape beside the graph of one as large: memory for one of them is enough."""
    large, other = conversations(LARGE, seed=5), conversations([1900] * 4, seed=6)
    reference, trained = on_gpu(model), on_gpu(model)
    plain, stepper = stepper_on_gpu(reference), stepper_on_gpu(trained)
    plain._may_record = False
    expected = [(step(plain, rows), gradients_of(reference)) for rows in (large, large, other)]
    limit(1.4 * pass_bytes(model, large))
    for rows, (numbers, gradients) in zip((large, large, other), expected, strict=True):
        if rows is other:
            run_out_and_shrink(stepper, rows)
        assert step(stepper, rows)[0] == pytest.approx(numbers[0], rel=2**-10)
        assert_close(gradients_of(trained), gradients, SAME_OFF)


def test_memory_may_run_out_while_a_graph_is_recorded(model: LlamaForCausalLM, limit: Callable[[float], None]) -> None:
    rows = conversations(LARGE, seed=5)
    trained = on_gpu(model)
    stepper = stepper_on_gpu(trained)
    expected, gradients = step(stepper, rows), gradients_of(trained)
    stream = torch.cuda.current_stream()
    limit(0.5 * pass_bytes(model, rows))
    run_out_and_shrink(stepper, rows)
    assert torch.cuda.current_stream() == stream
    torch.cuda.set_per_process_memory_fraction(1.0)
    for _ in range(2):
        assert step(stepper, rows)[0] == pytest.approx(expected[0], rel=2**-10)
        assert_close(gradients_of(trained), gradients, SAME_OFF)
    assert not stepper._graphs


def test_nothing_is_recorded_before_the_optimizer_has_its_moments(model: LlamaForCausalLM) -> None:
    rows = conversations([40] * 16, seed=7)  # four passes
    stepper = stepper_on_gpu(on_gpu(model))
    step(stepper, rows)
    assert not stepper._graphs
    step(stepper, rows)
    assert stepper._graphs


def test_gradient_checkpointing_changes_no_gradient(model: LlamaForCausalLM) -> None:
    """Nor does it in a graph."""
    rows = conversations(LENGTHS, seed=3)
    kept, recomputed = on_gpu(model), on_gpu(model)
    steppers = stepper_on_gpu(kept), stepper_on_gpu(recomputed, recompute=True)
    for _ in range(2):  # single launches, graphs
        loss, other_loss = (step(stepper, rows)[0] for stepper in steppers)
        assert other_loss == pytest.approx(loss, rel=2**-10)
        assert_close(gradients_of(recomputed), gradients_of(kept), SAME_OFF)


def test_a_warm_up_leaves_no_trace(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """Not in another model's weights, gradients and graphs; and what it took of the GPU's memory it has given back."""
    rows = conversations(LENGTHS, seed=4)
    model.save_pretrained(tmp_path)
    trained = on_gpu(model)
    stepper = stepper_on_gpu(trained)
    for _ in range(2):
        expected = step(stepper, rows)
    weights = {name: tensor.cpu() for name, tensor in trained.state_dict().items()}
    gradients = gradients_of(trained)
    gpu.warm_up(tmp_path)
    held_bytes = torch.cuda.memory_reserved()
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == held_bytes
    assert all(torch.equal(tensor.cpu(), weights[name]) for name, tensor in trained.state_dict().items())
    assert all(torch.equal(tensor, gradients[name]) for name, tensor in gradients_of(trained).items())
    assert step(stepper, rows)[0] == pytest.approx(expected[0], rel=2**-10)
