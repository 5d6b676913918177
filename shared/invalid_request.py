"""What pydantic found wrong, as the error a user gets: for a request's body, and for one inside a batch's line."""

from typing import Any

from shared.errors import BadRequest

UNION_BRANCHES = frozenset({"int", "float", "str", "bool", "list"})
UNION_PREFIXES = ("constrained-", "literal[", "function-", "list[")


def invalid_request(problems: Any) -> BadRequest:
    """The first of pydantic's problems as a BadRequest that names the field and the value."""
    problem = problems[0]
    if problem["type"] == "json_invalid":
        return BadRequest(f"the body is not JSON: {problem.get('ctx', {}).get('error', problem['msg'])}")
    # Pydantic adds the branch of a union it tried; the user knows fields only.
    path = [str(part) for part in problem["loc"] if part not in ("body", "query", "header", "path")]
    known = [part for part in path if part not in UNION_BRANCHES and not part.startswith(UNION_PREFIXES)]
    param = ".".join(known) or None
    name = param or "the body"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        advice = "remove it or check its spelling"
        if name == "extra_body":
            advice = "it is the OpenAI SDK's; send what is in it beside the other keys"
        return BadRequest(f"unknown key {name!r}; {advice}", param=param, code="unknown_parameter")
    if problem["type"] == "missing":
        return BadRequest(f"{name} is required", param=param, code="missing_required_parameter")
    if problem["type"] == "value_error":
        return BadRequest(f"{param}: {message}" if param else message, param=param, code="invalid_value")
    value = repr(problem.get("input"))
    return BadRequest(f"{name}={value[:200]} is not valid: {message}", param=param, code="invalid_value")
