"""A backend that calls nobody: it answers each request with the request's own typical answer, and counts tokens.

A run on it makes exactly the calls of a real one, so that a dry run can say how many there will be, and what they cost.
"""

from typing import Any

from saetool.llm.client import PROMPT_LOGPROBS, Reply, Request
from saetool.llm.tokens import estimate, prompt_tokens


class Rehearsal:
    """Stands in for a client of the same kind and model; with --cache-only, as the name under which calls are kept."""

    def __init__(self, kind: str, model: str, extra_body: dict[str, Any] | None = None) -> None:
        self._kind, self._model = kind, model
        self._extra = dict(extra_body or {})

    @property
    def kind(self) -> str:
        return self._kind

    @property
    def model(self) -> str:
        return self._model

    @property
    def host(self) -> None:
        return None

    @property
    def options(self) -> dict[str, Any]:
        return {"extra_body": self._extra} if self._extra else {}

    async def probe(self) -> frozenset[str]:
        return frozenset({PROMPT_LOGPROBS})

    async def complete(self, request: Request) -> Reply:
        sent, n = prompt_tokens(request), len(request.values)
        if request.places:
            return Reply("", "stop", sent, 1, tuple(tuple(-1.0 - i for i in range(n)) for _ in request.places))
        return Reply(request.typical, "stop", sent, estimate(request.typical))

    async def close(self) -> None:
        """Nothing is open."""
