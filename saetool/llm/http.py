"""A model behind HTTP: one place that sends, waits, tries again and gives up.

Tried again: connections that fail, timeouts, 408, 409, 429, 5xx; after waiting as long as the server asks
(Retry-After, retry-after-ms), else a random time up to a limit that doubles. Long waits are told, and end when the run
is stopped. Everything else is final, and what would meet every other call too (a refused key, an unknown model, no
credit) ends the run at once.
"""

import asyncio
import email.utils
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from saetool.errors import BackendError
from saetool.llm.client import PROMPT_LOGPROBS, USER, CallFailed, Message, Reply, Request, Stopped, Unanswered
from saetool.llm.endpoint import Endpoint
from saetool.llm.tokens import prompt_tokens
from saetool.llm.wire import OPENAI, Renamed, Wire, parse_body

if TYPE_CHECKING:
    from httpx2 import Response

BACKOFF = 0.5
"""Seconds: the first wait is random up to this, each further one up to twice the one before."""
LONGEST_WAIT = 60.0
LONG_WAIT = 5.0
"""Seconds of a wait that people are told of."""
NOTICE = 0.2
"""Seconds within which a waiting call notices that the run is stopped."""
RETRIED = {408, 409, 429, 529}
_NO_CREDIT = ("quota", "credit", "billing", "insufficient")
"""Words of codes and types."""


@dataclass(frozen=True)
class Limits:
    """How hard a service may be pressed."""

    concurrency: int = 8
    """Calls under way at once."""
    timeout: float = 60.0
    """Seconds to wait for a connection, and for each piece of a reply."""
    max_retries: int = 6
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None


class _Pace:
    """Spreads calls so that neither limit per minute is passed."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._next = 0.0

    def delay(self, request: Request) -> float:
        """Seconds until ``request`` may be sent; its place is taken."""
        seconds = 60 / self._limits.requests_per_minute if self._limits.requests_per_minute else 0.0
        if self._limits.tokens_per_minute:
            seconds = max(seconds, 60 * prompt_tokens(request) / self._limits.tokens_per_minute)
        now = time.monotonic()
        start = max(now, self._next) if seconds else now
        self._next = start + seconds
        return start - now


class HTTPClient:
    """A model of a service that speaks one of ``wire.WIRES``.

    ``stopped`` is asked before each try and while waiting for one; ``tell`` is told of long waits.
    """

    def __init__(
        self,
        wire: Wire,
        endpoint: Endpoint,
        model: str,
        limits: Limits,
        extra_body: dict[str, Any] | None = None,
        *,
        stopped: Callable[[], bool] = lambda: False,
        tell: Callable[[str], object] = lambda text: None,
    ) -> None:
        import httpx2

        self.wire = wire
        self.endpoint = endpoint
        self.limits = limits
        self._model = model
        self._extra = dict(extra_body or {})
        self._errors = httpx2.TransportError
        self._unreachable = httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.UnsupportedProtocol
        self._http = httpx2.AsyncClient(
            timeout=httpx2.Timeout(limits.timeout, pool=None),
            limits=httpx2.Limits(max_connections=limits.concurrency, max_keepalive_connections=limits.concurrency),
            headers={"Content-Type": "application/json", **wire.headers(endpoint.key)},
        )
        self._gate = asyncio.Semaphore(limits.concurrency)
        self._pace = _Pace(limits)
        self._stopped, self._tell = stopped, tell
        self._told_until = 0.0
        """No wait that ends before is told of: another one that is longer was."""
        self._renamed = Renamed()
        self._random = random.Random()
        self._answered = False
        """Whether any reply ever came: before that, an address that refuses connections is a wrong one."""

    @property
    def kind(self) -> str:
        return self.wire.kind

    @property
    def model(self) -> str:
        return self._model

    @property
    def host(self) -> str:
        return self.endpoint.host

    @property
    def options(self) -> dict[str, Any]:
        return {"extra_body": self._extra} if self._extra else {}

    async def close(self) -> None:
        await self._http.aclose()

    async def probe(self) -> frozenset[str]:
        """Whether completions with ``echo`` give log-probabilities of the prompt here: one small call."""
        if self.kind != OPENAI:
            return frozenset()
        request = Request(
            (Message(USER, "Count."),), given="1 2 3", places=(2,), values=(" 2", "2"), max_output_tokens=1
        )
        try:
            await self.complete(request)
        except Unanswered:
            raise
        except CallFailed:
            return frozenset()
        return frozenset({PROMPT_LOGPROBS})

    async def complete(self, request: Request) -> Reply:
        async with self._gate:
            for attempt in range(self.limits.max_retries + 1):
                await self._pause(self._pace.delay(request))
                try:
                    response = await self._send(request)
                except self._errors as error:
                    why, wait = self._fault(error, attempt), None
                else:
                    self._answered = True
                    if response.is_success:
                        try:
                            return self.wire.reply(request, parse_body(response.text))
                        except CallFailed as error:  # a body cut off or mangled on its way: asked for again
                            why, wait = _short(self.endpoint.redact(error.message)), None
                    else:
                        why, wait = self._refusal(response, request), _asked_to_wait(response)
                if attempt < self.limits.max_retries:
                    await self._wait(why, self._backoff(attempt) if wait is None else min(wait, LONGEST_WAIT))
            raise Unanswered(f"{self.host}: {why} ({self.limits.max_retries + 1} tries)")

    async def _send(self, request: Request) -> "Response":
        """The response; parameters that are refused are renamed or left out, now and from now on."""
        while True:
            body = self._body(request)
            response = await self._http.post(self.endpoint.url(self.wire.path(request)), json=body)
            if response.status_code == 400:
                self._learn(response.text)
                # Of several calls under way another one may have found it out meanwhile.
                if self._body(request) != body:
                    continue
            return response

    def _body(self, request: Request) -> dict[str, Any]:
        return self.wire.body(self._model, request, self._renamed) | self._extra

    def _learn(self, said: str) -> None:
        """Rename or leave out from now on the parameter that a refusal is about, if it is about such a one."""
        if "max_tokens" in said and "max_completion_tokens" in said:
            self._renamed.max_completion_tokens = True
        elif "temperature" in said and not self._renamed.no_temperature:
            self._renamed.no_temperature = True
            self._tell(f"{self.host}: {self.model} refuses the temperature: its own is used")

    async def _wait(self, why: str, seconds: float) -> None:
        """Wait before the next try, and say so if it is long."""
        until = time.monotonic() + seconds
        if seconds >= LONG_WAIT and until > self._told_until:
            self._told_until = until + LONG_WAIT
            self._tell(f"{self.host}: {why}; next try in {seconds:.0f} s")
        await self._pause(seconds)

    async def _pause(self, seconds: float) -> None:
        """Wait; raises ``Stopped`` as soon as the run is."""
        until = time.monotonic() + seconds
        while True:
            if self._stopped():
                raise Stopped
            left = until - time.monotonic()
            if left <= 0:
                return
            await asyncio.sleep(min(left, NOTICE))

    def _backoff(self, attempt: int) -> float:
        return self._random.uniform(0, min(BACKOFF * 2**attempt, LONGEST_WAIT))

    def _fault(self, error: Exception, attempt: int) -> str:
        """What went wrong on the way; raises if nothing was ever reached there."""
        said = self.endpoint.redact(str(error)) or type(error).__name__
        if isinstance(error, self._unreachable) and not self._answered and attempt >= 1:
            raise BackendError(
                f"{self.host}: cannot be reached ({said})", f"check --base-url and {self.wire.url_variable}"
            ) from None
        name = "timeout" if "Timeout" in type(error).__name__ else type(error).__name__
        return name if said == type(error).__name__ else f"{name}: {said[:120]}"

    def _refusal(self, response: "Response", request: Request) -> str:
        """What a status means; returns only if trying again may help."""
        status, said = response.status_code, _short(self.endpoint.redact(_message(response)))
        where = f"{self.host}: {status}"
        variable = self.endpoint.key_variable
        if status == 402 or _no_credit(response):
            raise BackendError(
                f"{where}: no credit left ({said})", "nothing was scored; run again when there is credit"
            )
        if status in (401, 403):
            how = f"{variable} is not set" if self.endpoint.key is None else f"{variable} was refused"
            raise BackendError(f"{where}: {how} ({said})", f"export {variable}=… with a key that may use this model")
        if status == 404 and not request.places:  # a service may have chat completions alone
            raise BackendError(f"{where}: no model {self.model} there ({said})", "check --model and --base-url")
        if status in RETRIED or status >= 500:
            return f"{status} {said}"
        raise CallFailed(f"{where}: {said}")


def _asked_to_wait(response: "Response") -> float | None:
    """Seconds that the server asks to wait, if it does."""
    headers = response.headers
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        after = headers.get("retry-after")
        if after is None:
            return None
        if after.replace(".", "", 1).isdigit():
            return float(after)
        return max(0.0, email.utils.parsedate_to_datetime(after).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _error(response: "Response") -> dict[str, Any]:
    try:
        data = response.json()
    except ValueError:
        return {}
    found = data.get("error", data) if isinstance(data, dict) else {}
    return found if isinstance(found, dict) else {"message": str(found)}


def _message(response: "Response") -> str:
    return str(_error(response).get("message") or response.text or response.reason_phrase)


def _short(text: str) -> str:
    return text if len(text) <= 160 else text[:159] + "…"


def _no_credit(response: "Response") -> bool:
    """Whether a refusal is for want of credit.

    That of a rate is not: it may advertise a larger one, so that its words are no sign, only its code and type.
    """
    error = _error(response)
    named = f"{error.get('code')} {error.get('type')}".lower()
    if response.status_code == 429:
        return any(word in named for word in _NO_CREDIT)
    said = f"{named} {error.get('message')}".lower()
    return response.status_code in (400, 403) and any(word in said for word in ("credit", "billing", "quota"))
