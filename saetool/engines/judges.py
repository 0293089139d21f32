"""Who predicts from an explanation: its table of tokens, or a language model that reads it.

Both give the same things: strengths of every token (simulation), and how sure it is that a window holds an activation
(detection) or that marked tokens are active (fuzzing). A window that was not answered is missing, never zero.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float, Int

from saetool.core import ngram
from saetool.engines import prompts
from saetool.engines.calls import Caller, Missing
from saetool.engines.windows import Windows
from saetool.errors import BackendError, ConfigError
from saetool.llm.client import Request

PER_CALL = 5
"""Windows shown at once."""


@dataclass(frozen=True)
class Explanation:
    """What is said of a latent."""

    description: str
    table: ngram.Table | None = None
    """Where the description is a table's."""


@dataclass(frozen=True)
class Strengths:
    """Predicted strengths, 0 … 10, of the tokens of some windows."""

    values: Float[np.ndarray, "n w"]
    valid: Bool[np.ndarray, " n"]
    """Which windows were answered."""


@dataclass(frozen=True)
class Certainties:
    """How sure a judge is, 0 … 10, of each of some windows."""

    values: Float[np.ndarray, " n"]
    valid: Bool[np.ndarray, " n"]


class Judge(Protocol):
    async def strengths(self, explanation: Explanation, windows: Windows) -> Strengths: ...

    async def certainties(
        self, explanation: Explanation, windows: Windows, marked: Bool[np.ndarray, "n w"] | None
    ) -> Certainties:
        """That the latent fires in each window; with ``marked``, that the marked tokens are those it fires on."""
        ...

    async def odd_one(self, windows: Windows) -> int:
        """Which of the windows does not belong. Raises ``Missing``."""
        ...


class TableJudge:
    """The table alone: certainty is the largest strength in the window, or the mean strength of the marked tokens.

    ``words``: which tokens are the same word (``ngram.alike``).
    """

    def __init__(self, words: Int[np.ndarray, " V"] | None = None) -> None:
        self._words = words

    async def strengths(self, explanation: Explanation, windows: Windows) -> Strengths:
        assert explanation.table is not None
        predicted = ngram.predict(explanation.table, windows.tokens, windows.lengths, self._words)
        return Strengths(predicted, np.ones(len(predicted), dtype=bool))

    async def certainties(
        self, explanation: Explanation, windows: Windows, marked: Bool[np.ndarray, "n w"] | None
    ) -> Certainties:
        predicted = (await self.strengths(explanation, windows)).values
        if marked is None:
            values = predicted.max(axis=1, initial=0)
        else:
            values = (predicted * marked).sum(axis=1) / np.maximum(marked.sum(axis=1), 1)
        return Certainties(values.astype(np.float64), np.ones(len(values), dtype=bool))

    async def odd_one(self, windows: Windows) -> int:
        raise ConfigError("--scorer intruder: a table of tokens cannot judge it", "pass --backend")


class ModelJudge:
    """A language model that reads the description. ``by_probability``: answers are read from probabilities."""

    def __init__(self, caller: Caller, string: Callable[[int], str], *, by_probability: bool, limit: int) -> None:
        self._caller = caller
        self._string = string
        self._by_probability = by_probability
        self._limit = limit

    async def strengths(self, explanation: Explanation, windows: Windows) -> Strengths:
        shown = prompts.excerpts(windows, 1.0, self._string)
        values = np.zeros(windows.tokens.shape, dtype=np.float32)
        valid = np.zeros(len(shown), dtype=bool)

        async def together(rows: Sequence[int]) -> None:
            mine = [shown[i] for i in rows]
            request = prompts.simulate(explanation.description, mine, self._limit)
            for i, found in zip(rows, await self._caller.ask(request, prompts.read_strengths(mine)), strict=True):
                values[i, : len(found)] = found
                valid[i] = True

        async def alone(rows: Sequence[int]) -> None:
            (i,) = rows
            request = prompts.simulate_all_at_once(explanation.description, shown[i])
            found = await self._caller.ask(request, prompts.expected)
            values[i, : len(found)] = found
            valid[i] = True

        if self._by_probability:
            await self._all(alone, len(shown), 1)
        else:
            await self._all(together, len(shown), PER_CALL)
        return Strengths(values, valid)

    async def certainties(
        self, explanation: Explanation, windows: Windows, marked: Bool[np.ndarray, "n w"] | None
    ) -> Certainties:
        shown = prompts.excerpts(windows, 1.0, self._string)
        marks = None if marked is None else prompts.marks_for([e.text for e in shown])
        texts = [
            e.text
            if marked is None or marks is None
            else prompts.marked(e.tokens, marked[i].tolist()[: len(e.tokens)], marks)
            for i, e in enumerate(shown)
        ]
        values, valid = np.zeros(len(shown)), np.zeros(len(shown), dtype=bool)

        async def ask(rows: Sequence[int]) -> None:
            request = prompts.judge(explanation.description, [texts[i] for i in rows], marks, self._limit)
            if self._by_probability:
                found = (await self._caller.ask(prompts.judge_by_probability(request), prompts.expected)).tolist()
            else:
                found = await self._caller.ask(request, prompts.read_certainties(len(rows)))
            values[list(rows)], valid[list(rows)] = found, True

        await self._all(ask, len(shown), 1 if self._by_probability else PER_CALL)
        return Certainties(values, valid)

    async def odd_one(self, windows: Windows) -> int:
        shown = prompts.excerpts(windows, 1.0, self._string)
        return await self.choose(prompts.odd_one_out([e.text for e in shown], self._limit), len(shown))

    async def choose(self, request: Request, n: int) -> int:
        """Which of ``n`` options. Raises ``Missing``."""
        if self._by_probability:
            request = prompts.choosing_by_probability(request, n)
        return await self._caller.ask(request, prompts.read_answer(n))

    async def _all(self, ask: Callable[[Sequence[int]], object], n: int, size: int) -> None:
        """``ask`` about all rows in groups of ``size``; groups without an answer are left out."""
        groups = [range(i, min(i + size, n)) for i in range(0, n, size)]
        results = await asyncio.gather(*(ask(g) for g in groups), return_exceptions=True)  # type: ignore[call-overload]
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, Missing):
                raise result


def check_values(by_probability: bool, n_options: int) -> None:
    """Raise if an answer by probabilities would need more values than there are digits."""
    if by_probability and n_options > 9:
        raise BackendError(f"--n-options {n_options}: at most 9 where answers are read from probabilities")
