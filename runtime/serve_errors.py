"""What the server refuses, in the shape in which OpenAI's API says so."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A request that gets an error instead of an answer.

    Args:
        status: of HTTP: 400 to 504.
        message: one line that says what to do.
        param: the field of the request that it is about, such as ``messages[0].content``.
        code: a word for programs, such as ``context_length_exceeded``.
        retry_after: seconds after which trying again makes sense; the header of that name.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        found = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return {**found, "www-authenticate": "Bearer"} if self.status == 401 else found

    def body(self) -> dict[str, Any]:
        """The JSON of the response, which is the same as that of an error within a stream."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None, code: str | None = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)
