"""The engine that runs everywhere: transformers' continuous batching.

    answer: encoded ─▶ one decoding for each of n choices ─▶ tokens* ─▶ text, log-probabilities, calls of tools

Owns a model, its key-value cache and its generation thread. Never touches the database, the broker or a file outside
the model's folder.
"""

import asyncio
import json
import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.generation import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.utils import logging as transformers_logging

from shared.checkpoint_files import MANIFEST
from shared.errors import BadRequest, Unavailable
from shared.generation import Choice, GenerationRequest
from shared.settings import Settings
from worker import rounding, tokenizers
from worker.generation.engine import Send, Usage, knows_no_tools, refuse_unsupported, room_for, unsupported
from worker.generation.planning import BLOCK_TOKENS, CachePlan, plan
from worker.generation.sampling import Choosing, SeededSampling
from worker.generation.text import AnswerText
from worker.generation.token_scores import TokenEntries
from worker.generation.tool_calls import ToolCallText, for_template
from worker.weight_files import stored_tensors

log = logging.getLogger(__name__)

transformers_logging.disable_progress_bar()
_batching_log = logging.getLogger("ContinuousBatchingLogger")
_batching_log.handlers.clear()  # it brings one of its own, which writes no JSON
_batching_log.propagate = True
_batching_log.setLevel(logging.WARNING)

PREFILL_TOKENS = {"cpu": 512, "cuda": 8192}
"""Most tokens of one forward pass. A long prompt is taken in such parts, so that others' tokens keep coming."""
STOP_TIMEOUT_S = 30.0
NAME = "transformers"
SUPPORTED = frozenset(
    (
        *("messages", "prompt", "max_tokens", "temperature", "top_p", "n", "seed", "stop", "logprobs", "top_logprobs"),
        *("frequency_penalty", "presence_penalty", "logit_bias", "echo"),
        *("tools", "tool_choice", "parallel_tool_calls"),
    )
)


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


def pick_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(choice: str, device: torch.device) -> torch.dtype:
    """The number format for `ANNEAL_GENERATION_DTYPE`; `auto` is bfloat16 where the hardware computes in it."""
    if choice != "auto":
        return torch.bfloat16 if choice == "bfloat16" else torch.float32
    native = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


class TransformersBackend:
    """Loads models into this process."""

    name = NAME

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._dtype = pick_dtype(settings.generation_dtype, pick_device())

    def plan(self, folder: Path, name: str) -> CachePlan:
        return plan(folder, name, self._dtype.itemsize, self._settings.generation_memory_bytes)

    def load(self, folder: Path, name: str, plan: CachePlan) -> "TransformersEngine":
        return TransformersEngine(folder, name, plan, dtype=self._dtype, slots=self._settings.generation_sequences)

    def swap(self, engine: Any, folder: Path, name: str) -> bool:
        return False  # a load takes about as long: there is no process to start


class TransformersEngine:
    """A model that is loaded and decoding; not usable after `close`."""

    def __init__(self, folder: Path, name: str, layout: CachePlan, *, dtype: torch.dtype, slots: int) -> None:
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
        )
        if (folder / MANIFEST).exists():
            _round_as_trained(model, folder)
        model.to(device)
        self.vocabulary = model.get_input_embeddings().num_embeddings
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

    async def answer(self, request: GenerationRequest, attempt: int, send: Send) -> Usage:
        refuse_unsupported(request, NAME, SUPPORTED)
        body = request.body
        if request.endpoint == "completion" and body.get("echo") and body.get("logprobs") is not None:
            raise unsupported("logprobs", f"{body['logprobs']} with echo", NAME)
        if body.get("tools") and self.tokenizer.chat_template and "tools" not in self.tokenizer.chat_template:
            raise knows_no_tools(self.name)  # first: no other engine would help
        if body.get("tool_choice") not in (None, "none", "auto"):
            raise unsupported("tool_choice", json.dumps(body["tool_choice"]), NAME)
        prompt_ids = await asyncio.to_thread(self.encode, request)
        max_tokens = room_for(request, len(prompt_ids), self.context_tokens)
        echo = self._echoed(request, prompt_ids)
        if max_tokens == 0:
            send([Choice(index=index, text=echo, finish_reason="length") for index in range(body["n"])])
            return Usage(len(prompt_ids), 0)
        if echo:
            send([Choice(index=index, text=echo) for index in range(body["n"])])
        seed = body["seed"] if body.get("seed") is not None else secrets.randbits(62)
        decodings = [
            # Not the client's id: a request that comes back after a redelivery must not meet its own remains.
            _Decoding(self, f"{request.id}/{attempt}/{index}", request, index, seed, send)
            for index in range(body["n"])
        ]
        tasks = [asyncio.ensure_future(decoding.run(prompt_ids, max_tokens)) for decoding in decodings]
        try:
            counts = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return Usage(len(prompt_ids), sum(counts))

    def encode(self, request: GenerationRequest) -> list[int]:
        """The prompt's token ids: a conversation as the model's chat template renders it, ready for the assistant's
        turn, or text as the tokenizer reads it, or ids as they are.

        Raises:
            BadRequest: the model has no template, or the template refuses these messages or knows no tools; an id is
                none of the model's; there is nothing to go on from.
        """
        if request.endpoint == "chat":
            return self._encode_chat(request.body)
        prompt = request.body["prompt"]
        ids: list[int] = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        if not ids:
            raise BadRequest("the prompt is empty, and this model adds nothing to it; send some text", param="prompt")
        if max(ids) >= self.vocabulary:
            raise BadRequest(
                f"{max(ids)} is no token of {self.name!r}, which has {self.vocabulary}; ids are its own tokenizer's",
                param="prompt",
            )
        return ids

    def _encode_chat(self, body: dict[str, Any]) -> list[int]:
        template, tools = self.tokenizer.chat_template, body.get("tools")
        if not template:
            raise BadRequest(
                f"the model {self.name!r} has no chat template; use one tuned for chat, or /v1/completions",
                param="model",
            )
        messages = for_template(body["messages"])
        try:
            text = self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise BadRequest(
                f"the chat template of {self.name!r} refuses these messages: {error}", param="messages"
            ) from error
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _echoed(self, request: GenerationRequest, prompt_ids: list[int]) -> str:
        if not request.body.get("echo"):
            return ""
        prompt = request.body["prompt"]
        return prompt if isinstance(prompt, str) else str(self.tokenizer.decode(prompt_ids))

    def start(
        self, request_id: str, prompt_ids: list[int], max_tokens: int, choosing: Choosing, on_tokens: OnTokens
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
            choosing=choosing,
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


class _Decoding:
    """One choice of one request inside the engine."""

    def __init__(
        self, engine: TransformersEngine, id: str, request: GenerationRequest, index: int, seed: int, send: Send
    ) -> None:
        body = request.body
        self._engine = engine
        self._id = id
        self._body = body
        self._index = index
        self._seed = seed + index * 0x9E3779B97F4A7C15  # the first choice is what n=1 would be; an odd constant
        self._send = send
        self._done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._text = AnswerText(engine.tokenizer, body.get("stop", ()))
        calls = ToolCallText(1 if body.get("parallel_tool_calls") is False else None)
        self._calls = calls if body.get("tools") and body.get("tool_choice") != "none" else None
        self._noted: deque[Any] = deque()
        self._entries = TokenEntries(engine.tokenizer, self._text) if self._top_logprobs is not None else None

    @property
    def _top_logprobs(self) -> int | None:
        logprobs = self._body.get("logprobs")
        if logprobs is None or logprobs is False:
            return None
        return self._body.get("top_logprobs", 0) if logprobs is True else int(logprobs)

    async def run(self, prompt_ids: list[int], max_tokens: int) -> int:
        """Decode to the end. Returns how many tokens that took.

        Raises:
            Unavailable: the engine has failed.
        """
        body = self._body
        choosing = Choosing(
            temperature=float(body["temperature"]),
            top_p=float(body["top_p"]),
            seed=self._seed,
            prompt_tokens=len(prompt_ids),
            frequency_penalty=body.get("frequency_penalty", 0),
            presence_penalty=body.get("presence_penalty", 0),
            logit_bias=self._bias(),
            top_logprobs=self._top_logprobs,
            noted=self._noted,
        )
        self._engine.start(self._id, prompt_ids, max_tokens, choosing, self._on_tokens)
        is_complete = False
        try:
            count = await self._done
            is_complete = not self._text.stopped
            return count
        finally:
            if not is_complete:
                self._engine.cancel(self._id)

    def _bias(self) -> dict[int, float]:
        bias = {int(key): value for key, value in self._body.get("logit_bias", {}).items()}
        for token_id in bias:
            if token_id >= self._engine.vocabulary:
                raise BadRequest(
                    f"{token_id} is no token of {self._engine.name!r}, which has {self._engine.vocabulary}",
                    param="logit_bias",
                )
        return bias

    def _on_tokens(self, tokens: list[int], is_complete: bool, error: str | None) -> None:
        if self._done.done():
            return
        try:
            if error is not None:
                raise Unavailable(f"the engine failed: {error}; try again", code="engine_failed")
            self._take(tokens, is_complete)
        except Exception as failure:
            self._done.set_exception(failure)

    def _take(self, tokens: list[int], is_complete: bool) -> None:
        piece = ""
        for token in tokens:
            if self._entries is not None and token not in self._engine.end_ids:
                self._entries.push(self._noted.popleft())
            piece += self._text.push(token)
            if self._text.stopped:
                break
        is_over = is_complete or self._text.stopped
        if is_complete:
            piece += self._text.finish()
        logprobs = None if self._entries is None else self._entries.take(everything=is_complete) or None
        calls: list[dict[str, Any]] = []
        if self._calls is not None:
            piece, calls = self._calls.push(piece)
            if is_over:
                rest, last = self._calls.finish()
                piece, calls = piece + rest, calls + last
        reason: Any = None
        if is_over:
            has_ended = self._text.stopped or (bool(tokens) and tokens[-1] in self._engine.end_ids)
            reason = "stop" if has_ended else "length"
            if has_ended and self._calls is not None and self._calls.count:
                reason = "tool_calls"
        if piece or calls or logprobs or reason:
            choice = Choice(
                index=self._index, text=piece, tool_calls=calls or None, logprobs=logprobs, finish_reason=reason
            )
            self._send([choice])
        if is_over:
            self._done.set_result(self._text.token_count)


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not analysed
def _round_as_trained(model: Any, folder: Path) -> None:
    """Bring a checkpoint's 32-bit masters to bf16 as the passes that trained them saw them.

    Rounded to nearest, as they are when loaded, what a run at a low rate has learnt is lost in part
    (docs/experiments.md).
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, content in stored_tensors(folder):
        target = parameters.get(name)
        if target is not None and target.dtype == torch.bfloat16 and content.get_dtype() == "F32":
            rounding.copy(target, content[...])


def _end_ids(*sources: int | list[int] | None) -> list[int]:
    ids: set[int] = set()
    for source in sources:
        if source is not None:
            ids |= set(source) if isinstance(source, list) else {source}
    return sorted(ids)
