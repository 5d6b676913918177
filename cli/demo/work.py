"""What the demo asks of the service, all of it through the official `openai` SDK: upload, train, ask.

Owns no process and prints nothing: progress goes to the callbacks it is given.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import resources
from typing import Any

import openai
from openai.types.fine_tuning import FineTuningJob

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TRAINING = {"max_steps": 50, "batch_size": 8, "micro_batch_size": 8, "save_steps": 50, "eval_steps": 50}
"""One pass over the 400 tickets; the learning rate of 2e-4 and the rest are the service's defaults. Tickets are short,
so all 8 conversations of a step fit one forward pass, and a run of minutes needs no checkpoint on the way."""
PARALLEL = 8
TICKET_TOKENS = 30
"""The longest right answer has 19 tokens, 24 with spaces; a model that rambles is cut here. It was not exact anyway."""
PROMPT_TOKENS = 120
REQUEST_LIMIT_S = 300.0
RETRIES = 4
"""More than the SDK's two: a generator that is restarted takes some seconds on a busy machine."""
POLL_S = 1.0

PROMPTS = (
    "Write a Python function that returns the factorial of a number.",
    "What is the capital of France?",
    "Summarise this text in one sentence: Bees visit flowers to collect nectar and pollen. While they do so they carry "
    "pollen from one flower to the next, and many plants, among them most fruit trees, bear no fruit without them. In "
    "the last decades the number of bees has fallen in many countries.",
)


class JobFailed(Exception):
    """The fine-tuning job ended without a model. The message is the job's own."""


@dataclass(frozen=True)
class Ticket:
    """One held-out row: the messages to send, and the answer wanted."""

    messages: list[dict[str, str]]
    wanted: Mapping[str, Any]

    @property
    def text(self) -> str:
        return self.messages[-1]["content"]


def connect(url: str) -> openai.OpenAI:
    """A client of the service at `url`, and of nothing else: proxies and keys of the environment are left out."""
    return openai.OpenAI(
        base_url=f"{url}/v1",
        api_key="unused-on-loopback",
        timeout=REQUEST_LIMIT_S,
        max_retries=RETRIES,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    )


def split_bytes(split: str) -> bytes:
    """A file of the bundled data set: `train`, `validation` or `test`."""
    return resources.files("examples.tickets").joinpath(f"{split}.jsonl").read_bytes()


def held_out_tickets() -> list[Ticket]:
    """The test split: sentence patterns that training never saw."""
    rows = [json.loads(line)["messages"] for line in split_bytes("test").splitlines()]
    return [Ticket(messages=row[:-1], wanted=json.loads(row[-1]["content"])) for row in rows]


def submit(client: openai.OpenAI) -> FineTuningJob:
    """Upload the training and validation splits and create the job.

    Raises:
        JobFailed: the service found a file unusable.
    """
    files = {}
    for split in ("train", "validation"):
        upload = client.files.create(file=(f"{split}.jsonl", split_bytes(split)), purpose="fine-tune")
        files[split] = client.files.wait_for_processing(upload.id, poll_interval=POLL_S)
        if files[split].status != "processed":
            raise JobFailed(f"{split}.jsonl was refused: {files[split].to_dict().get('status_details')}")
    return client.fine_tuning.jobs.create(
        model=BASE_MODEL,
        training_file=files["train"].id,
        validation_file=files["validation"].id,
        suffix="tickets",
        extra_body={"training": TRAINING},
    )


def follow(
    client: openai.OpenAI,
    job_id: str,
    on_metrics: Callable[[Mapping[str, Any]], None],
    on_message: Callable[[str], None],
) -> FineTuningJob:
    """Pass on the job's events as they come, and return the job when it has succeeded.

    Raises:
        JobFailed: it failed or was cancelled.
    """
    seen: set[str] = set()
    while True:
        job = client.fine_tuning.jobs.retrieve(job_id)  # before its events: the last of them are then included
        page = client.fine_tuning.jobs.list_events(job_id, limit=100).data
        for event in sorted((e for e in page if e.id not in seen), key=page.index, reverse=True):  # oldest first
            seen.add(event.id)
            data = event.data if isinstance(event.data, dict) else {}
            if event.type != "metrics":
                on_message(event.message)
            elif "train_loss" in data:
                on_metrics({"step": data["step"], **data["anneal"]})
        if job.status == "succeeded" and job.fine_tuned_model:
            return job
        if job.status in ("failed", "cancelled"):
            reason = job.error.message if job.error else "no reason was given"
            raise JobFailed(f"job {job_id} {job.status}: {reason}")
        time.sleep(POLL_S)


def answer_all(
    client: openai.OpenAI, model: str, conversations: Sequence[list[dict[str, str]]], max_tokens: int
) -> Iterator[tuple[int, str]]:
    """Yield (index, answer) as they come in, `PARALLEL` requests at a time, the most likely token always taken."""

    def ask(messages: Any) -> str:
        completion = client.chat.completions.create(
            model=model, messages=messages, temperature=0, max_tokens=max_tokens
        )
        return completion.choices[0].message.content or ""

    pool = ThreadPoolExecutor(PARALLEL)
    try:
        asked: dict[Future[str], int] = {pool.submit(ask, messages): i for i, messages in enumerate(conversations)}
        for future in as_completed(asked):
            yield asked[future], future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # on Ctrl-C the service goes next, and takes the rest with it


def answer_prompts(client: openai.OpenAI, model: str) -> list[str]:
    """Answers to `PROMPTS`, in order: what the model could do before, and perhaps no longer can."""
    conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    answers = dict(answer_all(client, model, conversations, PROMPT_TOKENS))
    return [answers[i] for i in range(len(PROMPTS))]
