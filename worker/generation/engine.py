"""One loaded model that answers many requests at once: transformers' continuous batching behind five verbs.

    load → encode → start → (on_tokens)* → finished | cancel
                                                 close

Owns a model, its key-value cache and its generation thread. Never touches the database, the broker or a file outside
the model's folder; the event loop that calls `start` gets the tokens.
"""

import json
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from safetensors import safe_open
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.generation import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.utils import logging as transformers_logging

from shared.errors import BadRequest, Unavailable
from worker import tokenizers
from worker.base_models import check_folder
from worker.generation.sampling import SeededSampling

log = logging.getLogger(__name__)

transformers_logging.disable_progress_bar()
_batching_log = logging.getLogger("ContinuousBatchingLogger")
_batching_log.handlers.clear()  # it brings one of its own, which writes no JSON
_batching_log.propagate = True
_batching_log.setLevel(logging.WARNING)

BLOCK_TOKENS = 64
"""Tokens in one block of the key-value cache: small enough to waste little, large enough to keep the tables short."""
PREFILL_TOKENS = {"cpu": 512, "cuda": 8192}
"""Most tokens of one forward pass. A long prompt is taken in such parts, so that others' tokens keep coming."""
SMALLEST_CONTEXT_TOKENS = 256
"""A model whose cache would hold less than this does not fit."""
CACHE_SHARE = 0.5
"""Most of the memory left beside the weights that one model's cache takes, so that several models fit."""
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 takes the likeliest."""

    temperature: float
    top_p: float
    seed: int


OnTokens = Callable[[list[int], bool, str | None], None]
"""(new tokens, whether the answer is complete, error): called on the event loop that started the request."""


@dataclass
class _Listener:
    on_tokens: OnTokens
    seen: int = field(default=0)

    def __call__(self, output: Any) -> None:
        tokens = output.generated_tokens[self.seen :]
        self.seen += len(tokens)
        self.on_tokens(tokens, output.is_finished(), output.error)


@dataclass(frozen=True)
class Plan:
    """What a model takes before it is loaded."""

    weights_bytes: int
    cache_tokens: int
    cache_bytes: int
    context_tokens: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.cache_bytes


def pick_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(choice: str, device: torch.device) -> torch.dtype:
    """The number format for `ANNEAL_GENERATION_DTYPE`; `auto` is bfloat16 where the hardware computes in it."""
    if choice != "auto":
        return torch.bfloat16 if choice == "bfloat16" else torch.float32
    native = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def plan(folder: Path, name: str, dtype: torch.dtype, budget_bytes: int) -> Plan:
    """Work out what a model needs from its headers alone.

    The cache holds twice the model's context if memory allows; a model with a huge context is served with a shorter
    one rather than not at all.

    Raises:
        BadRequest: the folder can't be served safely (`check_folder`).
        Unavailable: the model is too big for the budget.
    """
    check_folder(folder, name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = _weight_count(folder) * dtype.itemsize
    heads = config["num_attention_heads"]
    head_width = config.get("head_dim") or config["hidden_size"] // heads
    token_bytes = (
        2 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * head_width * dtype.itemsize
    )
    context: int = config["max_position_embeddings"]
    affordable = int((budget_bytes - weights) * CACHE_SHARE) // token_bytes
    tokens = min(2 * context, affordable) // BLOCK_TOKENS * BLOCK_TOKENS
    if tokens < min(SMALLEST_CONTEXT_TOKENS, context):
        raise Unavailable(
            f"the model {name!r} needs {weights / 2**30:.2f} GiB for its weights and at least as much again as "
            f"{SMALLEST_CONTEXT_TOKENS} tokens take, more than ANNEAL_GENERATION_MEMORY_BYTES="
            f"{budget_bytes} allows; raise it to serve this model",
            code="model_too_large",
        )
    return Plan(weights, tokens, tokens * token_bytes, min(context, tokens))


def _weight_count(folder: Path) -> int:
    count = 0
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dict
                size = 1
                for length in tensors.get_slice(name).get_shape():
                    size *= length
                count += size
    return count


class Engine:
    """A model that is loaded and decoding. Made by `load`; not usable after `close`."""

    def __init__(self, folder: Path, name: str, layout: Plan, *, dtype: torch.dtype, slots: int) -> None:
        """Load the weights and start the generation thread. Takes seconds; call it off the event loop."""
        device = pick_device()
        self.name = name
        self.memory_bytes = layout.total_bytes
        self.context_tokens = layout.context_tokens
        self.tokenizer = tokenizers.load(folder)
        model = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            # Named outright: left to choose, the manager looks for attention kernels to download.
            attn_implementation="paged|sdpa",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        ).to(device)
        self.end_ids = _end_ids(model.generation_config.eos_token_id, self.tokenizer.eos_token_id)
        self._manager = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=self.end_ids or -1),
            continuous_batching_config=ContinuousBatchingConfig(
                block_size=BLOCK_TOKENS,
                num_blocks=layout.cache_tokens // BLOCK_TOKENS,
                max_batch_tokens=PREFILL_TOKENS[device.type],
                max_requests_per_batch=slots,
                use_cuda_graph=False,
                use_async_batching=False,
            ),
        )
        self._manager.logit_processor = ContinuousBatchingLogitsProcessorList(
            LogitsProcessorList([SeededSampling(device)])
        )
        self._manager.logit_processor.tensors_required = 1
        # What a daemon thread starts is a daemon, too: a process that leaves in the middle of a load waits for nobody.
        starter = threading.Thread(target=self._manager.start, daemon=True)
        starter.start()
        starter.join()

    @property
    def is_alive(self) -> bool:
        """False once the generation thread has died; what it was answering has been told so."""
        return bool(self._manager.is_running()) and self._manager.background_thread_status.fatal_error is None

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The conversation as the model's chat template renders it, ready for the assistant's turn.

        Raises:
            BadRequest: the model has no template, or the template refuses these messages.
        """
        if not self.tokenizer.chat_template:
            raise BadRequest(f"the model {self.name!r} has no chat template; use one tuned for chat", param="model")
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise BadRequest(
                f"the chat template of {self.name!r} refuses these messages: {error}", param="messages"
            ) from error
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def room_for(self, prompt_tokens: int, max_tokens: int | None) -> int:
        """How many tokens the answer may have.

        Raises:
            BadRequest: prompt and answer don't fit the context together.
        """
        left = self.context_tokens - prompt_tokens
        if max_tokens is None and left >= 1:
            return left
        if max_tokens is None or max_tokens > left:
            asked = "" if max_tokens is None else f" and {max_tokens} tokens were asked for the answer"
            raise BadRequest(
                f"{self.name!r} has a context of {self.context_tokens} tokens; the messages take {prompt_tokens}"
                f"{asked}. Send less, or lower max_tokens",
                param="messages" if left < 1 else "max_tokens",
                code="context_length_exceeded",
            )
        return max_tokens

    def start(
        self, request_id: str, prompt_ids: list[int], max_tokens: int, sampling: Sampling, on_tokens: OnTokens
    ) -> None:
        """Let a request join the batch. Must be called on the event loop that is to get its tokens.

        Raises:
            Unavailable: the generation thread has died.
        """
        self._manager.register_result_handler(request_id, _Listener(on_tokens))
        accepted = self._manager.add_request(
            prompt_ids,
            request_id=request_id,
            max_new_tokens=max_tokens,
            streaming=True,
            temperature=float(sampling.temperature),
            top_p=float(sampling.top_p),
            seed=sampling.seed,
        )
        if accepted is None:
            self._forget(request_id)
            raise Unavailable(f"the engine of {self.name!r} has failed and is being restarted; try again")

    def cancel(self, request_id: str) -> None:
        """Free the slot of an unfinished request before its next token. `on_tokens` is not called again."""
        self._forget(request_id)
        self._manager.cancel_request(request_id)

    def close(self) -> None:
        """Stop the thread. Blocks for up to one forward pass. The memory goes with the last reference."""
        self._manager.stop(block=True, timeout=STOP_TIMEOUT_S, hard_stop=True)
        self._manager.destroy()

    def _forget(self, request_id: str) -> None:
        self._manager.output_router.result_handlers.pop(request_id, None)


def _end_ids(*sources: int | list[int] | None) -> list[int]:
    ids: set[int] = set()
    for source in sources:
        if source is not None:
            ids |= set(source) if isinstance(source, list) else {source}
    return sorted(ids)
