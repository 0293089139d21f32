"""Meta-latents labelled by a language model, and the paper's multiple choice judged by one.

A meta-latent's label is made from the descriptions, and some words of context, of its strongest members. In a question
of the multiple choice it is made without the latents that are options there: most labels need no second call for that.
"""

import asyncio
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from saetool.core import scoring
from saetool.engines import prompts
from saetool.engines.calls import Caller, Missing, Stopped, each
from saetool.engines.choice import N_MEMBERS, Questions, Tables, strongest_members
from saetool.engines.judges import ModelJudge
from saetool.engines.windows import Windows
from saetool.llm.client import Request

N_CONTEXTS = 3
"""Contexts shown per member."""
BEFORE, AFTER = 2, 1
"""Tokens shown around the token with the largest activation, as in the paper's public app."""
STOPPED = "stopped"


@dataclass(frozen=True)
class Answered:
    """What the model chose in each question."""

    answers: scoring.Answers
    """Points 0 where there is no answer."""
    valid: Bool[np.ndarray, " q"]


@dataclass(frozen=True)
class Judged:
    """Labels and answers by a language model."""

    labels: list[tuple[str | None, str | None]]
    """Label, or why there is none, of each meta-latent asked for."""
    valid: Bool[np.ndarray, " q"]
    """Which questions were answered."""
    control_valid: Bool[np.ndarray, " q"]
    floor: float | None
    """Accuracy of the tables on the answered questions."""


class MetaLabels:
    """Labels of meta-latents, each made when first asked for. ``members``: (description, contexts) of latents."""

    def __init__(
        self,
        z: Float[np.ndarray, "n_parent n_meta"],
        tables: Tables,
        members: Mapping[int, tuple[str, Sequence[str]]],
        caller: Caller,
        n_options: int,
        limit: int,
        temperature: float,
    ) -> None:
        self._z = z
        self._best = strongest_members(z, tables.labelled, N_MEMBERS + n_options)
        self._members = members
        self._caller = caller
        self._limit, self._temperature = limit, temperature
        self._made: dict[tuple[int, tuple[int, ...]], asyncio.Task[str]] = {}

    async def label(self, latent: int, without: Sequence[int] = ()) -> str | None:
        """The label, or None for a meta-latent without labelled members. Raises ``Missing``, ``Stopped``."""
        mine = tuple(int(m) for m in self._best[latent] if m >= 0 and m not in without)[:N_MEMBERS]
        if not mine:
            return None
        if (latent, mine) not in self._made:
            shown = [(float(self._z[m, latent]), *self._members[m]) for m in mine]
            request = prompts.explain_meta(shown, self._limit, self._temperature)
            made = asyncio.ensure_future(self._caller.ask(request, prompts.read_description))
            # Whoever waits for it may have been cancelled by another error: then nobody else looks at this one.
            made.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._made[latent, mine] = made
        return await asyncio.shield(self._made[latent, mine])

    async def question(self, latent: int, options: Sequence[int]) -> Request:
        """Which of ``options`` has the meta-latents of ``latent``, labelled without the options?"""
        weights = self._z[latent]
        active = sorted(np.flatnonzero(weights > 0).tolist(), key=lambda m: -weights[m])
        parts = [(float(weights[m]), await self.label(m, options)) for m in active]
        named = [(weight, label) for weight, label in parts if label is not None]
        return prompts.which_latent(named, [self._members[o][0] for o in options], self._limit)


async def judge_all(
    labels: MetaLabels,
    latents: Sequence[int],
    questions: Questions,
    judge: ModelJudge,
    width: int,
    advance: Callable[[], object],
) -> tuple[Questions, Judged]:
    """Label meta-latents ``latents``, and put every question, then its control, to the model; ``width`` at a time.

    ``advance`` is told of each question that is through.
    """
    made = await label_all(labels, latents, width)
    own = await answer(questions, questions.latent, labels, judge, width, advance)
    control = await answer(questions, questions.control_latent, labels, judge, width, advance)
    points = questions.answers.points[own.valid]
    floor = float(np.mean(points)) if len(points) else None
    return with_answers(questions, own, control), Judged(made, own.valid, control.valid, floor)


async def label_all(labels: MetaLabels, latents: Sequence[int], width: int) -> list[tuple[str | None, str | None]]:
    """(label, why there is none) of each of ``latents``."""

    async def one(latent: int) -> tuple[str | None, str | None]:
        try:
            return await labels.label(latent), None
        except Missing as missing:
            return None, str(missing)
        except Stopped:
            return None, STOPPED

    return await each(latents, one, width)


async def answer(
    questions: Questions,
    source: Int[np.ndarray, " q"],
    labels: MetaLabels,
    judge: ModelJudge,
    width: int,
    advance: Callable[[], object],
) -> Answered:
    """Put the questions to the model, with the meta-latents of latents ``source`` (−1: no question).

    ``advance`` is told of each question that is through.
    """
    n_options = questions.options.shape[1]

    async def one(i: int) -> int:
        latent, options = int(source[i]), questions.options[i].tolist()
        if latent < 0:
            return -1
        try:
            return await judge.choose(await labels.question(latent, options), n_options)
        except (Missing, Stopped):
            return -1
        finally:
            advance()

    chosen = np.array(await each(range(len(questions.latent)), one, width), dtype=np.int64)
    return Answered(scoring.Answers((chosen == questions.right).astype(np.float64), chosen), chosen >= 0)


def contexts(windows: Windows, string: Callable[[int], str]) -> list[str]:
    """A few words around the largest activations of a latent's explaining windows."""
    shown = windows.pick(windows.explaining)
    peaks = shown.acts.max(axis=1, initial=0)
    out = []
    for i in np.argsort(-peaks, kind="stable")[:N_CONTEXTS]:
        if peaks[i] <= 0:
            break
        at = int(shown.acts[i].argmax())
        around = shown.tokens[i, max(0, at - BEFORE) : min(int(shown.lengths[i]), at + AFTER + 1)]
        out.append("".join(string(int(t)) for t in around))
    return out


def with_answers(questions: Questions, answers: Answered, control: Answered) -> Questions:
    """The questions as the model answered them."""
    return dataclasses.replace(questions, answers=answers.answers, control=control.answers)
