"""What the service says about itself: /openapi.json, and /docs, which shows it without the Internet.

Owns the document beyond what the routes declare: security, errors, examples. The routes own the rest.
"""

from pathlib import Path

import fastapi_offline
from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from starlette.types import Lifespan

ASSETS = Path(fastapi_offline.__file__).parent / "static"
"""Swagger UI's files, kept as a package."""
ASSETS_URL = "/docs/assets"


def application(lifespan: Lifespan[FastAPI]) -> FastAPI:
    """An application without routes yet, but with its documentation."""
    app = FastAPI(
        title="Anneal",
        version="0.1.0",
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=_operation_id,
    )
    app.mount(ASSETS_URL, StaticFiles(directory=ASSETS))
    app.add_api_route("/docs", _docs, include_in_schema=False)
    app.add_api_route("/", _start, include_in_schema=False)
    return app


def _operation_id(route: APIRoute) -> str:
    return route.name


def _docs() -> HTMLResponse:
    return get_swagger_ui_html(
        openapi_url="/openapi.json",
        title="Anneal",
        swagger_js_url=f"{ASSETS_URL}/swagger-ui-bundle.js",
        swagger_css_url=f"{ASSETS_URL}/swagger-ui.css",
        swagger_favicon_url=f"{ASSETS_URL}/favicon.png",
    )


def _start() -> RedirectResponse:
    return RedirectResponse("/docs")
