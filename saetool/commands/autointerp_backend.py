"""The language model of ``saetool autointerp``: its options checked, its client made."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saetool.config import BackendConfig
from saetool.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from saetool.llm.client import Client

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
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be positive")
    for name in ("max_retries", "price_in", "price_out", "max_cost"):
        value = getattr(backend, name)
        if value is not None and not 0 <= value < math.inf:
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


def client(
    backend: Backend,
    model: str | None,
    device: str,
    *,
    stopped: Callable[[], bool] = lambda: False,
    tell: Callable[[str], object] = lambda text: None,
) -> "Client":
    """The client for ``model``; loads it where it is local. ``stopped`` and ``tell`` as ``HTTPClient`` wants them."""
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
    return HTTPClient(wire, there, str(model), limits, backend.extra_body, stopped=stopped, tell=tell)
