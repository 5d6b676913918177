"""Whether an answer is what /openapi.json says it is, to the letter: nothing missing, nothing that is not described."""

import copy
import json
import re
from typing import Any

from jsonschema import Draft202012Validator


class Document:
    """The service's own description, made strict."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.raw = document
        self._strict = copy.deepcopy(document)
        for schema in _schemas(self._strict):
            if "properties" in schema:
                schema.setdefault("additionalProperties", False)
        self.checked: set[str] = set()
        """Operations of which a successful answer was checked."""

    def operations(self) -> list[tuple[str, str, dict[str, Any]]]:
        """(method, path, operation) of everything the service does."""
        return [
            (method, path, operation)
            for path, methods in self.raw["paths"].items()
            for method, operation in methods.items()
        ]

    def problems(self, schema: dict[str, Any], value: Any) -> list[str]:
        """What is wrong with a value, by a schema of this document."""
        bundle = {"components": self._strict["components"], **schema}
        return [
            f"{error.json_path}: {error.message[:300]}" for error in Draft202012Validator(bundle).iter_errors(value)
        ]

    def check(self, answer: Any) -> Any:
        """Hold an HTTP answer against the description of its route. Returns it."""
        method, path = answer.request.method.lower(), answer.request.url.path
        operation = next(
            operation
            for known, template, operation in self.operations()
            if known == method and re.fullmatch(re.sub(r"{(\w+)}", lambda m: _pattern(m[1]), template), path)
        )
        name, status = operation["operationId"], str(answer.status_code)
        assert status in operation["responses"], f"{name} answered {status}, which is not described"
        described = operation["responses"][status]
        content_type = answer.headers["content-type"].partition(";")[0]
        assert content_type in described["content"], f"{name} answered {status} as {content_type}"
        if content_type == "application/json":
            problems = self.problems(described["content"][content_type]["schema"], json.loads(answer.text))
            assert not problems, f"{name} {status}: {problems}"
        always = [header for header in described["headers"] if header.startswith(("x-request", "openai"))]
        assert len(always) == 4 and all(header in answer.headers for header in always)
        if answer.is_success:
            self.checked.add(name)
        return answer


def _pattern(parameter: str) -> str:
    return ".+" if parameter == "model_id" else "[^/]+"


def _schemas(node: Any) -> Any:
    """Every schema object within a document."""
    if isinstance(node, dict):
        yield node
        for child in node.values():
            yield from _schemas(child)
    elif isinstance(node, list):
        for child in node:
            yield from _schemas(child)
