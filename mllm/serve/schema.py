"""Define requests, limits, errors and answers in OpenAI's schema."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from mllm.engines.base import EngineError
from mllm.errors import MLLMError
from mllm.media.images import MAX_PIXELS
from mllm.outputs import data_url
from mllm.serve.rows import Answer

COLD = 1e-5  # a lower temperature is greedy: dividing by it overflows
MAX_STOPS = 16
STORED = 4  # bytes of a pixel in memory, and of a character
DECODING = 40  # bytes for a pixel while an image is decoded and resized: 25 at most were measured for decoding
PARSING = 9  # bytes for a byte of a body while it is parsed: characters of four bytes, twice, and its structure
TOKENIZING = 256  # bytes for a character while a text is tokenized
BUFFERS = 2**18  # bytes of a connection
StopString = Annotated[str, Field(max_length=256)]


@dataclass(frozen=True)
class Limits:
    """Limits of requests and answers, which bound the server's memory and time.

    Raises:
        MLLMError: an empty token, or limits that no request can keep.
    """

    body: int = 32 * 2**20  # bytes of a request
    bodies: int = 256 * 2**20  # bytes of all requests that are being read
    images: int = 8  # of a request
    pixels: int = 2 * MAX_PIXELS  # of the images of all requests
    characters: int = 2**19  # of the texts of a request
    max_new_tokens: int = 512  # of an answer
    batch: int = 16  # requests that are decoded together
    waiting: int = 64  # requests that wait beside them
    connections: int = 500  # open at the same time
    deadline: float = 30.0  # seconds for sending a request, and for each part of an answer
    grace: int = 8  # seconds after SIGTERM in which answers are finished
    hosts: Collection[str] = ()  # that images may be downloaded from
    folders: Collection[Path] = ()  # that images may be read from
    token: str | None = None  # a bearer token that every request to /v1 must carry

    def __post_init__(self) -> None:
        """Check the token and the limits."""
        if self.token is not None and not re.fullmatch(r"[!-~]+", self.token):
            raise MLLMError(
                "The token is empty, or has white space or other characters than ASCII, so no client could send it, "
                "or every client could. Give another token, or none at all (also in MLLM_TOKEN)."
            )
        if self.bodies < 2 * self.body:
            raise MLLMError(
                f"All requests together may have {self.bodies} bytes, and one {self.body}: expected at least twice as "
                "many. Raise the one, or lower the other."
            )

    @property
    def memory(self) -> int:
        """Return the bytes that requests need at most, next to the model and its activations."""
        image = min(self.pixels, MAX_PIXELS)
        texts = self.characters * (TOKENIZING + STORED * (self.batch + self.waiting))
        connections = self.connections * BUFFERS
        return self.bodies + PARSING * self.body + STORED * self.pixels + DECODING * image + texts + connections


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
    messages: Annotated[list[dict[str, Any]], FailFast()] = Field(min_length=1)
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
    """Return an error as a response: 400 where the request is wrong, 503 without an engine, 500 for other failures."""
    if isinstance(error, EngineError):
        return Refused(503, str(error), "engine_unavailable")
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
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}.get(
        error.status
    )
    return JSONResponse({"error": error_body(error)}, error.status, headers=headers)


def error_body(error: Refused) -> dict[str, Any]:
    """Return an error in OpenAI's schema, as a mapping."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"message": str(error), "type": kind, "param": error.param, "code": error.code}
