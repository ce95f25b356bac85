"""Errors in OpenAI's format: {"error": {message, type, param, code}} and a status."""

import json
import logging
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from minipaged import errors

logger = logging.getLogger(__name__)


class UnknownModel(errors.MinipagedError):
    """A model that this server does not serve."""

    param = "model"


TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}

STATUS: dict[type[Exception], int] = {
    errors.InvalidOption: 400,
    errors.InvalidRequest: 400,
    errors.MissingTokenizer: 400,
    errors.CheckpointError: 400,  # of a chat without a template
    UnknownModel: 404,
    errors.QueueFull: 429,
    TimeoutError: 504,
    errors.EngineDead: 503,
    errors.ServerClosing: 503,
    errors.RequestFailed: 500,
}


CODES = {errors.PromptTooLong: "context_length_exceeded", UnknownModel: "model_not_found"}
"""Codes that OpenAI's clients check; other errors have their status as the code."""


def body(status: int, message: str, param: str | None = None, code: Any = None) -> dict[str, Any]:
    """The JSON of an error."""
    kind = TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    code = status if code is None else code
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def response(status: int, message: str, param: str | None = None, code: Any = None) -> Response:
    """The response of an error. Clients retry after 429 and 503, when Retry-After has passed."""
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    # JSON in ASCII can also represent a lone surrogate, which UTF-8 cannot.
    content = json.dumps(body(status, message, param, code))
    return Response(content, status, headers, "application/json")


def describe(error: Exception) -> tuple[int, str, str | None, Any]:
    """Status, message, parameter and code of an error; faults of the server are logged."""
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail), None, None
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        place = [str(each)[:60] for each in first["loc"] if each != "body"]
        message = f"{'.'.join(place) or 'the body'}: {first['msg']}."
        return 400, message, place[0] if place else None, None
    if isinstance(error, errors.RequestFailed) and error.__cause__ is not None:
        # A part or a tokenizer raised. (Broken logits are logged where they are found.)
        logger.error("a request has failed", exc_info=error)
    for kind, status in STATUS.items():
        if isinstance(error, kind):
            code = next((code for k, code in CODES.items() if isinstance(error, k)), None)
            return status, str(error), getattr(error, "param", None), code
    logger.error("a request has failed", exc_info=error)
    return 500, f"the server failed on this request ({type(error).__name__}).", None, None


async def as_response(_: Request, error: Exception) -> Response:
    """An error before the first byte; a handler of the application."""
    return response(*describe(error))


def as_event(error: Exception) -> bytes:
    """An error in the middle of a stream."""
    return f"data: {json.dumps(body(*describe(error)))}\n\n".encode()
