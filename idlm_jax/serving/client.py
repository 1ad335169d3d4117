"""A small client of the OpenAI HTTP API, on the standard library alone; ``idlm chat --url`` talks through it."""

import json
from collections.abc import Iterator
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from idlm_jax.errors import UserError, did_you_mean

# A server may be busy; a line of a stream that takes longer than this will not come.
_SECONDS = 600


class Client:
    """A server at ``url``, with or without ``/v1``; every method raises UserError with what the server says."""

    def __init__(self, url: str, api_key: str | None = None):
        self.url = url.rstrip("/").removesuffix("/v1")
        if not _is_address(self.url):
            raise UserError(f"'{url}' is no address of a server; it looks like http://127.0.0.1:8000")
        self.headers = {"content-type": "application/json"}
        if api_key is not None:
            self.headers["authorization"] = f"Bearer {api_key}"

    def models(self) -> list[str]:
        """The names that the server answers to, its own first."""
        answer = "".join(self._lines("/v1/models", None))
        try:
            return [model["id"] for model in json.loads(answer)["data"]]
        except (ValueError, LookupError, TypeError):
            raise UserError(f"{self.url} is no server of the OpenAI API: it lists no models") from None

    def model(self, name: str | None) -> str:
        """The name, which the server must answer to; or the first of its own."""
        names = self.models()
        if name is None and names:
            return names[0]
        if name not in names:
            known = f"(there is {', '.join(names)}){did_you_mean(name or '', names)}" if names else "and no other"
            raise UserError(f"{self.url} has no model '{name or ''}' {known}")
        return name

    def chat(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a chat completion, its usage last."""
        for line in self._lines("/v1/chat/completions", self.streamed(body)):
            data = line.removeprefix("data:").strip()
            if not data or data == "[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise UserError(event["error"]["message"])
            yield event

    @staticmethod
    def streamed(body: dict[str, Any]) -> dict[str, Any]:
        """The body with a stream asked for that ends with its usage."""
        return {**body, "stream": True, "stream_options": {"include_usage": True}}

    def _lines(self, path: str, body: dict[str, Any] | None) -> Iterator[str]:
        data = None if body is None else json.dumps(body).encode()
        try:
            with urlopen(Request(self.url + path, data, self.headers), timeout=_SECONDS) as answer:
                for line in answer:
                    yield line.decode("utf-8", "replace")
        except HTTPError as error:
            raise UserError(f"{self.url}: {error_message(error.read(), f'{error.code} {error.reason}')}") from None
        except (URLError, OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise UserError(f"cannot reach {self.url}: {reason}") from None


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is no number
        return False


def error_message(body: bytes, otherwise: str) -> str:
    """What an error of the OpenAI API says, or ``otherwise`` where it has another form."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return otherwise
