"""Bodies of requests, as the OpenAI API names their fields, and what they ask of the decoder.

A field that would change the answer and that the decoder does not know is refused by name; values that change nothing
(``"frequency_penalty": 0``) are taken.
"""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from idlm_jax.decoding.generate import SamplingParams
from idlm_jax.errors import UserError, did_you_mean

MOST_STOPS, LONGEST_STOP = 16, 256
# Texts of one request.
MOST_CHOICES = 128

# Fields that say nothing about the text.
_IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key")
# Fields of the API that are not supported, and the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "min_p": (0, 0.0),
    "modalities": (["text"],),
    "parallel_tool_calls": (False, True),
    "prediction": (),
    "presence_penalty": (0, 0.0),
    "reasoning_effort": (),
    "repetition_penalty": (1, 1.0),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (),
    "verbosity": (),
    "web_search_options": (),
}


class RequestError(Exception):
    """A request that is not answered: status, message, and the field that is wrong, as OpenAI's errors carry them."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    """What a stream holds besides text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class _Body(BaseModel):
    """What both kinds of requests have in common; the defaults are OpenAI's."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    # Beyond OpenAI's, as in vLLM.
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None

    @model_validator(mode="after")
    def _refuse_what_is_not_there(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if value is None or name in _IGNORED:
                continue
            if name not in _NEUTRAL:
                known = [*type(self).model_fields, *_NEUTRAL]
                raise RequestError(400, f"unknown field '{name}'{did_you_mean(name, known)}", name, "unknown_parameter")
            # 0 is not False here.
            if not any(type(value) is type(neutral) and value == neutral for neutral in _NEUTRAL[name]):
                raise RequestError(400, f"'{name}' is not supported", name, "unsupported_parameter")
        return self

    @property
    def choices(self) -> int:
        """Texts for every prompt."""
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self) -> None:
        """Raise RequestError for values that no request can have."""
        if not 1 <= self.choices <= MOST_CHOICES:
            raise RequestError(400, f"n must be in 1 … {MOST_CHOICES}, not {self.choices}", "n")
        if self.stream_options is not None and not self.stream:
            raise RequestError(400, "stream_options go with stream", "stream_options")
        stop = self._stop()
        if len(stop) > MOST_STOPS:
            raise RequestError(400, f"at most {MOST_STOPS} stop strings, not {len(stop)}", "stop")
        if any(len(text) > LONGEST_STOP for text in stop):
            raise RequestError(400, f"a stop string has at most {LONGEST_STOP} characters", "stop")
        if self.temperature is not None and not 0 <= self.temperature <= 2:
            raise RequestError(400, f"temperature must be in 0 … 2, not {self.temperature}", "temperature")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise RequestError(400, f"seed must be in 0 … 2^32 - 1, not {self.seed}", "seed")

    def sampling(self, seed: int, max_tokens: int) -> SamplingParams:
        """Sampling parameters of one text; raises RequestError."""
        temperature = 1.0 if self.temperature is None else self.temperature
        top_p = 1.0 if self.top_p is None else self.top_p
        params = SamplingParams(
            # Logits divided by less than this overflow; vLLM takes it for greedy, too.
            temperature=temperature if temperature >= 1e-5 else 0.0,
            top_k=self.top_k or 0,
            # Some token has more than this, so that a smaller number asks for the same: the most likely one.
            top_p=top_p if not 0 < top_p < 1e-7 else 1e-7,
            seed=seed,
            max_tokens=max_tokens,
            stop=self._stop(),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
        )
        try:
            params.validate()
        except UserError as error:
            # These messages begin with the name of the parameter.
            param = str(error).split()[0]
            raise RequestError(400, str(error), param if param in type(self).model_fields else None) from None
        return params

    def _stop(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionBody(_Body):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None

    def prompts(self) -> list[Any]:
        """Every prompt as text or token ids."""
        single = isinstance(self.prompt, str) or (len(self.prompt) > 0 and isinstance(self.prompt[0], int))
        return [self.prompt] if single else list(self.prompt)

    def most_tokens(self, room: int) -> int:
        """How long a text may become where the engine has room for ``room`` tokens."""
        return 16 if self.max_tokens is None else self.max_tokens

    def wanted_logprobs(self, most: int) -> int | None:
        """How many likely tokens to name in each place, None for no log-probabilities; raises RequestError."""
        return _logprobs_in_range("logprobs", self.logprobs, most)


class TextPart(BaseModel):
    """A piece of a message."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a chat."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]
    name: str | None = None

    @model_validator(mode="after")
    def _refuse_what_is_not_there(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            # What the official client's own answers carry goes back to the server with the next turn.
            if value not in (None, []):
                raise RequestError(400, f"'{name}' of a message is not supported", "messages", "unsupported_parameter")
        return self

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content} | ({"name": self.name} if self.name else {})


class ChatBody(_Body):
    """``POST /v1/chat/completions``."""

    messages: list[Message]
    # The newer name of max_tokens.
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def prompts(self) -> list[Any]:
        """The chat, the only prompt."""
        if not self.messages:
            raise RequestError(400, "messages must not be empty", "messages")
        return [[message.plain() for message in self.messages]]

    def most_tokens(self, room: int) -> int:
        """How long the answer may become where the engine has room for ``room`` tokens: all of it by default."""
        given = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        # At least 1, so that a full context is refused for what it is.
        return max(room, 1) if given is None else given

    def wanted_logprobs(self, most: int) -> int | None:
        """How many likely tokens to name in each place, None for no log-probabilities; raises RequestError."""
        if not self.logprobs:
            if self.top_logprobs:
                raise RequestError(400, "top_logprobs go with logprobs: true", "top_logprobs")
            return None
        name = "logprobs" if self.top_logprobs is None else "top_logprobs"
        return _logprobs_in_range(name, self.top_logprobs or 0, most)


def _logprobs_in_range(name: str, count: int | None, most: int) -> int | None:
    if count is not None and most == 0:
        raise RequestError(400, f"'{name}' is not supported: the server runs with --max-logprobs 0", name)
    if count is not None and not 0 <= count <= most:
        raise RequestError(400, f"{name} must be in 0 … {most} (--max-logprobs of the server), not {count}", name)
    return count


def parse[Body: CompletionBody | ChatBody](kind: type[Body], data: bytes) -> Body:
    """A body from bytes; raises RequestError: 400 for what is no JSON or not supported, 422 for wrong types."""
    try:
        body = kind.model_validate_json(data)
    except ValidationError as error:
        raise _as_request_error(error.errors(include_url=False, include_input=False)) from None
    body.check()
    return body


def _as_request_error(errors: list[Any]) -> RequestError:
    first: Mapping[str, Any] = errors[0]
    if first["type"] == "json_invalid":
        return RequestError(400, f"the body is not JSON: {first['ctx']['error']}", None, "invalid_json")
    place = first["loc"]
    if not place:
        return RequestError(422, "the body must be a JSON object", None, "invalid_type")
    param = str(place[0])
    if first["type"] == "missing":
        return RequestError(422, f"'{'.'.join(map(str, place))}' is missing", param, "missing_parameter")
    # Of a union there is an error for each member, and its names stand in the place where only clients' names should.
    said = {error["msg"] for error in errors if error["loc"][0] == param}
    where = f"{param}[{place[1]}]" if len(place) > 1 and isinstance(place[1], int) else param
    return RequestError(422, f"'{where}': {'; or '.join(sorted(said))}", param, "invalid_type")
