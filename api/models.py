"""/v1/models: base models, tuned models and checkpoints. Ids hold slashes, so routes take the rest of the path."""

from fastapi import APIRouter

from api.deps import Caller
from shared import model_registry
from shared.db import reading
from shared.schemas import ModelList, ModelObject

router = APIRouter(prefix="/models", tags=["models"])


@router.get("")
def list_models(caller: Caller) -> ModelList:
    with reading() as session:
        return ModelList(
            data=[ModelObject.of(model) for model in model_registry.list_models(session, caller.project_id)]
        )


@router.get("/{model_id:path}")
def retrieve_model(model_id: str, caller: Caller) -> ModelObject:
    with reading() as session:
        return ModelObject.of(model_registry.find(session, caller.project_id, model_id))
