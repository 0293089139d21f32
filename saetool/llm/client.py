"""What every backend offers: one call, from messages to a reply.

A call either answers in text, or, on a backend that can, gives the log-probabilities of some continuations at given
places of a text that is *given*, not written (``Request.places``): one pass over the text answers all places at once.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Protocol

from saetool.errors import SaetoolError

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
PROMPT_LOGPROBS = "prompt_logprobs"
"""Capability: log-probabilities inside a given text."""


@dataclass(frozen=True)
class Message:
    role: str
    """system, user or assistant."""
    content: str


@dataclass(frozen=True)
class Request:
    """One call."""

    messages: tuple[Message, ...]
    max_output_tokens: int = 256
    temperature: float = 0.0
    sample: int = 0
    """Number among calls that ask the same: the candidates of one explanation."""
    start: str = ""
    """How the answer begins; a backend that can writes on from there (others leave it to the instructions)."""
    end: str = ""
    """With ``start``: how the answer ends; what follows the first character of it is not wanted."""
    given: str = ""
    """With ``places``: the whole of the answer's text."""
    places: tuple[int, ...] = ()
    """Characters of ``given`` at which one of ``values`` could begin."""
    values: tuple[str, ...] = ()
    """Continuations whose log-probability is asked for; they differ in their first token."""
    typical: str = ""
    """An answer of the usual form and length: what a dry run counts with. Not sent."""

    def to_json(self) -> dict[str, Any]:
        """All that the answer depends on."""
        out: dict[str, Any] = {
            "messages": [[m.role, m.content] for m in self.messages],
            "max_output_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "sample": self.sample,
            "start": self.start,
            "end": self.end,
        }
        if self.places:
            out |= {"given": self.given, "places": list(self.places), "values": list(self.values)}
        return out


@dataclass(frozen=True)
class Reply:
    """What came back."""

    text: str
    finish: str
    """stop, length (cut off by the limit on output), or the service's own word."""
    prompt_tokens: int
    output_tokens: int
    logprobs: tuple[tuple[float, ...], ...] = ()
    """For each of the request's places, of each of its values; −inf for all of them where they are not known."""

    def to_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "finish": self.finish,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "logprobs": [list(row) for row in self.logprobs],
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Reply":
        return Reply(**{**data, "logprobs": tuple(tuple(row) for row in data["logprobs"])})


class CallFailed(SaetoolError):
    """One call failed for good; another one may work. ``message`` says why, without any key."""


class Unanswered(CallFailed):
    """All tries of a call failed, each in a way that passes: that the service was never asked says nothing of it."""


class Stopped(Exception):
    """No further calls are to be made: interrupted, or the budget is spent."""


class Client(Protocol):
    """A backend with its model chosen."""

    @property
    def kind(self) -> str:
        """openai, anthropic or local."""
        ...

    @property
    def model(self) -> str: ...

    @property
    def host(self) -> str | None:
        """Where calls go, without user, password, path or query; None: nowhere."""
        ...

    @property
    def options(self) -> dict[str, Any]:
        """What else the answers depend on, besides model and request."""
        ...

    async def probe(self) -> frozenset[str]:
        """What it can do besides answering in text: a subset of {``PROMPT_LOGPROBS``}."""
        ...

    async def complete(self, request: Request) -> Reply:
        """The answer. Raises ``CallFailed`` if this call failed, ``BackendError`` if all others would too, ``Stopped``
        if the run was stopped while it waited to try again."""
        ...

    async def close(self) -> None: ...


def call_key(client: Client, request: Request) -> str:
    """SHA-256 of all that the answer depends on: equal key, equal question."""
    asked = {"v": 1, "kind": client.kind, "model": client.model, "options": client.options, **request.to_json()}
    text = json.dumps(asked, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
