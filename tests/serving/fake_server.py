"""A server whose every delay is known: it answers each request by a script, in a thread of its own."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Script:
    """How requests are answered."""

    # Seconds before the first text, and before each of the others.
    first: float = 0.0
    gap: float = 0.0
    # The texts of a stream; all of them together are ``tokens``.
    pieces: tuple[str, ...] = ("ab", "cd", "ef")
    tokens: int = 6
    usage: bool = True
    idlm: dict[str, Any] | None = None
    # Status of the n-th request (the last for all that follow); 0 breaks off in the middle.
    statuses: tuple[int, ...] = (200,)
    chunked: bool = True
    # What has been asked: paths and bodies; and how many requests there were at once.
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    open: int = 0
    most_open: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split(" ")[1]
        if path == "/v1/models":
            self._say(writer, 200, json.dumps({"data": [{"id": "fake"}]}).encode())
        else:
            length = next(int(line.split(":")[1]) for line in head.splitlines() if line.startswith("content-length"))
            body = json.loads(await reader.readexactly(length))
            status = self.statuses[min(len(self.asked), len(self.statuses) - 1)]
            self.asked.append((path, body))
            self.open += 1
            self.most_open = max(self.open, self.most_open)
            await (self._stream(writer, status == 0) if status in (0, 200) else self._refuse(writer, status))
            self.open -= 1
        await writer.drain()
        writer.close()

    async def _refuse(self, writer: asyncio.StreamWriter, status: int) -> None:
        self._say(writer, status, json.dumps({"error": {"message": f"no, {status}"}}).encode())

    def _say(self, writer: asyncio.StreamWriter, status: int, body: bytes) -> None:
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)

    async def _stream(self, writer: asyncio.StreamWriter, breaks: bool) -> None:
        transfer = "transfer-encoding: chunked\r\n" if self.chunked else ""
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{transfer}\r\n".encode())
        self._chunk(writer, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for number, piece in enumerate(self.pieces):
            await asyncio.sleep(self.gap if number else self.first)
            self._chunk(writer, {"choices": [{"index": 0, "text": piece}], "usage": None})
            if breaks:
                return
        if self.usage:
            ours = {} if self.idlm is None else {"idlm": self.idlm}
            usage = {"prompt_tokens": 5, "completion_tokens": self.tokens, **ours}
            self._chunk(writer, {"choices": [], "usage": usage})
        self._write(writer, b"data: [DONE]\n\n")
        if self.chunked:
            writer.write(b"0\r\n\r\n")

    def _chunk(self, writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
        data = f"data: {json.dumps(event)}\n\n".encode()
        # Wherever a network may cut.
        self._write(writer, data[:9])
        self._write(writer, data[9:])

    def _write(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n" if self.chunked else data)


@contextmanager
def fake_server(script: Script) -> Iterator[Script]:
    """Run it, on a free port."""
    ready, over, loop = threading.Event(), asyncio.Event(), asyncio.new_event_loop()

    async def serve() -> None:
        async with await asyncio.start_server(script.answer, "127.0.0.1", 0, backlog=1000) as server:
            script.port = server.sockets[0].getsockname()[1]
            ready.set()
            await over.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=[serve()], daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield script
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()
        loop.close()
