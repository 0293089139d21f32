import asyncio
import dataclasses
import sqlite3
from pathlib import Path

import pytest

from saetool.engines.calls import BACKEND, UNPARSABLE, Budget, Caller, Missing, Stopped, each
from saetool.errors import ArtifactError, BackendError
from saetool.llm.client import USER, CallFailed, Message, Reply, Request, call_key
from saetool.llm.rehearsal import Rehearsal
from saetool.llm.replies import Unreadable
from saetool.llm.store import CallStore


class Scripted(Rehearsal):
    """Answers with the texts it was given, in turn; an exception is raised."""

    def __init__(self, *answers: str | Exception) -> None:
        super().__init__("openai", "m")
        self.answers = list(answers)
        self.asked: list[Request] = []

    async def complete(self, request: Request) -> Reply:
        self.asked.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return Reply(answer, "stop", 1_000_000, 500_000)


def ask(text: str = "q", **options: object) -> Request:
    return dataclasses.replace(Request((Message(USER, text),)), **options)


def read(reply: Reply) -> str:
    if reply.text == "bad":
        raise Unreadable("it is bad")
    return reply.text


def run(caller: Caller, *requests: Request) -> list[str]:
    async def go() -> list[str]:
        return [await caller.ask(r, read) for r in requests]

    return asyncio.run(go())


def test_what_was_asked_is_not_asked_again_by_any_run(tmp_path: Path) -> None:
    for expected in (1, 0):
        with CallStore(tmp_path / "calls.sqlite") as store:
            client = Scripted("a")
            caller = Caller(client, store)
            assert run(caller, ask(), ask()) == ["a", "a"]
            assert len(client.asked) == caller.usage.calls == expected
            assert caller.usage.kept == 2 - expected


@pytest.mark.parametrize(
    "other",
    [
        {"temperature": 0.5},
        {"sample": 1},
        {"max_output_tokens": 9},
        {"start": "{"},
        {"end": "}"},
        {"places": (0,), "given": "x"},
    ],
)
def test_a_question_that_differs_at_all_is_another_question(other: dict[str, object]) -> None:
    with CallStore(None) as store:
        client = Scripted("a", "b")
        run(Caller(client, store), ask(), ask(**other))
        assert len(client.asked) == 2
        assert store.get(call_key(client, ask(typical="not part of it"))) is not None


def test_an_unusable_answer_is_asked_for_once_more_with_the_reason() -> None:
    with CallStore(None) as store:
        client = Scripted("bad", "good")
        assert run(Caller(client, store), ask()) == ["good"]
        said = client.asked[1].messages
        assert [m.role for m in said] == ["user", "assistant", "user"]
        assert said[1].content == "bad"
        assert "it is bad" in said[2].content
        assert run(Caller(Scripted(), store), ask()) == ["good"], "both answers are kept"


def test_failures_are_counted_and_told_and_never_kept() -> None:
    told: list[dict] = []
    with CallStore(None) as store:
        client = Scripted("bad", "bad", CallFailed("broken"), "fine")
        caller = Caller(client, store, log=told.append)
        for request, kind in ((ask("1"), UNPARSABLE), (ask("2"), BACKEND)):
            with pytest.raises(Missing, match=kind):
                run(caller, request)
        assert run(caller, ask("2")) == ["fine"]
    assert caller.usage.failures == {UNPARSABLE: 1, BACKEND: 1}
    assert [t["why"] for t in told] == ["it is bad", "broken"]


def test_a_backend_that_fails_every_call_is_given_up() -> None:
    with CallStore(None) as store:
        caller = Caller(Scripted(*[CallFailed("down")] * 9), store)
        for i in range(4):
            with pytest.raises(Missing):
                run(caller, ask(str(i)))
        with pytest.raises(BackendError, match="5 calls failed one after the other, at last: down"):
            run(caller, ask("x"))


def test_budgets_stop_before_they_are_passed() -> None:
    with CallStore(None) as store:
        caller = Caller(Scripted("a", "b"), store, budget=Budget(calls=2))
        with pytest.raises(Stopped):
            run(caller, ask("1"), ask("2"), ask("1"), ask("3"))
        assert caller.out_of_budget == "--max-calls 2"
        # One call is 1 + 0.5 million tokens: 1·2 + 0.5·4 = 4.
        budget = Budget(cost=9.0, price_in=2.0, price_out=4.0)
        caller = Caller(Scripted("a", "b", "c"), store, budget=budget)
        with pytest.raises(Stopped):
            run(caller, *(ask(str(i), max_output_tokens=500_000) for i in range(10, 14)))
        assert caller.usage.calls == 2
        assert budget.price(caller.usage.sent, caller.usage.received) == 8.0


def test_what_a_service_does_not_count_is_estimated(tmp_path: Path) -> None:
    class Silent(Scripted):
        async def complete(self, request: Request) -> Reply:
            self.asked.append(request)
            return Reply("word " * 1000, "stop", 0, 0)

    with CallStore(None) as store:
        caller = Caller(Silent(), store, budget=Budget(cost=4000e-6, price_in=0.0, price_out=1.0))
        with pytest.raises(Stopped):
            run(caller, *(ask(str(i), max_output_tokens=1000) for i in range(10)))
        assert len(caller.client.asked) in (3, 4)
        assert caller.usage.sent > 0


def test_kept_answers_alone_can_be_asked_for() -> None:
    with CallStore(None) as store:
        run(Caller(Scripted("a"), store), ask())
        caller = Caller(Scripted(), store, only_kept=True)
        assert run(caller, ask()) == ["a"]
        with pytest.raises(BackendError, match="--cache-only"):
            run(caller, ask("other"))


def test_files_that_are_no_call_cache_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.sqlite"
    path.write_bytes(b"something else" * 100)
    with pytest.raises(ArtifactError, match="not usable as a call cache"):
        CallStore(path)
    path.unlink()
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE mine (x)")
    with pytest.raises(ArtifactError, match="something else"):
        CallStore(path)
    with pytest.raises(ArtifactError):
        CallStore(tmp_path)


def test_many_are_worked_on_at_a_time_and_come_back_in_order() -> None:
    under_way = most = 0

    async def work(i: int) -> int:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.001 * (10 - i % 10))
        under_way -= 1
        return i * i

    assert asyncio.run(each(range(30), work, 4)) == [i * i for i in range(30)]
    assert most == 4


def test_the_first_error_ends_all_work() -> None:
    begun = []

    async def work(i: int) -> None:
        begun.append(i)
        await asyncio.sleep(0)
        if i == 5:
            raise BackendError("gone")

    with pytest.raises(BackendError, match="gone"):
        asyncio.run(each(range(1000), work, 3))
    assert len(begun) < 20


class Virtual(asyncio.SelectorEventLoop):
    """A loop whose clock jumps to the next thing that is due."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:
            self.now = max(self.now, self._scheduled[0]._when)
        super()._run_once()


class Slow(Rehearsal):
    """Answers after 50 ms, to so many at once as are allowed."""

    def __init__(self, concurrency: int) -> None:
        super().__init__("openai", "m")
        self.gate = asyncio.Semaphore(concurrency)
        self.calls = 0

    async def complete(self, request: Request) -> Reply:
        async with self.gate:
            self.calls += 1
            await asyncio.sleep(0.05)
            return Reply("ok", "stop", 1, 1)


@pytest.mark.parametrize("width", [16, 4])
def test_calls_keep_all_places_taken(width: int, tmp_path: Path) -> None:
    """3,000 calls in batches of five, as of windows, take about as long as in a perfect schedule."""

    async def work(caller: Caller, latent: int) -> None:
        await asyncio.gather(*(caller.ask(ask(f"{latent} {i}"), read) for i in range(5)))

    async def go() -> tuple[int, float]:
        client, loop = Slow(16), asyncio.get_running_loop()
        with CallStore(tmp_path / f"{width}.sqlite") as store:
            caller = Caller(client, store)
            begin = loop.time()
            await each(range(600), lambda latent: work(caller, latent), width)
            return client.calls, loop.time() - begin

    with asyncio.Runner(loop_factory=Virtual) as runner:
        calls, seconds = runner.run(go())
    assert calls == 3000
    ideal = 3000 * 0.05 / 16
    assert ideal <= seconds <= 1.15 * ideal
