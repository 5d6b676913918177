"""Every error a user can cause, as a tree. Domain code raises these; only `api.error_handlers` turns them into HTTP.

    AppError                     status  type                    code
    ├── BadRequest                400    invalid_request_error   (given)
    ├── Unauthorized              401    authentication_error    invalid_api_key
    ├── PermissionDenied          403    permission_error        permission_denied
    ├── NotFound                  404    invalid_request_error   not_found
    │   └── ModelNotFound         404    invalid_request_error   model_not_found
    ├── Conflict                  409    invalid_request_error   conflict          (x-should-retry: false)
    ├── TooLarge                  413    invalid_request_error   file_too_large
    ├── TooManyRequests           429    rate_limit_error        rate_limit_exceeded
    └── Unavailable               503    server_error            service_unavailable

The message holds the offending value and the next step. The body is OpenAI's:
`{"error": {"message", "type", "param", "code"}}`.
"""

from typing import Any

from shared.text import storable


class AppError(Exception):
    """Base of the tree.

    Args:
        message: for the user; names the value at fault and what to do next.
        param: the request field at fault, dotted (`training.learning_rate`), or None.
        code: machine-readable, snake_case; the class's own if None.
        retry_after_s: sent as `retry-after` where waiting helps.
    """

    status_code = 500
    type = "server_error"
    code: str = "internal_error"
    should_retry: bool | None = None
    """False: repeating can't help, and OpenAI's SDKs are told so. None: they decide by the status."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """OpenAI's error body. Free of what a client may have sent and no encoder takes."""
        param = None if self.param is None else storable(self.param)
        return {"error": {"message": storable(self.message), "type": self.type, "param": param, "code": self.code}}


class BadRequest(AppError):
    status_code = 400
    type = "invalid_request_error"
    code = "invalid_request"


class Unauthorized(AppError):
    status_code = 401
    type = "authentication_error"
    code = "invalid_api_key"


class PermissionDenied(AppError):
    status_code = 403
    type = "permission_error"
    code = "permission_denied"


class NotFound(AppError):
    status_code = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class Conflict(AppError):
    """The request can't be met in the present state, and repeating it will not help."""

    status_code = 409
    type = "invalid_request_error"
    code = "conflict"
    should_retry = False


class TooLarge(AppError):
    status_code = 413
    type = "invalid_request_error"
    code = "file_too_large"


class TooManyRequests(AppError):
    status_code = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class Unavailable(AppError):
    status_code = 503
    type = "server_error"
    code = "service_unavailable"
