"""The language model of ``saetool autointerp``: its options checked, its client made, its calls kept and counted."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saetool.artifacts import container
from saetool.artifacts import header as h
from saetool.config import BackendConfig
from saetool.console import Console, Interruption
from saetool.errors import ArtifactError, BackendError, ConfigError

if TYPE_CHECKING:
    from saetool.engines.calls import Budget, Caller, Usage
    from saetool.llm.client import Client
    from saetool.llm.store import CallStore

OFFLINE, OPENAI, ANTHROPIC, LOCAL = BACKENDS = "offline", "openai", "anthropic", "local"
JSON, LOGPROB = MODES = "json", "logprob"


@dataclass(frozen=True)
class Backend:
    """The options that say which model is asked, and how."""

    kind: str
    model: str | None
    scorer_model: str | None
    mode: str
    """json or logprob: where predictions are read from."""
    base_url: str | None = None
    extra_body: dict[str, Any] = field(default_factory=dict)
    concurrency: int = BackendConfig.concurrency
    rpm: float | None = None
    tpm: float | None = None
    timeout: float = BackendConfig.timeout
    max_retries: int = BackendConfig.max_retries
    max_calls: int | None = None
    max_cost: float | None = None
    price_in: float = BackendConfig.price_in
    price_out: float = BackendConfig.price_out
    call_cache: Path | None = None
    cache_only: bool = False
    allow_http: bool = False

    @property
    def offline(self) -> bool:
        return self.kind == OFFLINE

    @property
    def by_probability(self) -> bool:
        return self.mode == LOGPROB

    @property
    def judge_model(self) -> str | None:
        return self.scorer_model or self.model

    @property
    def width(self) -> int:
        """Latents (or questions) under way at once."""
        return 1 if self.kind == LOCAL else self.concurrency

    def options(self) -> dict[str, Any]:
        """The options that change the result."""
        if self.offline:
            return {"backend": OFFLINE}
        return {
            "backend": self.kind,
            "model": self.model or "embedded",
            "scorer_model": self.judge_model or "embedded",
            "simulate": self.mode,
            "extra_body": json.dumps(self.extra_body, sort_keys=True),
        }


def check(backend: Backend) -> None:
    """Raise ``ConfigError`` for options that cannot work. No connection is made."""
    if backend.kind not in BACKENDS:
        raise ConfigError(f"--backend {backend.kind}: unknown", f"one of {', '.join(BACKENDS)}")
    if backend.mode not in MODES:
        raise ConfigError(f"--simulate {backend.mode}: unknown", f"one of {', '.join(MODES)}")
    if backend.kind in (OPENAI, ANTHROPIC) and not backend.model:
        raise ConfigError(f"--backend {backend.kind}: needs a model", "pass --model NAME")
    if backend.kind == ANTHROPIC and backend.by_probability:
        raise ConfigError(
            "--simulate logprob: Anthropic's service gives no log-probabilities of a prompt",
            "--backend local can, and OpenAI-compatible servers whose completions take echo (vLLM); or --simulate json",
        )
    for name in ("concurrency", "timeout", "rpm", "tpm", "max_calls"):
        value = getattr(backend, name)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be positive")
    for name in ("max_retries", "price_in", "price_out", "max_cost"):
        value = getattr(backend, name)
        if value is not None and value < 0:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must not be negative")
    if backend.max_cost is not None and not (backend.price_in or backend.price_out):
        raise ConfigError("--max-cost: needs prices", "pass --price-in and --price-out, per million tokens")


def parse_extra_body(text: str | None) -> dict[str, Any]:
    """``--extra-body`` as a JSON object."""
    try:
        found = json.loads(text) if text else {}
    except ValueError as error:
        raise ConfigError(f"--extra-body: not JSON ({error})", "example: '{\"seed\": 1}'") from None
    if not isinstance(found, dict):
        raise ConfigError("--extra-body: a JSON object was expected", "example: '{\"seed\": 1}'")
    return found


def check_environment(backend: Backend) -> None:
    """Raise if the backend could not be called from here: address, key. Nothing is sent."""
    if backend.kind in (OPENAI, ANTHROPIC) and not backend.cache_only:
        from saetool.llm.endpoint import endpoint
        from saetool.llm.wire import WIRES

        endpoint(WIRES[backend.kind], backend.base_url, allow_http=backend.allow_http)


def client(backend: Backend, model: str | None, device: str) -> "Client":
    """The client for ``model``; loads it where it is local."""
    if backend.cache_only and backend.kind != LOCAL:
        from saetool.llm.rehearsal import Rehearsal

        return Rehearsal(backend.kind, str(model), backend.extra_body)
    if backend.kind == LOCAL:
        from saetool.engines.model import load_model
        from saetool.llm.local import LocalClient

        lm = load_model(model, device=device, dtype="float32")
        if not hasattr(lm.model, "generate") or lm.model.get_output_embeddings() is None:
            raise BackendError(f"{lm.reference['id']}: is no causal language model")
        return LocalClient(lm.model, lm.tokenizer, lm.reference["id"], lm.reference["revision"])
    from saetool.llm.endpoint import endpoint
    from saetool.llm.http import HTTPClient, Limits
    from saetool.llm.wire import WIRES

    wire = WIRES[backend.kind]
    limits = Limits(backend.concurrency, backend.timeout, backend.max_retries, backend.rpm, backend.tpm)
    there = endpoint(wire, backend.base_url, allow_http=backend.allow_http)
    return HTTPClient(wire, there, str(model), limits, backend.extra_body)


@dataclass
class Session:
    """The callers of one run, and what they used."""

    explain: "Caller"
    judge: "Caller"
    usage: "Usage"
    capabilities: list[str]
    interruption: Interruption | None
    _clients: "list[Client]"

    @property
    def stopped_by(self) -> str | None:
        """The limit that stopped the run, ``interrupted``, or None."""
        if self.interruption is not None and self.interruption.requested:
            return "interrupted"
        return self.explain.out_of_budget or self.judge.out_of_budget

    def record(self) -> dict[str, Any]:
        """For the artifact's header: which models, where; no key, no path."""
        explain, judge = self.explain.client, self.judge.client
        return {
            "kind": explain.kind,
            "model": explain.model,
            "scorer_model": judge.model,
            "host": explain.host,
            "capabilities": self.capabilities,
        }

    async def close(self) -> None:
        for one in self._clients:
            await one.close()


def store(backend: Backend, out: Path, dry_run: bool) -> "CallStore":
    """The kept calls: beside the output, unless said otherwise; a dry run and ``-o -`` keep them in memory."""
    from saetool.llm.store import CallStore

    path = backend.call_cache or (None if str(out) == "-" else out.with_suffix(".calls.sqlite"))
    if dry_run:
        path = None
    if path is not None and not path.parent.is_dir():
        raise ArtifactError(f"{path}: its folder does not exist", "make the folder first")
    return CallStore(path)


async def session(
    backend: Backend,
    kept: "CallStore",
    device: str,
    *,
    rehearse: bool,
    log: Callable[[dict[str, Any]], object],
    advance: Callable[[], object],
    interruption: Interruption | None,
) -> Session:
    """Open the callers. Raises if the backend cannot answer in the way asked for."""
    from saetool.engines.calls import Caller, Usage
    from saetool.llm.client import PROMPT_LOGPROBS
    from saetool.llm.rehearsal import Rehearsal

    if rehearse:
        clients: list[Client] = [Rehearsal(backend.kind, backend.model or "embedded")]
    else:
        clients = [client(backend, backend.model, device)]
        if backend.judge_model != backend.model:
            clients.append(client(backend, backend.judge_model, device))
    usage = Usage()
    capabilities: frozenset[str] = frozenset()
    if backend.by_probability:
        capabilities = await clients[-1].probe()
        if PROMPT_LOGPROBS not in capabilities:
            for one in clients:
                await one.close()
            raise BackendError(
                f"--simulate logprob: {clients[-1].host} gives no log-probabilities of a prompt "
                f"for {clients[-1].model}",
                "--backend local can, and OpenAI-compatible servers whose completions take echo (vLLM); "
                "or pass --simulate json",
            )
    callers = [
        Caller(
            one,
            None if rehearse else kept,
            budget=None if rehearse else budget(backend),
            usage=usage,
            only_kept=backend.cache_only,
            stopped=lambda: interruption is not None and interruption.requested,
            log=log,
            advance=advance,
        )
        for one in clients
    ]
    return Session(callers[0], callers[-1], usage, sorted(capabilities), interruption, clients)


def budget(backend: Backend) -> "Budget":
    from saetool.engines.calls import Budget

    return Budget(backend.max_calls, backend.max_cost, backend.price_in, backend.price_out)


def usage_json(backend: Backend, usage: "Usage") -> dict[str, Any]:
    """What a run used, for the log and for people."""
    return {
        "calls": usage.calls,
        "kept": usage.kept,
        "prompt_tokens": usage.sent,
        "output_tokens": usage.received,
        "cost": budget(backend).price(usage.sent, usage.received) if backend.price_in or backend.price_out else None,
        "failures": dict(usage.failures),
    }


def say_usage(console: Console, backend: Backend, usage: "Usage") -> None:
    used = usage_json(backend, usage)
    cost = "" if used["cost"] is None else f", cost {used['cost']:.4g}"
    failed = "".join(f", {n} {kind}" for kind, n in used["failures"].items())
    console.say(
        f"{used['calls']:,} calls ({used['kept']:,} answers were kept from before), "
        f"{used['prompt_tokens']:,} tokens sent, {used['output_tokens']:,} received{cost}{failed}"
    )


@contextlib.contextmanager
def logging(path: Path | None, plan: h.Plan) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Appends records with a time to the log at ``path``, after a header that says what is made; or does nothing."""
    if path is None:
        yield lambda record: None
        return
    try:
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise ArtifactError(f"--log {path}: cannot be written ({error.strerror})") from None
    with file:
        header = h.Plan("autointerp", h.RUN_LOG, {"key": plan.key}, plan.inputs).header()
        file.write(h.canonical({"event": "session", container.METADATA_KEY: header.to_json()}) + "\n")

        def write(record: dict[str, Any]) -> None:
            file.write(json.dumps({"time": time.time(), **record}, ensure_ascii=False) + "\n")
            file.flush()

        yield write
