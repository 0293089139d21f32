"""The two protocols spoken over HTTP: OpenAI's chat completions (and completions), and Anthropic's messages.

Bodies of requests and readings of replies; no connection is made here.
"""

import bisect
import json
import math
from dataclasses import dataclass
from typing import Any, Protocol

from saetool.llm.client import ASSISTANT, SYSTEM, CallFailed, Reply, Request

OPENAI, ANTHROPIC = "openai", "anthropic"
ANTHROPIC_VERSION = "2023-06-01"
N_LOGPROBS = 20
"""Likeliest tokens asked for at each place: the most that servers give by default."""


class Wire(Protocol):
    """One protocol."""

    kind: str
    base_url: str
    key_variable: str
    url_variable: str

    def path(self, request: Request) -> str: ...

    def headers(self, key: str | None) -> dict[str, str]: ...

    def body(self, model: str, request: Request, renamed: "Renamed") -> dict[str, Any]: ...

    def reply(self, request: Request, data: Any) -> Reply: ...


@dataclass
class Renamed:
    """Parameters that a server turned out not to take, as found on the way."""

    max_completion_tokens: bool = False
    """It wants this name instead of max_tokens (newer reasoning models)."""
    no_temperature: bool = False


def malformed(what: str) -> CallFailed:
    return CallFailed(f"malformed reply: {what}")


def parse_body(text: str) -> Any:
    """The JSON of a reply's body. The error holds the whole body, secrets and all."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise malformed(f"not JSON ({text})" if text.strip() else "an empty body") from None


class OpenAI:
    """Chat completions; places in a given text by completions with ``echo`` (vLLM and its like)."""

    kind = OPENAI
    base_url = "https://api.openai.com/v1"
    key_variable, url_variable = "OPENAI_API_KEY", "OPENAI_BASE_URL"

    def path(self, request: Request) -> str:
        return "/completions" if request.places else "/chat/completions"

    def headers(self, key: str | None) -> dict[str, str]:
        return {"Authorization": f"Bearer {key}"} if key else {}

    def body(self, model: str, request: Request, renamed: Renamed) -> dict[str, Any]:
        body: dict[str, Any] = {"model": model}
        if not renamed.no_temperature:
            body["temperature"] = request.temperature
        if request.places:
            # One more token is generated: not every server takes 0.
            return body | {"prompt": plain(request), "echo": True, "logprobs": N_LOGPROBS, "max_tokens": 1}
        limit = "max_completion_tokens" if renamed.max_completion_tokens else "max_tokens"
        body[limit] = request.max_output_tokens
        body["messages"] = [{"role": m.role, "content": m.content} for m in request.messages]
        return body

    def reply(self, request: Request, data: Any) -> Reply:
        try:
            choice = data["choices"][0]
            finish = str(choice.get("finish_reason") or "stop")
            usage = data.get("usage") or {}
            used = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
            if request.places:
                return Reply("", finish, *used, _echoed(request, choice))
            text = choice["message"].get("content") or ""
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise malformed(f"no choices[0].message.content ({type(error).__name__})") from None
        return Reply(_text(text), finish, *used)


class Anthropic:
    """Messages: the system text at the top, a limit on output always."""

    kind = ANTHROPIC
    base_url = "https://api.anthropic.com/v1"
    key_variable, url_variable = "ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL"

    def path(self, request: Request) -> str:
        return "/messages"

    def headers(self, key: str | None) -> dict[str, str]:
        return {"anthropic-version": ANTHROPIC_VERSION} | ({"x-api-key": key} if key else {})

    def body(self, model: str, request: Request, renamed: Renamed) -> dict[str, Any]:
        assert not request.places, "asked only of backends that can"
        system = "\n\n".join(m.content for m in request.messages if m.role == SYSTEM)
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": request.max_output_tokens,
            "messages": [{"role": m.role, "content": m.content} for m in request.messages if m.role != SYSTEM],
        }
        if system:
            body["system"] = system
        if not renamed.no_temperature:
            body["temperature"] = request.temperature
        return body

    def reply(self, request: Request, data: Any) -> Reply:
        try:
            text = "".join(part["text"] for part in data["content"] if part["type"] == "text")
            finish = {"end_turn": "stop", "max_tokens": "length"}.get(data["stop_reason"], str(data["stop_reason"]))
            usage = data.get("usage") or {}
            used = int(usage.get("input_tokens") or 0), int(usage.get("output_tokens") or 0)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise malformed(f"no content of type text ({type(error).__name__})") from None
        return Reply(text, finish, *used)


WIRES: dict[str, Wire] = {OPENAI: OpenAI(), ANTHROPIC: Anthropic()}


def plain(request: Request) -> str:
    """Messages and given text as one prompt, for servers without a chat template at that address."""
    names = {SYSTEM: "", ASSISTANT: "Assistant: "}
    parts = [names.get(m.role, "User: ") + m.content for m in request.messages]
    return "\n\n".join([*parts, f"Assistant: {request.given}"])


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):  # parts
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    raise malformed("the content is no text")


def _echoed(request: Request, choice: Any) -> tuple[tuple[float, ...], ...]:
    """Log-probabilities of the request's values at its places, from an echoed prompt.

    A value that is not among the likeliest tokens gets the smallest log-probability listed there; where none of the
    values is among them, nothing is known of any, and all get −inf.
    """
    prompt = plain(request)
    offset = len(prompt) - len(request.given)
    try:
        listed, starts = choice["logprobs"]["top_logprobs"], choice["logprobs"]["text_offset"]
        rows = []
        for place in request.places:
            at = bisect.bisect_left(starts, offset + place)
            if at >= len(starts) or starts[at] != offset + place:
                raise malformed("no token begins where a value was asked for")
            likely = {str(token): float(p) for token, p in (listed[at] or {}).items()}
            known = any(value in likely for value in request.values)
            least = min(likely.values()) if known else -math.inf
            rows.append(tuple(likely.get(value, least) for value in request.values))
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise malformed(f"no log-probabilities of the prompt ({type(error).__name__})") from None
    return tuple(rows)
