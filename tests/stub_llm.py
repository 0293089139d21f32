"""A language model service in this process that speaks the real protocols, and plays what a test writes for it.

    POST /v1/chat/completions, /v1/completions (echo, logprobs)     OpenAI and its like
    POST /v1/messages                                               Anthropic

``answer`` makes the text of a reply from the request's body; ``script`` goes first: faults, one a request.
"""

import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


@dataclass
class Fault:
    """What one request gets instead of an answer."""

    status: int = 200
    body: Any = None
    """JSON, or bytes sent as they are."""
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    reset: bool = False
    """The connection is reset without a reply."""
    cut: bool = False
    """Only half of the body is sent."""
    text: str | None = None
    """The reply's text, in the protocol's form."""
    finish: str = "stop"


def prompt_of(body: Body) -> str:
    """All that a request says, in one text."""
    if "prompt" in body:
        return body["prompt"]
    return "\n".join([str(body.get("system", "")), *(str(m["content"]) for m in body["messages"])])


def answer_all(body: Body) -> str:
    """A valid answer to any question: one description, silent windows, the first option."""
    prompt = prompt_of(body)
    if "numbers of the tokens that fire" in prompt:
        return json.dumps({n: {} for n in re.findall(r"^Excerpt (\d+): ", prompt, re.M)})
    if "maps each excerpt's number to a number" in prompt:
        return json.dumps(dict.fromkeys(re.findall(r"^Excerpt (\d+): ", prompt, re.M), 0))
    if '{"answer": NUMBER}' in prompt:
        return '{"answer": 1}'
    return '{"description": "words of a kind"}'


class Stub:
    """The running service."""

    def __init__(self) -> None:
        self.answer: Callable[[Body], str] = answer_all
        self.script: list[Fault] = []
        self.requests: list[tuple[str, dict[str, str], Body]] = []
        self.tokens: Callable[[str], int] = lambda text: len(text.split())
        self.delay = 0.0
        self.echo = False
        """Whether completions give log-probabilities of the prompt (vLLM does, OpenAI and llama.cpp do not)."""
        self.under_way = self.most_under_way = 0
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                stub._handle(self)

            def log_message(self, *_: object) -> None:
                """Silence."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_: object) -> None:
                """A client that went away is no concern of the service."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def prompts(self) -> list[str]:
        return [prompt_of(body) for _, _, body in self.requests]

    def _handle(self, http: BaseHTTPRequestHandler) -> None:
        body = json.loads(http.rfile.read(int(http.headers["Content-Length"])))
        with self._lock:
            self.requests.append((http.path, {k.lower(): v for k, v in http.headers.items()}, body))
            fault = self.script.pop(0) if self.script else None
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            time.sleep(self.delay if fault is None else fault.delay)
            if fault is not None and fault.reset:
                http.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                http.connection.close()
                http.close_connection = True
                return
            status, sent, headers = self._reply(http.path, body, fault)
        finally:
            with self._lock:
                self.under_way -= 1
        http.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            http.send_header(name, value)
        http.send_header("Content-Length", str(len(sent)))
        http.end_headers()
        http.wfile.write(sent[: len(sent) // 2] if fault is not None and fault.cut else sent)
        if fault is not None and fault.cut:
            http.close_connection = True

    def _reply(self, path: str, body: Body, fault: Fault | None) -> tuple[int, bytes, dict[str, str]]:
        if fault is not None and fault.text is None and (fault.status != 200 or fault.body is not None):
            sent = fault.body if isinstance(fault.body, bytes) else json.dumps(fault.body).encode()
            return fault.status, sent, fault.headers
        if path == "/v1/completions":
            return self._complete(body)
        text = fault.text if fault is not None and fault.text is not None else self.answer(body)
        finish = "stop" if fault is None else fault.finish
        used = self.tokens(prompt_of(body)), self.tokens(text)
        if path == "/v1/messages":
            assert "max_tokens" in body, "Anthropic demands it"
            assert all(m["role"] in ("user", "assistant") for m in body["messages"])
            data: Body = {
                "type": "message",
                "content": [{"type": "text", "text": text}],
                "stop_reason": {"stop": "end_turn", "length": "max_tokens"}[finish],
                "usage": {"input_tokens": used[0], "output_tokens": used[1]},
            }
        elif path == "/v1/chat/completions":
            data = {
                "object": "chat.completion",
                "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}],
                "usage": {"prompt_tokens": used[0], "completion_tokens": used[1]},
            }
        else:
            return 404, b'{"error": {"message": "no such address"}}', {}
        return 200, json.dumps(data).encode(), {}

    def _complete(self, body: Body) -> tuple[int, bytes, dict[str, str]]:
        if not self.echo:
            return 400, b'{"error": {"message": "echo is not supported"}}', {}
        # One character is one token; after a tab or a quotation mark the likelihood of a digit grows with it.
        prompt = body["prompt"]
        top: list[Body | None] = [None]
        for before in prompt:
            top.append({str(d): -9.0 + d for d in range(10)} if before in '\t"' else {"x": -0.1})
        logprobs = {"tokens": [*prompt, "!"], "text_offset": list(range(len(prompt) + 1)), "top_logprobs": top}
        used = {"prompt_tokens": len(prompt), "completion_tokens": 1}
        choice = {"text": prompt + "!", "logprobs": logprobs, "finish_reason": "length"}
        return 200, json.dumps({"choices": [choice], "usage": used}).encode(), {}


@contextmanager
def serving() -> Iterator[Stub]:
    stub = Stub()
    try:
        yield stub
    finally:
        stub.close()
