"""``saetool autointerp`` of an SAE: windows, explanations, scores, files."""

import asyncio
import collections
import contextlib
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from saetool.artifacts import container
from saetool.artifacts import header as h
from saetool.artifacts.cache import open_cache
from saetool.commands import autointerp_backend as backends
from saetool.commands import autointerp_given as given_files
from saetool.commands.autointerp_job import GIVEN, LLM, SPLITS, Job, Wanted
from saetool.commands.checks import check_site
from saetool.console import Console, Interruption
from saetool.errors import ArtifactError, BackendError, ConfigError
from saetool.options import resolve_device

if TYPE_CHECKING:
    from saetool.engines.activations import Activations
    from saetool.engines.autointerp import Explained
    from saetool.engines.explanations import Strings
    from saetool.engines.scores import Scored

SAMPLING = (
    *("on", "window", "split", "skip_positions", "negatives", "min_firing", "max_density"),
    *("n_top", "n_random", "n_quantile", "score_top", "score_random", "score_quantile"),
)
"""Fields of the configuration that say which windows are drawn."""
SCORING = ("granularity", "control", "max_missing")
MODEL = ("candidates", "temperature", "max_output_tokens")


@dataclass(frozen=True)
class Source:
    """The activations to explain, and what is written of them."""

    activations: "Activations"
    strings: "Strings"
    input: h.Input
    headers: list[h.Header]
    model: dict[str, Any]
    name: str


def run(job: Job, acts: Path) -> None:
    """Explain and score the latents of an SAE."""
    given = None if job.explanations is None else given_files.read(job.explanations, job.file.sae.d_sae)
    source = _source(job, acts)
    if given is not None and job.wanted == Wanted():
        job = dataclasses.replace(job, wanted=Wanted(ids=tuple(sorted(given))))
    plan = _plan(job, source)
    windows_plan = dataclasses.replace(plan, schema=h.WINDOWS)
    if not job.backend.offline:
        backends.check_environment(job.backend)
    if job.dry_run and job.backend.offline:
        job.console.plan(_shown(job, source))
        return
    if not job.dry_run and job.up_to_date(plan, windows_plan):
        return
    found = _windows(job, source, resolve_device(job.device))
    if given is not None:
        found = _given(job, found, given, source.strings)
    asyncio.run(_rest(job, plan, source, found))


# --- inputs ----------------------------------------------------------------------------------------------------


def _source(job: Job, acts: Path) -> Source:
    from saetool.artifacts import delphi
    from saetool.engines.activations import Encoded, Stored
    from saetool.engines.explanations import Strings

    file, config = job.file, job.config
    if delphi.is_delphi(acts):
        if config.on != "all":
            raise ConfigError(
                f"--on {config.on}: {acts} holds delphi's latents, which have no splits", "leave --on out"
            )
        if job.tokenizer is None:
            raise ConfigError(f"{acts}: delphi's latents come without the tokens' text", "pass --tokenizer MODEL")
        latents = delphi.open_delphi(acts)
        _check_window(config.window, latents.tokens.shape[1], "delphi's contexts")
        from saetool.engines.model import find_model, load_tokenizer, vocabulary

        strings = Strings(vocabulary(load_tokenizer(find_model(job.tokenizer))), f"the tokenizer of {job.tokenizer}")
        stored = Stored(latents, file.sae.d_sae)
        return Source(stored, strings, latents.as_input(), [file.header], file.header.model, str(acts))
    if job.tokenizer is not None:
        raise ConfigError("--tokenizer: a cache has its tokens' text", "it is for latents as delphi stores them")
    cache = open_cache(acts)
    check_site(file, cache, job.console)
    splits = [s for s in SPLITS[config.on] if cache.rows(s)]
    if not splits:
        raise ArtifactError(f"{cache.path}: has no rows in {config.on}", "cache more text, or use another --on")
    _check_window(config.window, int(cache.header.config["ctx_len"]), "the cache's contexts")
    activations = Encoded(file.sae, cache, splits, resolve_device(job.device))
    # Missing or damaged: better said now than after the work.
    strings = Strings(cache.vocabulary, str(cache.path / "vocabulary.json"))
    return Source(
        activations, strings, cache.as_input(), [file.header, cache.header], cache.header.model, cache.path.name
    )


def _check_window(window: int, longest: int, whose: str) -> None:
    if window > longest:
        raise ConfigError(f"--window {window}: longer than {whose} of {longest} tokens")


def _plan(job: Job, source: Source) -> h.Plan:
    config = job.config
    names = (*SAMPLING, *SCORING, "table_size", "seed", *(() if job.backend.offline else MODEL))
    options = {
        "explainer": job.explainer,
        "scorer": ",".join(job.scorers),
        "latents": str(job.wanted),
        **{name: getattr(config, name) for name in names},
        **job.backend.options(),
    }
    if "intruder" in job.scorers:
        options["n_options"] = config.n_options
    inputs = [job.file.as_input("sae"), source.input]
    if job.explanations is not None:
        inputs.append(h.Input("explanations", job.explanations.name, h.sha256_file(job.explanations), "descriptions"))
    return h.Plan("autointerp", h.EXPLANATIONS, options, inputs, source.headers)


def _shown(job: Job, source: Source) -> dict[str, Any]:
    config = job.config
    drawn = {"explaining": [config.n_top, config.n_quantile, config.n_random]}
    drawn |= {"scoring": [config.score_top, config.score_quantile, config.score_random]}
    return {
        "sae": job.file.name,
        "latents": str(job.wanted),
        "rows": source.activations.n_rows,
        "windows": f"{config.window} tokens, top + quantile + random a latent: {drawn}",
        "outputs": [str(job.out), str(job.windows_path), *([str(job.export_path)] if job.export_path else [])],
    }


# --- windows ---------------------------------------------------------------------------------------------------


def _windows(job: Job, source: Source, device: str) -> "list[Explained]":
    """Windows and tables of the latents asked for."""
    from saetool.engines import autointerp as engine

    console, sae, config, wanted = job.console, job.file.sae, job.config, job.wanted
    rows = source.activations.n_rows
    with console.progress("firings", rows, "tokens") as advance:
        counts = source.activations.counts(wanted.ids, advance)
    alive = int((counts > 0).sum())
    if wanted.ids is not None:
        latents = list(wanted.ids)
    elif wanted.number is not None:
        latents = engine.choose(counts, wanted.number, config.seed)
        counts = counts[latents]
        if alive < wanted.number:
            console.say(f"only {alive} of {sae.d_sae} latents fire on these {rows:,} rows: all of them are taken")
    else:
        latents = list(range(sae.d_sae))
    near = None
    if config.negatives == "neighbours":
        near = engine.neighbours(sae.W_dec, latents, engine.N_NEIGHBOURS)
    total = rows * engine.n_passes(latents, counts, rows, config, near is not None)
    with console.progress("windows", total, "tokens") as advance:
        found = list(engine.explain(source.activations, latents, counts, config, advance, near))
    reasons = collections.Counter(e.reason for e in found if e.reason)
    if len(found) == sum(reasons.values()):
        said = ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items())) or f"all {sae.d_sae} dead"
        raise ArtifactError(
            f"{job.file.name}: no latent could be explained on {rows:,} rows ({said})",
            "cache more text, or change --latents, --min-firing, --max-density",
        )
    return found


def _given(
    job: Job, found: "list[Explained]", given: dict[int, dict[str, Any]], strings: "Strings"
) -> "list[Explained]":
    """The latents with the descriptions that are given."""
    assert job.explanations is not None
    missing = [e.latent for e in found if e.reason is None and e.latent not in given]
    if missing:
        raise ConfigError(
            f"{job.explanations}: has no description of latent {missing[0]} ({len(missing)} missing)",
            "leave --latents out: the latents described are scored",
        )
    offline = job.backend.offline
    return [
        e
        if e.reason
        else dataclasses.replace(
            e,
            explanation=given_files.explanation(e.latent, given[e.latent], strings, job.explanations, offline),
        )
        for e in found
    ]


# --- explaining and scoring ------------------------------------------------------------------------------------


async def _rest(job: Job, plan: h.Plan, source: Source, found: "list[Explained]") -> None:
    if job.backend.offline:
        from saetool.engines.autointerp import with_tables
        from saetool.engines.judges import TableJudge

        explained = found if job.explainer == GIVEN else with_tables(found, source.strings)
        scored = await _score(job, explained, TableJudge(), floor=False)
        _write(job, plan, source, explained, scored, None)
        return
    kept = backends.store(job.backend, job.out, job.dry_run)
    with contextlib.ExitStack() as stack:
        stack.enter_context(kept)
        log = stack.enter_context(backends.logging(None if job.dry_run else job.log, plan))
        interruption = None if job.dry_run else stack.enter_context(Interruption())
        device = resolve_device(job.device)
        session = await backends.session(
            job.backend, kept, device, rehearse=job.dry_run, log=log, advance=lambda: None, interruption=interruption
        )
        try:
            explained, scored = await _with_model(job, session, source.strings, found)
        finally:
            await session.close()
            if not job.dry_run:
                log({"event": "usage", **backends.usage_json(job.backend, session.usage)})
        if job.dry_run:
            shown = _shown(job, source) | {"model": f"{job.backend.kind} {session.explain.client.model}"}
            used = backends.usage_json(job.backend, session.usage)
            named = ("calls", "prompt_tokens", "output_tokens", *(("cost",) if used["cost"] is not None else ()))
            job.console.plan(shown | {name: used[name] for name in named})
            return
        backends.say_usage(job.console, job.backend, session.usage)
        _write(job, plan, source, explained, scored, session)


async def _with_model(
    job: Job, session: backends.Session, strings: "Strings", found: "list[Explained]"
) -> "tuple[list[Explained], list[Scored]]":
    from saetool.engines import autointerp as engine
    from saetool.engines.calls import each
    from saetool.engines.judges import ModelJudge

    config, width = job.config, job.backend.width
    judge = ModelJudge(
        session.judge, strings, by_probability=job.backend.by_probability, limit=config.max_output_tokens
    )
    if job.explainer == LLM:
        todo = [e for e in found if e.reason is None]
        with _quiet_progress(job, "explain", len(todo)) as advance:

            async def describe(one: "Explained") -> "Explained":
                done = await engine.describe(one, session.explain, judge, strings, config)
                advance()
                return done

            described = {e.latent: e for e in await each(todo, describe, width)}
        found = [described.get(e.latent, e) for e in found]
    elif job.explainer != GIVEN:
        found = engine.with_tables(found, strings)
    return found, await _score(job, found, judge, floor=True)


def _quiet_progress(job: Job, label: str, total: int) -> Any:
    return (Console(quiet=True) if job.dry_run else job.console).progress(label, total, "latents")


async def _score(job: Job, explained: "list[Explained]", judge: Any, *, floor: bool) -> "list[Scored]":
    from saetool.engines.calls import each
    from saetool.engines.scores import Scorer, donors

    scorer = Scorer(judge, job.scorers, job.config, floor=floor)
    pairs = list(donors(explained, job.config.seed))
    with _quiet_progress(job, "score", len(pairs)) as advance:

        async def one(pair: "tuple[Explained, Explained | None]") -> "Scored":
            done = await scorer.score(*pair)
            advance()
            return done

        return await each(pairs, one, job.backend.width)


# --- outputs ---------------------------------------------------------------------------------------------------


def _write(
    job: Job,
    plan: h.Plan,
    source: Source,
    found: "list[Explained]",
    scored: "list[Scored]",
    session: backends.Session | None,
) -> None:
    """Write the windows, then the explanations: they are the mark that all is there. Raises if not all is done."""
    from saetool.core.scoring import SCORE_DEFINITION
    from saetool.engines import explanations as records

    config, strings = job.config, source.strings
    counts = records.counts(found, scored)
    complete = records.complete(counts, config.max_missing)
    if not scored:
        _stop(job, session, counts, "nothing was written")
    tensors = records.window_tensors(scored)
    summary = records.summary(scored, config.seed, config.granularity, config.n_options)
    sha256 = None
    if str(job.out) != "-":
        shown = {"roles": list(records.ROLES), "strings": strings.of(tensors["tokens"].unique().tolist())}
        windows_plan = dataclasses.replace(plan, schema=h.WINDOWS)
        header = windows_plan.header(config=shown, model=source.model, seed=config.seed, dtype="float32")
        sha256 = container.write_tensors(job.windows_path, tensors, header)
    sampling = {name: getattr(config, name) for name in SAMPLING}
    header = plan.header(
        config={
            "explainer": _explainer_json(job),
            "backend": {"kind": backends.OFFLINE} if session is None else session.record(),
            "sampling": {**sampling, "n_rows": source.activations.n_rows},
            **{name: getattr(config, name) for name in SCORING},
            "score_definition": SCORE_DEFINITION,
            "counts": counts,
            "summary": summary,
            "strings": strings.of(records.table_tokens(found)),
            "windows_sha256": sha256,
            "complete": complete,
        },
        model=source.model,
        seed=config.seed,
        dtype="float32",
    )
    payload = records.latent_records(found, scored, job.explainer, source.activations.n_rows)
    if job.export_path is not None:
        _export(job, source, scored, session)
    written = container.write_jsonl(job.out, header, payload)
    show(job.console, counts, summary)
    if not complete:
        _stop(job, session, counts, f"{job.out} holds what is done")
    job.console.emit(header, job.out, written, {"counts": counts, "summary": summary})


def _explainer_json(job: Job) -> dict[str, Any]:
    config = job.config
    about = {"kind": job.explainer, "table_size": config.table_size}
    if job.explainer == LLM:
        about |= {name: getattr(config, name) for name in MODEL}
    return about


def _export(job: Job, source: Source, scored: "Sequence[Scored]", session: backends.Session | None) -> None:
    from saetool.engines.exports import neuronpedia

    assert job.export_path is not None
    by = "none" if session is None else session.explain.client.model
    lines = neuronpedia(
        scored,
        source.strings,
        model=source.model,
        sae_name=job.file.name,
        explainer=job.explainer,
        explanation_model=by,
        scorer_model="none" if session is None else session.judge.client.model,
    )
    text = "".join(json.dumps(h.finite(line), ensure_ascii=False, sort_keys=True) + "\n" for line in lines)
    container.write_bytes(job.export_path, text.encode("utf-8", "replace"))


def _stop(job: Job, session: backends.Session | None, counts: dict[str, Any], kept: str) -> None:
    """Say why not all is done, and end with the right exit code."""
    by = None if session is None else session.stopped_by
    if by == "interrupted":
        job.console.say(f"interrupted: {kept}; run the same command again to go on")
        raise typer.Exit(130)
    if by is not None:
        raise BackendError(
            f"stopped at {by}: {counts['scored']} of {counts['requested']} latents scored, {kept}",
            "answers so far are kept: run the same command with a larger limit to go on",
        )
    failed = ", ".join(f"{n} {name}" for name, n in counts["failed"].items())
    raise BackendError(
        f"too many answers are missing ({failed} of {counts['requested']} latents), {kept}",
        "--log FILE tells why each call failed; --max-missing 1 accepts them as missing",
    )


def show(console: Console, counts: dict[str, Any], summary: dict[str, Any]) -> None:
    """The scores on standard error."""

    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    skipped = [f"{n} {reason}" for reason, n in {**counts["skipped"], **counts["failed"]}.items() if n]
    rows = [
        [
            "latents asked, scored",
            f"{counts['requested']}, {counts['scored']} (left out: {', '.join(skipped) or 'none'})",
        ]
    ]
    names = {
        "simulate": "correlation",
        "detect": "balanced accuracy",
        "fuzz": "balanced accuracy",
        "intruder": "accuracy",
    }
    for scorer, s in summary.items():
        what = f"{scorer}: {names[scorer]}"
        interval = f" [{s['ci95'][0]:.3f}, {s['ci95'][1]:.3f}]" if s["ci95"] else ""
        rows += [
            [f"{what}, mean", shown(s["mean"]) + interval],
            [f"{what}, median; 10% … 90%", f"{shown(s['median'])}; {shown(s['q10'])} … {shown(s['q90'])}"],
            ["  undefined", f"{s['n_null']} (mean with these as 0: {shown(s['mean_null0'])})"],
        ]
        if s.get("mean_quantile") is not None:
            rows.append(
                ["  top windows, windows over the range", f"{shown(s['mean_top'])}, {shown(s['mean_quantile'])}"]
            )
        if s.get("control_n"):
            rows.append(["  control: another latent's", f"{shown(s['control_mean'])} (defined for {s['control_n']})"])
        if s.get("floor_mean") is not None:
            rows.append(["  floor: the table of tokens", shown(s["floor_mean"])])
        if "chance" in s:
            rows.append(["  chance", shown(s["chance"])])
    console.table("scores on held-out windows", ["score", "value"], rows)
