"""/v1/models: base models, tuned models and checkpoints. Ids hold slashes, so routes take the rest of the path."""

import logging

from fastapi import APIRouter, Response

from api.deps import Caller, SettingsDep
from api.model_route import ModelRoute
from shared import checkpoints, model_registry, storage
from shared.db import reading, transaction
from shared.errors import AppError
from shared.schemas import Deleted, ModelList, ModelObject

log = logging.getLogger(__name__)
router = APIRouter(prefix="/models", tags=["models"], route_class=ModelRoute)


@router.get("", response_model=ModelList)
def list_models(caller: Caller) -> Response:
    """Every model that may be named: base models in the operator's order, then the project's own, newest first."""
    with reading() as session:
        models = model_registry.list_models(session, caller.project_id)
        # Each as text at once: as objects, thousands of them would take ten times as much memory.
        data = ",".join(ModelObject.of(model).model_dump_json() for model in models)
    return Response(f'{{"object":"list","data":[{data}]}}', media_type="application/json")


@router.get("/{model_id:path}")
def retrieve_model(model_id: str, caller: Caller) -> ModelObject:
    """One model, by its id or, a base model, by its alias."""
    with reading() as session:
        return ModelObject.of(model_registry.find(session, caller.project_id, model_id))


@router.delete("/{model_id:path}")
def delete_model(model_id: str, caller: Caller, settings: SettingsDep) -> Deleted:
    """Delete a tuned model with its final checkpoint, or one checkpoint; the weights too once no name has them."""
    with transaction() as session:
        folders = checkpoints.delete_model(session, caller.project_id, model_id)
    for folder in folders:
        try:
            storage.delete_tree(settings, folder)
        except (AppError, OSError) as error:
            log.warning("the weights in %s are left to the sweep: %s", folder, error)  # no row names them any more
    return Deleted(id=model_id, object="model")
