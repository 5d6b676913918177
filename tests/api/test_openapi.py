"""/openapi.json says what the service does, exactly; /docs shows it without the Internet."""

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.openapi.models import OpenAPI
from fastapi.testclient import TestClient
from jsonschema import Draft202012Validator

from shared.settings import Settings
from shared.training_spec import TrainingSpec
from tests.api.openapi import Document
from tests.conftest import chat_row, jsonl
from tests.worker.conftest import base_folder, submit  # noqa: F401 - fixtures
from tests.worker.steps import BASE, run_next

JOBS = "/v1/fine_tuning/jobs"
CHECKED_ELSEWHERE = {"create_chat_completion", "create_completion"}
"""Needs a generator: tests/generation."""


@pytest.fixture
def document(client: TestClient) -> Document:
    return Document(client.get("/openapi.json").json())


@pytest.fixture
def database_url(sqlite_template: Any, tmp_path: Any) -> str:
    """What is described does not depend on the database."""
    path = tmp_path / "anneal.db"
    path.write_bytes(sqlite_template.read_bytes())
    return f"sqlite:///{path}"


def test_the_document_is_openapi_and_its_schemas_are_json_schema(document: Document) -> None:
    OpenAPI.model_validate(document.raw)
    assert document.raw["openapi"].startswith("3.1") and document.raw["info"]["title"] == "Anneal"
    for schema in document.raw["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    references = set(re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(document.raw)))
    for reference in references:
        node: Any = document.raw
        for part in reference.split("/"):
            node = node[part]
    assert "HTTPValidationError" not in json.dumps(document.raw)


def test_every_operation_is_described(document: Document) -> None:
    tags = {tag["name"] for tag in document.raw["tags"] if tag["description"]}
    names = [operation["operationId"] for _, _, operation in document.operations()]
    assert len(set(names)) == len(names) >= 20
    for method, path, operation in document.operations():
        where = f"{method} {path}"
        assert re.fullmatch("[a-z]+(_[a-z]+)*", operation["operationId"]), where
        assert operation.get("description") and operation["summary"], where
        assert len(operation["tags"]) == 1 and operation["tags"][0] in tags, where
        answers = operation["responses"]
        assert all(content.get("schema") for content in answers["200"]["content"].values()), where
        if path.startswith("/v1/"):
            assert operation["security"] == [{"bearer": []}], where
            assert {"401", "403", "500", "503"} <= set(answers) and "422" not in answers, where
            assert "404" in answers or "{" not in path, where
        else:
            assert "security" not in operation, where


def test_every_example_is_valid(document: Document) -> None:
    for method, path, operation in document.operations():
        contents = [("200" if status == "200" else status, answer) for status, answer in operation["responses"].items()]
        if "requestBody" in operation:
            contents.append(("request", operation["requestBody"]))
        for what, holder in contents:
            for content_type, content in holder["content"].items():
                where = f"{what} of {method} {path} as {content_type}"
                if content_type in ("text/event-stream", "application/octet-stream"):
                    continue
                assert "example" in content or what == "503", f"{where} has no example"
                if "example" in content:
                    assert document.problems(content["schema"], content["example"]) == [], where


def test_an_answer_that_is_not_as_described_is_noticed(client: TestClient, document: Document) -> None:
    content = document.raw["paths"]["/v1/files/{file_id}"]["get"]["responses"]["200"]["content"]["application/json"]
    schema, example = content["schema"], content["example"]
    assert document.problems(schema, example) == []
    assert document.problems(schema, {key: value for key, value in example.items() if key != "expires_at"})
    for wrong in ({"surprise": 1}, {"status": "ready"}, {"bytes": "12"}, {"created_at": None}):
        assert document.problems(schema, {**example, **wrong}), wrong


def test_an_example_is_a_request_that_is_understood(client: TestClient, document: Document) -> None:
    """Its ids are nobody's; everything else about it is right."""
    for method, path, operation in document.operations():
        example = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("example")
        if example is not None:
            answer = client.request(method, path.replace("{", "").replace("}", ""), json=example)
            assert answer.status_code in (200, 404), answer.text


def test_real_answers_are_as_described(
    client: TestClient,
    document: Document,
    settings: Settings,
    submit: Callable[..., str],  # noqa: F811
) -> None:
    """Every route once, and some of its errors."""

    def call(method: str, path: str, status: int = 200, **options: Any) -> Any:
        answer = document.check(client.request(method, path, **options))
        assert answer.status_code == status, answer.text
        return answer.json() if answer.headers["content-type"] == "application/json" else answer.text

    content = jsonl([chat_row()] * 3)
    form = {"files": {"file": ("a.jsonl", content)}, "data": {"purpose": "fine-tune"}}
    file = call("POST", "/v1/files", **form)
    call("POST", "/v1/files", 400, files={"file": ("a.jsonl", b"no")}, data={"purpose": "fine-tune"})
    call("GET", "/v1/files")
    call("GET", f"/v1/files/{file['id']}")
    call("GET", f"/v1/files/{file['id']}/content")
    call("GET", "/v1/files/file-nope", 404)
    call("GET", "/v1/files?limit=0", 400)

    about = {"filename": "b.jsonl", "purpose": "fine-tune", "bytes": len(content), "mime_type": "application/jsonl"}
    upload = call("POST", "/v1/uploads", json=about)
    part = call("POST", f"/v1/uploads/{upload['id']}/parts", files={"data": ("data", content)})
    body = {"part_ids": [part["id"]], "md5": hashlib.md5(content).hexdigest()}
    call("POST", f"/v1/uploads/{upload['id']}/complete", json=body)
    call("POST", f"/v1/uploads/{call('POST', '/v1/uploads', json=about)['id']}/cancel")
    call("POST", "/v1/uploads/upload_nope/cancel", 404)

    finished = submit(steps=3, save_steps=2, validated=True)
    run_next(settings)
    job = call("GET", f"{JOBS}/{finished}")
    assert job["status"] == "succeeded"
    call("GET", f"{JOBS}/{finished}/checkpoints")
    call("GET", f"{JOBS}/{finished}/metrics")
    call("GET", f"{JOBS}/{finished}/metrics?format=csv")
    call("GET", f"{JOBS}/{finished}/events")
    call("GET", f"{JOBS}/{finished}/events?stream=true")

    request = {"model": BASE, "training_file": file["id"], "metadata": {"a": "b"}, "suffix": "x"}
    job = call("POST", JOBS, json=request, headers={"idempotency-key": "k"})
    call("POST", JOBS, json=request, headers={"idempotency-key": "k"})
    call("POST", JOBS, 400, json={**request, "seed": -1})
    call("GET", f"{JOBS}?metadata[a]=b")
    for verb in ("pause", "resume"):
        if f"{JOBS}/{{job_id}}/{verb}" in document.raw["paths"]:
            call("POST", f"{JOBS}/{job['id']}/{verb}")
    call("DELETE", f"/v1/files/{file['id']}", 409)
    call("POST", f"{JOBS}/{job['id']}/cancel")
    call("POST", f"{JOBS}/{job['id']}/cancel", 409)
    call("DELETE", f"/v1/files/{file['id']}")

    requests = {"files": {"file": ("a.jsonl", b"{}")}, "data": {"purpose": "batch"}}
    about = {"endpoint": "/v1/completions", "completion_window": "24h"}
    batch = call("POST", "/v1/batches", json={"input_file_id": call("POST", "/v1/files", **requests)["id"], **about})
    call("POST", "/v1/batches", 404, json={"input_file_id": "file-nope", **about})
    call("GET", "/v1/batches")
    call("GET", f"/v1/batches/{batch['id']}")
    call("POST", f"/v1/batches/{batch['id']}/cancel")

    tuned = call("GET", f"{JOBS}/{finished}")["fine_tuned_model"]
    call("GET", "/v1/models")
    call("GET", f"/v1/models/{tuned}")
    call("DELETE", f"/v1/models/{BASE}", 403)
    call("DELETE", f"/v1/models/{tuned}")
    call("POST", "/v1/chat/completions", 404, json={"model": tuned, "messages": [{"role": "user", "content": "hi"}]})
    call("GET", "/health/live")
    call("GET", "/health/ready")

    missed = {operation["operationId"] for _, _, operation in document.operations()} - document.checked
    assert missed == CHECKED_ELSEWHERE


def test_the_documentation_needs_nobody_else(client: TestClient) -> None:
    page = client.get("/docs").text
    assert client.get("/").url.path == "/docs"
    assert '"validatorUrl": null' in page
    links = re.findall(r"""(?:src|href|url)\s*[=:]\s*['"]([^'"]+)['"]""", page)
    assert len(links) >= 4
    for link in links:
        assert link.startswith("/") and not link.startswith("//"), link
        assert client.get(link).status_code == 200, link
    style = client.get("/docs/assets/swagger-ui.css").text
    assert not re.findall(r"url\(['\"]?(?:https?:)?//", style) and "@import" not in style


def test_each_choice_of_training_is_described(client: TestClient) -> None:
    found = client.get("/openapi.json").json()["components"]["schemas"]["TrainingSpec"]["properties"]
    assert set(found) == set(TrainingSpec.model_fields)
    assert all(choice.get("description") for choice in found.values())
    assert "8-bit moments" in found["optimizer"]["description"]
