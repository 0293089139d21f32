"""The calls of one ``saetool autointerp``: callers opened and closed, answers kept, usage told, limits obeyed."""

import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from saetool.artifacts import container
from saetool.artifacts import header as h
from saetool.commands.autointerp_backend import Backend, client
from saetool.commands.autointerp_job import Job
from saetool.console import Interruption
from saetool.errors import ArtifactError, BackendError
from saetool.options import resolve_device

if TYPE_CHECKING:
    from saetool.engines.calls import Budget, Caller, Usage
    from saetool.llm.client import Client
    from saetool.llm.store import CallStore


STOPPING = "stopping: calls under way are waited for, so that their answers are kept; once more stops at once"


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


@contextlib.asynccontextmanager
async def opened(job: Job, plan: h.Plan) -> AsyncIterator[Session]:
    """The callers of ``job``, which makes ``plan``. They are closed at the end; what they used goes to the log. A dry
    run calls nobody."""
    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(_store(job))
        log = stack.enter_context(_logging(None if job.dry_run else job.log, plan))
        interruption = None if job.dry_run else stack.enter_context(Interruption("" if job.console.quiet else STOPPING))
        session = await _session(job, kept, log, interruption)
        try:
            yield session
        finally:
            await session.close()
            log({"event": "usage", **usage_json(job.backend, session.usage)})


def _store(job: Job) -> "CallStore":
    """The kept calls: beside the output, unless said otherwise; a dry run and ``-o -`` keep them in memory."""
    from saetool.llm.store import CallStore

    path = job.backend.call_cache or (None if str(job.out) == "-" else job.out.with_suffix(".calls.sqlite"))
    if job.dry_run:
        path = None
    if path is not None and not path.parent.is_dir():
        raise ArtifactError(f"{path}: its folder does not exist", "make the folder first")
    if path is not None and job.backend.cache_only and not path.exists():
        raise ArtifactError(f"{path}: no such call cache, and --cache-only makes no call", "pass --call-cache FILE")
    return CallStore(path)


async def _session(
    job: Job, kept: "CallStore", log: Callable[[dict[str, Any]], object], interruption: Interruption | None
) -> Session:
    """Raises if the backend cannot answer in the way asked for."""
    from saetool.engines.calls import Caller, Usage
    from saetool.llm.rehearsal import Rehearsal

    backend = job.backend

    def stopped() -> bool:
        return interruption is not None and interruption.requested

    if job.dry_run:
        clients: list[Client] = [Rehearsal(backend.kind, backend.model or "embedded")]
    else:
        device = resolve_device(job.device)
        models = [backend.model] if backend.judge_model == backend.model else [backend.model, backend.judge_model]
        clients = [client(backend, model, device, stopped=stopped, tell=job.console.say) for model in models]
    usage = Usage()
    capabilities: frozenset[str] = frozenset()
    if backend.by_probability:
        try:
            capabilities = await _probed(clients[-1])
        except BaseException:
            for one in clients:
                await one.close()
            raise
    callers = [
        Caller(
            one,
            None if job.dry_run else kept,
            budget=None if job.dry_run else _budget(backend),
            usage=usage,
            only_kept=backend.cache_only,
            stopped=stopped,
            log=log,
        )
        for one in clients
    ]
    return Session(callers[0], callers[-1], usage, sorted(capabilities), interruption, clients)


async def _probed(client: "Client") -> frozenset[str]:
    """What ``client`` can do. Raises if it gives no log-probabilities of a prompt."""
    from saetool.llm.client import PROMPT_LOGPROBS, Stopped

    try:
        capabilities = await client.probe()
    except Stopped:
        raise KeyboardInterrupt from None
    if PROMPT_LOGPROBS not in capabilities:
        raise BackendError(
            f"--simulate logprob: {client.host} gives no log-probabilities of a prompt for {client.model}",
            "--backend local can, and OpenAI-compatible servers whose completions take echo (vLLM); "
            "or pass --simulate json",
        )
    return capabilities


@contextlib.contextmanager
def _logging(path: Path | None, plan: h.Plan) -> Iterator[Callable[[dict[str, Any]], None]]:
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


# --- what was used -----------------------------------------------------------------------------------------------


def _budget(backend: Backend) -> "Budget":
    from saetool.engines.calls import Budget

    return Budget(backend.max_calls, backend.max_cost, backend.price_in, backend.price_out)


def usage_json(backend: Backend, usage: "Usage") -> dict[str, Any]:
    """What a run used, for the log and for people."""
    return {
        "calls": usage.calls,
        "kept": usage.kept,
        "prompt_tokens": usage.sent,
        "output_tokens": usage.received,
        "cost": _budget(backend).price(usage.sent, usage.received) if backend.price_in or backend.price_out else None,
        "failures": dict(usage.failures),
    }


def show_plan(job: Job, shown: Mapping[str, Any], session: Session) -> None:
    """What a dry run says: ``shown``, and the calls it counted with their tokens and cost."""
    used = usage_json(job.backend, session.usage)
    named = ("calls", "prompt_tokens", "output_tokens", *(("cost",) if used["cost"] is not None else ()))
    model = {"model": f"{job.backend.kind} {session.explain.client.model}"}
    job.console.plan({**shown, **model, **{name: used[name] for name in named}})


def say_usage(job: Job, session: Session) -> None:
    used = usage_json(job.backend, session.usage)
    cost = "" if used["cost"] is None else f", cost {used['cost']:.4g}"
    failed = "".join(f", {n} {kind}" for kind, n in used["failures"].items())
    job.console.say(
        f"{used['calls']:,} calls ({used['kept']:,} answers were kept from before), "
        f"{used['prompt_tokens']:,} tokens sent, {used['output_tokens']:,} received{cost}{failed}"
    )


def stop(job: Job, session: Session | None, *, done: str, missing: str, kept: str) -> NoReturn:
    """Say why not all is done (``done`` so far, ``missing`` answers, what is ``kept``); ends with the exit code."""
    by = None if session is None else session.stopped_by
    if by == "interrupted":
        job.console.say(f"interrupted: {kept}; run the same command again to go on")
        raise typer.Exit(130)
    if by is not None:
        raise BackendError(
            f"stopped at {by}: {done}, {kept}",
            "answers so far are kept: run the same command with a larger limit to go on",
        )
    raise BackendError(
        f"too many answers are missing ({missing}), {kept}",
        "--log FILE tells why each call failed; --max-missing 1 accepts them as missing",
    )
