"""The HTTP client against a service that speaks the real protocols."""

import asyncio
import email.utils
import json
import math
import time
from collections.abc import Callable

import pytest
from stub_llm import Fault, Stub, serving

from saetool.errors import BackendError, ConfigError
from saetool.llm import http
from saetool.llm.client import PROMPT_LOGPROBS, SYSTEM, USER, CallFailed, Message, Reply, Request, Stopped
from saetool.llm.endpoint import endpoint
from saetool.llm.http import HTTPClient, Limits
from saetool.llm.wire import WIRES

KEY = "sk-canary-1234567890"
ASKED = Request((Message(SYSTEM, "Be brief."), Message(USER, "Hello")), max_output_tokens=50, temperature=0.5)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http, "BACKOFF", 0.001)
    with serving() as running:
        running.answer = lambda body: "hi"
        yield running


async def _call(
    stub: Stub,
    kind: str,
    requests: list[Request],
    limits: Limits,
    extra: dict | None,
    tell: Callable[[str], object] = print,
) -> list[Reply]:
    there = endpoint(WIRES[kind], stub.url, allow_http=False, environment={WIRES[kind].key_variable: KEY})
    client = HTTPClient(WIRES[kind], there, "m", limits, extra, tell=tell)
    try:
        return list(await asyncio.gather(*(client.complete(r) for r in requests)))
    finally:
        await client.close()


def call(
    stub: Stub, *requests: Request, kind: str = "openai", extra: dict | None = None, **limits: float
) -> list[Reply]:
    return asyncio.run(_call(stub, kind, list(requests or (ASKED,)), Limits(**limits), extra))


def test_chat_completions_are_asked_as_openai_wants_them(stub: Stub) -> None:
    (reply,) = call(stub, extra={"seed": 7})
    assert (reply.text, reply.finish, reply.prompt_tokens, reply.output_tokens) == ("hi", "stop", 3, 1)
    path, headers, body = stub.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["authorization"] == f"Bearer {KEY}"
    assert body == {
        "model": "m",
        "max_tokens": 50,
        "temperature": 0.5,
        "seed": 7,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
    }


def test_messages_are_asked_as_anthropic_wants_them(stub: Stub) -> None:
    (reply,) = call(stub, kind="anthropic")
    assert reply.text == "hi"
    path, headers, body = stub.requests[0]
    assert path == "/v1/messages"
    assert headers["x-api-key"] == KEY
    assert headers["anthropic-version"] == "2023-06-01"
    assert body["system"] == "Be brief."
    assert body["messages"] == [{"role": "user", "content": "Hello"}]
    assert "authorization" not in headers


@pytest.mark.parametrize(
    "faults",
    [
        [Fault(429, {"error": {"message": "slow down"}}, {"Retry-After": "0"})],
        [Fault(429, {"error": {"message": "slow down"}}, {"retry-after-ms": "1"})],
        [Fault(500, {"error": {"message": "oops"}})] * 3,
        [Fault(529, {"error": {"message": "overloaded"}})],
        [Fault(503, b"")],
        [Fault(reset=True)],
        [Fault(cut=True, text="half")],
        [Fault(body=b"<html>busy</html>")],
        [Fault(body={"choices": []})],
    ],
    ids=["retry-after", "retry-after-ms", "500", "529", "503", "reset", "cut", "no json", "no choices"],
)
def test_passing_faults_are_tried_again(stub: Stub, faults: list[Fault]) -> None:
    stub.script = list(faults)
    (reply,) = call(stub)
    assert reply.text == "hi"
    assert len(stub.requests) == len(faults) + 1


def test_a_slow_answer_is_a_timeout_and_is_tried_again(stub: Stub) -> None:
    stub.script = [Fault(delay=3.0, text="late")]
    start = time.monotonic()
    (reply,) = call(stub, timeout=0.2)
    assert reply.text == "hi"
    assert time.monotonic() - start < 2.5


def test_as_long_is_waited_as_the_server_asks(stub: Stub) -> None:
    stub.script = [Fault(429, {"error": {}}, {"Retry-After": "0.4"})]
    start = time.monotonic()
    call(stub)
    assert time.monotonic() - start >= 0.4
    date = email.utils.formatdate(time.time() + 100, usegmt=True)

    class Response:
        headers = {"retry-after": date}  # noqa: RUF012 (never changed)

    assert 95 < (http._asked_to_wait(Response()) or 0) <= 100


def test_tries_end_and_the_last_reason_is_told(stub: Stub) -> None:
    stub.script = [Fault(500, {"error": {"message": f"oops {KEY}"}})] * 9
    with pytest.raises(CallFailed, match=r"500 oops \[hidden\] \(3 tries\)"):
        call(stub, max_retries=2)
    assert len(stub.requests) == 3


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}), "401: OPENAI_API_KEY was refused"),
        (Fault(403, {"error": {"message": "no"}}), "403"),
        (Fault(404, {"error": {"message": "no such model"}}), "no model m there"),
        (Fault(429, {"error": {"code": "insufficient_quota", "message": "x"}}), "no credit left"),
        (Fault(402, {"error": {"message": "pay"}}), "no credit left"),
        (Fault(400, {"error": {"message": "Your credit balance is too low"}}), "no credit left"),
    ],
)
def test_what_would_meet_every_call_ends_the_run_at_once(stub: Stub, fault: Fault, words: str) -> None:
    stub.script = [fault] * 5
    with pytest.raises(BackendError) as caught:
        call(stub)
    assert words in caught.value.message
    assert KEY not in caught.value.message + str(caught.value.hint)
    assert len(stub.requests) == 1


def test_other_refusals_are_of_this_call_alone(stub: Stub) -> None:
    stub.script = [Fault(400, {"error": {"message": "too long"}})]
    with pytest.raises(CallFailed, match="400: too long"):
        call(stub)
    assert len(stub.requests) == 1


def newer(stub: Stub) -> None:
    """Makes the service refuse what newer reasoning models refuse."""
    plain = stub._reply

    def reply(path: str, body: dict, fault: Fault | None) -> tuple[int, bytes, dict[str, str]]:
        for name, said in (
            ("max_tokens", "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
            ("temperature", "Unsupported value: 'temperature' does not support 0.5"),
        ):
            if name in body:
                return 400, json.dumps({"error": {"message": said}}).encode(), {}
        return plain(path, body, fault)

    stub._reply = reply


@pytest.mark.parametrize(("n", "max_retries"), [(1, 0), (8, 6)])
def test_parameters_that_a_model_does_not_take_are_renamed_or_left_out(stub: Stub, n: int, max_retries: int) -> None:
    newer(stub)
    stub.delay = 0.05  # all are under way before the first is refused
    told: list[str] = []
    requests = [Request((Message(USER, str(i)),), 50, 0.5) for i in range(n)]
    replies = asyncio.run(_call(stub, "openai", requests, Limits(max_retries=max_retries), None, told.append))
    assert [r.text for r in replies] == ["hi"] * n
    assert len(stub.requests) <= 3 * n
    assert told == [f"{stub.url[7:-3]}: m refuses the temperature: its own is used"]
    last = stub.requests[-1][2]
    assert last["max_completion_tokens"] == 50
    assert "max_tokens" not in last
    assert "temperature" not in last


def test_a_parameter_that_is_always_sent_is_not_sent_for_ever(stub: Stub) -> None:
    stub.script = [Fault(400, {"error": {"message": "max_tokens, max_completion_tokens, temperature: all wrong"}})] * 99
    with pytest.raises(CallFailed, match="400: max_tokens"):
        call(stub, kind="anthropic", extra={"temperature": 1})
    assert len(stub.requests) <= 3


def test_a_limit_of_rate_is_no_want_of_credit_whatever_it_advertises(stub: Stub) -> None:
    said = "Rate limit reached. Need more tokens? See https://example.com/settings/billing for a larger quota"
    stub.script = [Fault(429, {"error": {"message": said, "type": "tokens", "code": "rate_limit_exceeded"}})]
    assert call(stub)[0].text == "hi"


def test_waits_end_when_the_run_is_stopped_and_long_ones_are_told(stub: Stub) -> None:
    stub.script = [Fault(429, {"error": {"message": f"busy {KEY}"}}, {"Retry-After": "30"})] * 99
    told: list[str] = []

    async def go() -> list[object]:
        begin = time.monotonic()
        there = endpoint(WIRES["openai"], stub.url, allow_http=False, environment={"OPENAI_API_KEY": KEY})
        stopped = lambda: time.monotonic() > begin + 0.3  # noqa: E731
        client = HTTPClient(WIRES["openai"], there, "m", Limits(), stopped=stopped, tell=told.append)
        try:
            calls = [client.complete(Request((Message(USER, str(i)),))) for i in range(4)]
            return await asyncio.gather(*calls, return_exceptions=True)
        finally:
            await client.close()

    start = time.monotonic()
    assert [type(r) for r in asyncio.run(go())] == [Stopped] * 4
    assert time.monotonic() - start < 2
    assert len(stub.requests) == 4
    (line,) = told
    assert line.endswith(": 429 busy [hidden]; next try in 30 s")


def test_bodies_that_hold_the_key_do_not_give_it_away(stub: Stub) -> None:
    stub.script = [Fault(body=f"<html>{'x' * 70} Authorization: Bearer {KEY}</html>".encode())] * 9
    with pytest.raises(CallFailed) as caught:
        call(stub, max_retries=0)
    assert KEY[:12] not in caught.value.message
    assert "not JSON (<html>" in caught.value.message
    assert len(caught.value.message) < 250
    stub.script = [Fault(500, {"error": {"message": "x" * 150 + KEY}})]
    with pytest.raises(CallFailed) as caught:
        call(stub, max_retries=0)
    assert KEY[:5] not in caught.value.message


def test_no_more_calls_are_under_way_than_allowed(stub: Stub) -> None:
    stub.delay = 0.05
    requests = [Request((Message(USER, str(i)),)) for i in range(40)]
    call(stub, *requests, concurrency=8)
    assert stub.most_under_way == 8


def test_calls_keep_to_the_rate_asked_for(stub: Stub) -> None:
    requests = [Request((Message(USER, str(i)),)) for i in range(5)]
    start = time.monotonic()
    call(stub, *requests, requests_per_minute=1200)
    assert time.monotonic() - start >= 4 * 0.05
    start = time.monotonic()
    call(stub, *requests, tokens_per_minute=60 * 9 / 0.05)  # nine tokens a request
    assert time.monotonic() - start >= 3 * 0.05


def test_an_address_that_nobody_answers_is_named_soon() -> None:
    with serving() as gone:
        pass
    with pytest.raises(BackendError, match="cannot be reached"):
        call(gone)


def test_log_probabilities_of_a_prompt_come_from_servers_that_echo_it(stub: Stub) -> None:
    async def probe() -> frozenset[str]:
        there = endpoint(WIRES["openai"], stub.url, allow_http=False, environment={})
        client = HTTPClient(WIRES["openai"], there, "m", Limits())
        try:
            return await client.probe()
        finally:
            await client.close()

    assert asyncio.run(probe()) == frozenset()
    stub.script = [Fault(500, {"error": {"message": "down"}})] * 7
    with pytest.raises(CallFailed, match="500 down"):  # it was not answered: that says nothing of what it can
        asyncio.run(probe())
    stub.echo = True
    assert asyncio.run(probe()) == {PROMPT_LOGPROBS}
    request = Request(ASKED.messages, given="a\tunknown\nb\tunknown\n", places=(2, 12), values=("0", "9", "q"))
    (reply,) = call(stub, request)
    assert reply.logprobs == ((-9.0, 0.0, -9.0), (-9.0, 0.0, -9.0)), "what is not listed is as unlikely as the last"
    assert stub.requests[-1][0] == "/v1/completions"
    nothing_known = Request(ASKED.messages, given="ab", places=(0, 1), values=("0", "9"))
    (reply,) = call(stub, nothing_known)
    assert reply.logprobs == ((-math.inf,) * 2,) * 2


# --- endpoints -------------------------------------------------------------------------------------------------


def test_addresses_are_checked_before_anything_is_sent() -> None:
    wire = WIRES["openai"]
    for bad in ("ftp://x/v1", "x", "http://", "http://[::1"):
        with pytest.raises(ConfigError, match="--base-url"):
            endpoint(wire, bad, allow_http=False, environment={})
    with pytest.raises(ConfigError, match="in the clear"):
        endpoint(wire, "http://example.com/v1", allow_http=False, environment={})
    assert endpoint(wire, "http://example.com/v1", allow_http=True, environment={}).host == "example.com"
    for local in ("http://localhost:11434/v1", "http://127.0.0.1:1/v1", "http://[::1]:8000"):
        assert endpoint(wire, local, allow_http=False, environment={}).key is None
    with pytest.raises(BackendError, match="OPENAI_API_KEY is not set"):
        endpoint(wire, None, allow_http=False, environment={})
    with pytest.raises(BackendError, match="no key has"):
        endpoint(wire, None, allow_http=False, environment={"OPENAI_API_KEY": "a\nb"})


def test_no_secret_of_an_address_is_shown() -> None:
    there = endpoint(
        WIRES["openai"],
        "https://me:hunter22@example.com:8443/v1?token=abcdefghijkl",
        allow_http=False,
        environment={"OPENAI_API_KEY": KEY},
    )
    assert there.host == "example.com:8443"
    assert there.url("/x") == "https://me:hunter22@example.com:8443/v1/x?token=abcdefghijkl"
    said = there.redact(f"{KEY} hunter22 abcdefghijkl") + repr(there)
    for secret in (KEY, "hunter22", "abcdefghijkl"):
        assert secret not in said
