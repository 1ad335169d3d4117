"""Streamed answers of a server, hundreds at once in one thread: HTTP/1.1 and server-sent events on asyncio alone.

``Client`` waits for one answer. With a thread for each, an event takes several times the processor time that it takes
here, and what measures a server would slow down what it sees of it.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

from idlm_jax.serving.client import Client, error_message


class RefusedError(Exception):
    """An answer that is none: its HTTP status, or None where a stream breaks off, and what the server says."""

    def __init__(self, status: int | None, message: str):
        super().__init__(message)
        self.status, self.message = status, message


async def events(client: Client, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The events of an answer, its usage last; raises RefusedError, or OSError where nobody answers."""
    address = urlsplit(client.url)
    tls = address.scheme == "https"
    reader, writer = await asyncio.open_connection(address.hostname, address.port or (443 if tls else 80), ssl=tls)
    try:
        data = json.dumps(client.streamed(body)).encode()
        given = {**client.headers, "host": address.netloc, "content-length": len(data), "connection": "close"}
        head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
        writer.write(f"POST {address.path}{path} HTTP/1.1\r\n{head}\r\n".encode() + data)
        status, headers = await _head(reader)
        pieces = _pieces(reader, headers)
        if status != 200:
            said = b"".join([piece async for piece in pieces])
            raise RefusedError(status, error_message(said, f"status {status}"))
        rest = b""
        async for piece in pieces:
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data:") and not line.startswith(b"data: [DONE]"):
                    yield _event(line[5:])
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError):
        raise RefusedError(None, "the answer broke off, or is not HTTP with JSON events") from None
    finally:
        writer.close()


def _event(data: bytes) -> dict[str, Any]:
    event = json.loads(data)
    if not isinstance(event, dict):
        raise ValueError("an event must be an object")
    if "error" in event:
        raise RefusedError(None, error_message(data, "an error without a message"))
    return event


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    fields = (line.partition(":") for line in lines[1:] if line)
    return int(lines[0].split(" ")[1]), {name.strip().lower(): value.strip() for name, _, value in fields}


async def _pieces(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """The body as it comes: in chunks, of a known length, or up to the end of the connection."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while piece := await reader.read(2**16):
            yield piece
