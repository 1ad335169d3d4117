"""A small client of the OpenAI HTTP API, on the standard library alone; ``idlm chat --url`` talks through it."""

import json
from collections.abc import Iterator
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from idlm_jax.errors import UserError

# A server may be busy; a line of a stream that takes longer than this will not come.
_SECONDS = 600


class Client:
    """A server at ``url``, with or without ``/v1``; every method raises UserError with what the server says."""

    def __init__(self, url: str, api_key: str | None = None):
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"'{url}' is no address of a server; it begins with http:// or https://")
        self._headers = {"content-type": "application/json"}
        if api_key is not None:
            self._headers["authorization"] = f"Bearer {api_key}"

    def models(self) -> list[str]:
        """The names that the server answers to, its own first."""
        answer = "".join(self._lines("/v1/models", None))
        try:
            return [model["id"] for model in json.loads(answer)["data"]]
        except (ValueError, LookupError, TypeError):
            raise UserError(f"{self.url} is no server of the OpenAI API: it lists no models") from None

    def chat(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a chat completion, its usage last."""
        streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
        for line in self._lines("/v1/chat/completions", streamed):
            data = line.removeprefix("data:").strip()
            if not data or data == "[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise UserError(event["error"]["message"])
            yield event

    def _lines(self, path: str, body: dict[str, Any] | None) -> Iterator[str]:
        data = None if body is None else json.dumps(body).encode()
        try:
            with urlopen(Request(self.url + path, data, self._headers), timeout=_SECONDS) as answer:
                for line in answer:
                    yield line.decode("utf-8", "replace")
        except HTTPError as error:
            raise UserError(f"{self.url}: {_message(error)}") from None
        except (URLError, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise UserError(f"cannot reach {self.url}: {reason}") from None


def _message(error: HTTPError) -> str:
    try:
        return json.loads(error.read())["error"]["message"]
    except (ValueError, LookupError, TypeError):
        return f"{error.code} {error.reason}"
