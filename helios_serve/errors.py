"""Every error that reaches a caller. Knows HTTP and gRPC statuses and error codes; knows nothing of frameworks.

The catalogue follows the API's error table: `code` is stable and machine-readable, `param` is the dotted path of the
offending field as the caller wrote it, `message` says what was given, what is allowed and what would be right.
"""

from __future__ import annotations


class HeliosError(Exception):
    """Base of all errors with a meaning for the caller.

    Args:
        message: what was wrong and what would be right, in one or two sentences.
        param: dotted path of the field at fault, None when no single field is.
        code: stable error code; the class's own when None.
        retry_after_s: when another try may succeed, if that can be estimated.
    """

    status = 500
    grpc_status = "INTERNAL"
    code = "internal_error"
    retryable = True

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        if code is not None:
            self.code = code

    @property
    def type(self) -> str:
        """OpenAI's coarse error type, derived from the HTTP status."""
        if self.status == 401:
            return "authentication_error"
        if self.status == 403:
            return "permission_error"
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"


class InvalidRequestError(HeliosError):
    """The request cannot be served as it was written (HTTP 400)."""

    status, grpc_status, code, retryable = 400, "INVALID_ARGUMENT", "invalid_value", False


class NotFoundError(HeliosError):
    """No such video, model or route for this caller (HTTP 404)."""

    status, grpc_status, code, retryable = 404, "NOT_FOUND", "video_not_found", False


class ConflictError(HeliosError):
    """The object is in a state that does not allow the call (HTTP 409)."""

    status, grpc_status, code, retryable = 409, "FAILED_PRECONDITION", "video_not_ready", False


class BodyTooLargeError(HeliosError):
    """The body exceeds its limit (HTTP 413)."""

    status, grpc_status, code, retryable = 413, "RESOURCE_EXHAUSTED", "body_too_large", False


class UnsupportedMediaTypeError(HeliosError):
    """The body's content type is not one that the route reads (HTTP 415)."""

    status, grpc_status, code, retryable = 415, "INVALID_ARGUMENT", "unsupported_media_type", False


class QuotaError(HeliosError):
    """The caller has as much running or waiting as its limits allow (HTTP 429)."""

    status, grpc_status, code, retryable = 429, "RESOURCE_EXHAUSTED", "quota_exceeded", True


class GenerationError(HeliosError):
    """The job failed on our side (HTTP 500)."""

    status, grpc_status, code, retryable = 500, "INTERNAL", "generation_failed", False


class CapacityError(HeliosError):
    """The server cannot take more work now (HTTP 503)."""

    status, grpc_status, code, retryable = 503, "UNAVAILABLE", "capacity_exceeded", True


class CheckpointError(HeliosError):
    """A checkpoint that cannot be served: missing, damaged, of another class, or inconsistent."""

    status, grpc_status, code, retryable = 500, "FAILED_PRECONDITION", "checkpoint_invalid", False


class UnsupportedOperationError(HeliosError):
    """The model or this server cannot do that (HTTP 501)."""

    status, grpc_status, code, retryable = 501, "UNIMPLEMENTED", "unsupported_operation", False
