"""POST /v1/chat/completions and /v1/completions: requests for generators; `api.generation` follows their answers."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from api import generation
from api.answer_schemas import ChatCompletion, Completion, also_streams
from api.deps import Caller
from shared.chat_schema import ChatRequest
from shared.completion_schema import CompletionRequest

router = APIRouter(tags=["chat"])


@router.post("/chat/completions", response_model=None, responses=also_streams(ChatCompletion, "a chunk"))
async def create_chat_completion(spec: ChatRequest, caller: Caller, request: Request) -> Response:
    """Let a model answer a conversation. `stream=true`: server-sent events, one for each piece of text, to `[DONE]`."""
    return await generation.respond(spec, caller.project_id, request)


@router.post("/completions", response_model=None, responses=also_streams(Completion, "a chunk"))
async def create_completion(spec: CompletionRequest, caller: Caller, request: Request) -> Response:
    """Let a model go on with a text. With `echo` and `logprobs` the text itself is scored."""
    return await generation.respond(spec, caller.project_id, request)
