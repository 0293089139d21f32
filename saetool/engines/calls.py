"""Calls of a run: asked once, kept, counted, within a budget; and many at a time."""

import asyncio
import collections
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from saetool.errors import BackendError
from saetool.llm.client import ASSISTANT, USER, CallFailed, Client, Message, Reply, Request, Stopped, call_key
from saetool.llm.replies import Unreadable
from saetool.llm.store import CallStore
from saetool.llm.tokens import estimate, prompt_tokens

T = TypeVar("T")
R = TypeVar("R")
FAILURES_IN_A_ROW = 5
"""Calls that fail for good, one after the other, before the backend is given up."""
BACKEND, UNPARSABLE = "backend", "unparsable"


class Missing(Exception):
    """A question without an answer; the text is ``BACKEND`` or ``UNPARSABLE``."""


@dataclass(frozen=True)
class Budget:
    """What a run may use; None: no limit."""

    calls: int | None = None
    cost: float | None = None
    price_in: float = 0.0
    """Per million tokens sent."""
    price_out: float = 0.0
    """Per million tokens received."""

    def price(self, sent: int, received: int) -> float:
        return (sent * self.price_in + received * self.price_out) / 1e6


@dataclass
class Usage:
    """What a run used so far."""

    calls: int = 0
    """Made, those that failed included."""
    kept: int = 0
    """Answers that were there already."""
    sent: int = 0
    """Tokens of prompts, as the backend counts them; estimated where it does not."""
    received: int = 0
    failures: collections.Counter[str] = field(default_factory=collections.Counter)


class Caller:
    """Asks ``client`` what ``store`` does not know yet (None: nothing is kept).

    ``stopped`` is asked before each call; ``log`` is told of each failure.
    """

    def __init__(
        self,
        client: Client,
        store: CallStore | None,
        *,
        budget: Budget | None = None,
        usage: Usage | None = None,
        only_kept: bool = False,
        stopped: Callable[[], bool] = lambda: False,
        log: Callable[[dict[str, Any]], object] = lambda record: None,
    ) -> None:
        self.client = client
        self.usage = Usage() if usage is None else usage
        self._store = store
        self._budget = budget or Budget()
        self._only_kept = only_kept
        self._stopped = stopped
        self._log = log
        self._reserved = 0.0
        self._failures_in_a_row = 0
        self.out_of_budget: str | None = None
        """Which limit stopped the run, if one did."""

    async def ask(self, request: Request, read: Callable[[Reply], T]) -> T:
        """What ``read`` makes of the answer; if it cannot, of a second one, asked for with the reason.

        Raises ``Missing`` if there is no usable answer, ``Stopped`` if no call may be made.
        """
        try:
            reply = await self._reply(request)
            try:
                return read(reply)
            except Unreadable as error:
                if request.places:
                    raise Missing(UNPARSABLE) from None
                again = await self._reply(_repair(request, reply, error))
            try:
                return read(again)
            except Unreadable as error:
                self._failed(UNPARSABLE, str(error))
                raise Missing(UNPARSABLE) from None
        except CallFailed:
            raise Missing(BACKEND) from None

    def _failed(self, kind: str, why: str) -> None:
        self.usage.failures[kind] += 1
        self._log({"event": "failed", "kind": kind, "why": why, "model": self.client.model})

    async def _reply(self, request: Request) -> Reply:
        key = "" if self._store is None else call_key(self.client, request)
        kept = None if self._store is None else self._store.get(key)
        if kept is not None:
            self.usage.kept += 1
            return kept
        if self._only_kept:
            raise BackendError(
                "--cache-only: an answer is not in the call cache", "leave --cache-only out to ask for it"
            )
        reserve = 0.0  # counting tokens takes longer than all else here
        if self._budget.cost is not None:
            reserve = self._budget.price(prompt_tokens(request), request.max_output_tokens)
        self._check_budget(reserve)
        self.usage.calls += 1
        self._reserved += reserve
        try:
            reply = await self.client.complete(request)
        except CallFailed as error:
            self._failed(BACKEND, error.message)
            self._failures_in_a_row += 1
            if self._failures_in_a_row >= FAILURES_IN_A_ROW:
                raise BackendError(
                    f"{FAILURES_IN_A_ROW} calls failed one after the other, at last: {error.message}",
                    "what was answered is kept: run the same command again to go on",
                ) from None
            raise
        finally:
            self._reserved -= reserve
        self._failures_in_a_row = 0
        self.usage.sent += reply.prompt_tokens or prompt_tokens(request)
        self.usage.received += reply.output_tokens or estimate(reply.text)
        if self._store is not None:
            self._store.put(key, self.client, request, reply)
        return reply

    def _check_budget(self, reserve: float) -> None:
        budget, usage = self._budget, self.usage
        if self._stopped() or self.out_of_budget:
            raise Stopped
        if budget.calls is not None and usage.calls >= budget.calls:
            self.out_of_budget = f"--max-calls {budget.calls}"
        elif (
            budget.cost is not None
            and budget.price(usage.sent, usage.received) + self._reserved + reserve > budget.cost
        ):
            self.out_of_budget = f"--max-cost {budget.cost:g}"
        if self.out_of_budget:
            raise Stopped


def _repair(request: Request, reply: Reply, error: Unreadable) -> Request:
    """The same question with the answer that could not be used, and why."""
    said = Message(ASSISTANT, reply.text or "(nothing)")
    why = Message(USER, f"That could not be used: {error}. Reply again, with the JSON object alone.")
    return replace(request, messages=(*request.messages, said, why))


async def each(items: Iterable[T], work: Callable[[T], Awaitable[R]], width: int) -> list[R]:
    """``work`` of every item, ``width`` at a time, results in order; the first error ends all."""
    numbered = enumerate(items)
    out: dict[int, R] = {}

    async def worker() -> None:
        for i, item in numbered:
            out[i] = await work(item)

    workers = [asyncio.ensure_future(worker()) for _ in range(width)]
    try:
        await asyncio.gather(*workers)
    finally:
        for one in workers:
            one.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return [out[i] for i in range(len(out))]
