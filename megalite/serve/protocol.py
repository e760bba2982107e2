"""What clients may ask, in OpenAI's words, and what they are told.

The models refuse what they do not know, so that a misspelt setting is no silent default. Fields
that clients of other servers send by habit are taken where they change nothing.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megalite.data.strict_json import kind_of
from megalite.data.tokenizer import Tokenizer
from megalite.generate.sample import Likely, Sampling

LARGEST = 2**63 - 1
Probability = Annotated[float, Field(gt=0, le=1)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]
Nothing = Annotated[float, Field(ge=0, le=0)] | None


class Wrong(Exception):
    """What is wrong with a request: an HTTP status, words, and the field."""

    def __init__(self, status: int, message: str, *, code: str = "", param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    @property
    def headers(self) -> dict[str, str]:
        """Those that tell a client what to do about it."""
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        return {"retry-after": "1"} if self.status in (429, 503) else {}

    def body(self) -> dict[str, Any]:
        """OpenAI's form of an error."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    """What a stream tells beside the answer."""

    include_usage: bool = False


class Asked(_Strict):
    """What both kinds of completions take."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0, le=LARGEST)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1e6)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=0, le=LARGEST)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=1e6)] | None = None
    seed: Annotated[int, Field(ge=-LARGEST, le=LARGEST)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    presence_penalty: Nothing = None
    frequency_penalty: Nothing = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def copies(self) -> int:
        """Answers to each prompt."""
        return 1 if self.n is None else self.n

    def sampling(self) -> Sampling:
        """With a seed of its own where none is named."""
        plain = Sampling(temperature=1.0, seed=secrets.randbits(62))
        names = [field.name for field in dataclasses.fields(Sampling)]
        named = {name: getattr(self, name) for name in names}
        return replace(plain, **{k: value for k, value in named.items() if value is not None})


class Part(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    @property
    def text(self) -> str:
        """What it says."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatAsked(Asked):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[int, Field(ge=0, le=LARGEST)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


Ids = Annotated[list[int], Field(min_length=1)]


class TextAsked(Asked):
    """The body of /v1/completions."""

    prompt: str | Ids | Annotated[list[str] | list[Ids], Field(min_length=1, max_length=128)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Tokens of each prompt."""
        if isinstance(self.prompt, str):
            return [tokenizer.encode(self.prompt)]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return [tokenizer.encode(p) if isinstance(p, str) else p for p in self.prompt]


class TokenizeAsked(_Strict):
    """The body of /tokenize: a text, or the messages of a conversation."""

    text: str | None = None
    messages: Annotated[list[ChatMessage], Field(max_length=1000)] | None = None


def check(schema: type[BaseModel], value: Any) -> Any:
    """`value` as `schema`. Raises Wrong with the first mistake: `messages[0].content: ...`."""
    if not isinstance(value, dict):
        raise Wrong(400, f"the body is {kind_of(value)}, expected an object")
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = _place(first["loc"])
        text = f"{where}: {first['msg']}"
        if first["type"] == "extra_forbidden":
            text = f"{where}: no such field here (misspelt, or not offered)"
        elif first["type"].endswith("_type"):
            text += f", got {kind_of(first['input'])}"
        raise Wrong(400, text, param=where) from None


def _place(path: tuple[int | str, ...]) -> str:
    """`messages[0].content`, without what pydantic adds of the kinds it tried."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif step.isidentifier() and step not in ("str", "int", "float", "bool"):
            text += f".{step}" if text else step
    return text or "the body"


# -- probabilities of tokens -------------------------------------------------------------------


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; `bytes:\\xe2` where it is a part of a character, as OpenAI has it."""
    data = tokenizer.decode_bytes([token])
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in data)


def chat_logprob(tokenizer: Tokenizer, told: Likely) -> dict[str, Any]:
    """An entry of `logprobs.content`."""
    rivals = [_logprob(tokenizer, token, value) for token, value in told.rivals]
    return {**_logprob(tokenizer, told.token, told.logprob), "top_logprobs": rivals}


def _logprob(tokenizer: Tokenizer, token: int, value: float) -> dict[str, Any]:
    data = tokenizer.decode_bytes([token])
    text = data.decode("utf-8", "replace")
    return {"token": text, "logprob": _finite(value), "bytes": list(data)}


def text_logprobs(
    tokenizer: Tokenizer, first: int | None, told: Sequence[Likely], offset: int
) -> dict[str, Any]:
    """`logprobs` of a text completion whose first token, of an echoed prompt, nothing predicts."""
    ids = [] if first is None else [first]
    ids += [each.token for each in told]
    offsets = []
    for token in ids:
        offsets.append(offset)
        offset += len(tokenizer.decode([token]))
    tops: list[dict[str, float] | None] = [] if first is None else [None]
    for each in told:
        named = {token_text(tokenizer, token): _finite(value) for token, value in each.rivals}
        tops.append(named)
    values: list[float | None] = [] if first is None else [None]
    return {
        "tokens": [token_text(tokenizer, token) for token in ids],
        "token_logprobs": values + [_finite(each.logprob) for each in told],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _finite(value: float) -> float:
    """JSON has no infinity."""
    return max(value, -9999.0)
