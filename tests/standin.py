"""An inference server on 127.0.0.1 that says what it is told to, and misbehaves when it is told to.

It answers /v1/models, /tokenize, /v1/completions, /v1/chat/completions and llama-server's /completion. Which
fault a question meets is decided by a function of how many questions came before it. `feature_standin` gives
features instead.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HANG = 1.0
"""Seconds that a hanging server holds a question: longer than the tests' time-outs."""

# What may come instead of an answer; "400" and "empty" are about the question, the others about the server.
FAULTS = ("429", "500", "503", "hang", "garbage", "no choices", "half", "close", "400", "empty")
PASSING = FAULTS[:8]


class StandIn:
    """A server in threads of this process. `asked`: (path, body) of every question that came whole; `met`:
    the fault of each; `headers`: its headers."""

    def __init__(
        self,
        fault: Callable[[int], str | None] = lambda n: None,
        *,
        engine: str = "vllm",
        model: str = "m",
        answer: Callable[[str], tuple[str, list[int] | None]] = lambda said: (f"echo {said}", None),
        tokenize: Callable[[str], list[int]] | None = None,
        key: str | None = None,
        retry_after: str = "0",
        port: int = 0,
    ) -> None:
        self.fault, self.engine, self.model, self.answer = fault, engine, model, answer
        self.tokenize, self.key, self.retry_after, self.port = tokenize, key, retry_after, port
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.met: list[str | None] = []
        self.headers: list[dict[str, str]] = []
        self.raw: Callable[[str, dict[str, Any]], Iterable[bytes] | None] = lambda path, body: None
        """Everything that goes over the wire instead of an answer, in pieces."""
        self.greeted = self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()
        self._server: _Server | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._server = _Server(("127.0.0.1", self.port), type("Handler", (_Handler,), {"owner": self}))
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def kill(self) -> None:
        """Die: connections break off in the middle of whatever they carry, and new ones are refused."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        self._server.hang_up()

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def models(self) -> dict[str, Any]:
        self.greeted += 1
        return {"data": [{"id": self.model, "owned_by": self.engine}]}

    def reply(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The good answer to a question."""
        said = body["messages"][-1]["content"] if "messages" in body else str(body["prompt"])
        text, ids = self.answer(said)
        if path == "/completion":
            return {"content": text, "tokens": ids, "stop_type": "eos"}
        choice: dict[str, Any] = {"finish_reason": "stop"}
        choice |= (
            {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
        )
        choice |= {} if ids is None else {"token_ids": ids}
        return {"choices": [choice], "usage": {"completion_tokens": len(text.split())}}

    def enter(self, path: str, body: dict[str, Any]) -> str | None:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            fault = self.fault(len(self.asked))
            self.asked.append((path, body))
            self.met.append(fault)
            return fault

    def leave(self) -> None:
        with self._lock:
            self._at_once -= 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, *arguments: Any) -> None:
        self.open: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request: Any, address: Any) -> None:
        self.open.add(request)
        super().process_request(request, address)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, address: Any) -> None:
        pass  # a client that hung up is what the tests are about

    def hang_up(self) -> None:
        for connection in list(self.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Refusal(Exception):
    """A `reply` that is an error: its status and message."""

    def __init__(self, status: int, message: str) -> None:
        self.status, self.message = status, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Any

    def log_message(self, *words: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self._raw({}) or not self._let_in():
            return
        if self.path == "/v1/models":
            self._send(200, self.owner.models())
        else:
            self._send(404, {"error": {"message": "no such route"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self._raw(body) or not self._let_in():
            return
        if self.path == "/tokenize":
            if self.owner.tokenize is None:
                self._send(404, {"error": "no such route"})
            else:
                self._send(200, {"tokens": self.owner.tokenize(body["prompt"])})
            return
        self.owner.headers.append(dict(self.headers))
        fault = self.owner.enter(self.path, body)
        try:
            self._answer(fault, body)
        except Refusal as refusal:
            self._send(refusal.status, {"error": {"message": refusal.message}})
        finally:
            self.owner.leave()

    def _raw(self, body: dict[str, Any]) -> bool:
        pieces = self.owner.raw(self.path, body)
        for piece in pieces or ():
            self.wfile.write(piece)
        self.close_connection = pieces is not None
        return pieces is not None

    def _let_in(self) -> bool:
        given = self.headers["authorization"]
        allowed = self.owner.key is None or given == f"Bearer {self.owner.key}"
        if not allowed:
            self._send(401, {"error": {"message": f"wrong key: {given}"}})
        return allowed

    def _answer(self, fault: str | None, body: dict[str, Any]) -> None:
        if fault == "hang":
            time.sleep(HANG)
        if fault in ("close", "hang"):
            self.close_connection = True
        elif fault == "garbage":
            self._send(200, b"<html>gateway</html>")
        elif fault == "no choices":
            self._send(200, {"object": "text_completion"})
        elif fault == "half":
            whole = json.dumps(self.owner.reply(self.path, body)).encode()
            self._send(200, whole[: len(whole) // 2], claimed=len(whole))
            self.close_connection = True
        elif fault == "empty":
            good = self.owner.reply(self.path, body)
            for choice in good["choices"]:
                choice |= {"text": ""} if "text" in choice else {"message": {"content": None}}
            self._send(200, good)
        elif fault is not None:
            headers = {"Retry-After": self.owner.retry_after} if fault == "429" else {}
            self._send(int(fault), {"error": {"message": f"fault {fault}"}}, headers)
        else:
            self._send(200, self.owner.reply(self.path, body))

    def _send(
        self, status: int, body: Any, headers: dict[str, str] | None = None, claimed: int | None = None
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = {"Content-Type": "application/json", "Content-Length": claimed or len(data), **(headers or {})}
        lines = [f"HTTP/1.1 {status} said", *(f"{k}: {v}" for k, v in head.items()), "", ""]
        # In one piece: two writes would wait for each other's acknowledgement.
        self.wfile.write("\r\n".join(lines).encode() + data)
