"""Define requests, limits, errors and answers in OpenAI's schema."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mllm.errors import MLLMError
from mllm.outputs import data_url
from mllm.serve.batcher import Answer

COLD = 1e-5  # a lower temperature is greedy: dividing by it overflows
MAX_STOPS = 16
StopString = Annotated[str, Field(max_length=256)]


@dataclass(frozen=True)
class Limits:
    """Limits of requests and answers."""

    body: int = 32 * 2**20  # bytes of a request
    images: int = 8  # of a request
    max_new_tokens: int = 512  # of an answer
    batch: int = 16  # requests that are decoded together
    waiting: int = 64  # requests in the queue
    hosts: Collection[str] = ()  # that images may be downloaded from
    folders: Collection[Path] = ()  # that images may be read from
    token: str | None = None  # a bearer token that every request to /v1 must carry


class StreamOptions(BaseModel):
    """OpenAI's ``stream_options``."""

    include_usage: bool = False


class Refused(Exception):
    """An error response: its HTTP status, message and code, and the field that is wrong."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


def invalid_request(message: str, param: str | None = None) -> Refused:
    """Return the error response to a request that is wrong; ``param`` is the field."""
    return Refused(400, message, "invalid_request", param)


class Completion(BaseModel):
    """A request, in OpenAI's schema: the fields that are done (`mllm.serve.fields` refuses or removes the others)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    messages: list[dict[str, Any]] = Field(min_length=1)
    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopString | list[StopString] = Field([], max_length=MAX_STOPS)

    @classmethod
    def checked(cls, values: dict[str, Any]) -> Completion:
        """Return a checked request.

        Raises:
            Refused: a field has a wrong type or value; it is named.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            path = [str(step) for step in first["loc"]]
            raise invalid_request(f"{'.'.join(path)}: {first['msg']}", path[0] if path else None) from None

    def decoding_options(self, limit: int) -> dict[str, Any]:
        """Return the options of `mllm.lms.decoding.Decoding`, with at most ``limit`` new tokens."""
        tokens = self.max_completion_tokens or self.max_tokens
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        greedy = self.top_p == 0 or (self.temperature is not None and self.temperature < COLD)
        options = {
            "max_new_tokens": tokens and min(tokens, limit),
            "temperature": 0.0 if greedy else self.temperature,
            "top_p": self.top_p or None,
            "seed": self.seed,
            "stop_strings": [stop for stop in stops if stop] or None,
        }
        return {key: value for key, value in options.items() if value is not None}


def images_of_answer(answer: Answer) -> dict[str, Any]:
    """Return the field ``images`` of a message, if the answer has any."""
    images = [
        {"type": "image_url", "image_url": {"url": data_url(image)}, "at": at, "score": image.score}
        for at, image in answer.images
    ]
    return {"images": images} if images else {}


def server_sent_event(body: dict[str, Any]) -> str:
    """Return a server-sent event that carries a JSON body."""
    return f"data: {json.dumps(body)}\n\n"


def refusal(error: Exception) -> Refused:
    """Return an error as a response: 400 where the request is wrong, 500 where the model failed."""
    if isinstance(error, MLLMError):
        return invalid_request(str(error))
    return Refused(500, f"The model failed: {type(error).__name__}.", "failed")


def usage_of(answer: Answer) -> dict[str, int]:
    """Return OpenAI's ``usage`` of an answer."""
    total = answer.prompt_tokens + answer.completion_tokens
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": total,
    }


def error_response(error: Refused) -> JSONResponse:
    """Return an error in OpenAI's schema."""
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse({"error": error_body(error)}, error.status, headers=headers)


def error_body(error: Refused) -> dict[str, Any]:
    """Return an error in OpenAI's schema, as a mapping."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"message": str(error), "type": kind, "param": error.param, "code": error.code}
