"""``saetool autointerp`` of an SAE: windows, explanations, scores, files."""

import asyncio
import collections
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from saetool.artifacts import header as h
from saetool.artifacts import writing
from saetool.commands import autointerp_backend as backends
from saetool.commands import autointerp_given as given_files
from saetool.commands import autointerp_session as sessions
from saetool.commands import autointerp_table as tables
from saetool.commands.autointerp_job import GIVEN, LLM, Job, Wanted
from saetool.commands.autointerp_source import Source, open_source
from saetool.console import Console
from saetool.errors import ArtifactError

if TYPE_CHECKING:
    from saetool.engines.autointerp import Explained
    from saetool.engines.judges import Judge
    from saetool.engines.scores import Scored

SAMPLING = (
    *("on", "window", "split", "skip_positions", "negatives", "min_firing", "max_density"),
    *("n_top", "n_random", "n_quantile", "score_top", "score_random", "score_quantile"),
)
"""Fields of the configuration that say which windows are drawn."""
SCORING = ("granularity", "control", "max_missing")
MODEL = ("candidates", "temperature", "max_output_tokens")


def run(job: Job, acts: Path) -> None:
    """Explain and score the latents of an SAE."""
    given = None if job.explanations is None else given_files.read(job.explanations, job.file.sae.d_sae)
    source = open_source(job, acts)
    if given is not None and job.wanted == Wanted():
        job = dataclasses.replace(job, wanted=Wanted(ids=tuple(sorted(given))))
    plan = _plan(job, source)
    if not job.backend.offline:
        backends.check_environment(job.backend)
    if job.dry_run and job.backend.offline:
        job.console.plan(_shown(job, source))
        return
    if not job.dry_run and job.up_to_date(plan, dataclasses.replace(plan, schema=h.WINDOWS)):
        return
    found = _windows(job, source)
    if given is not None:
        found = given_files.attach(job, found, given, source.strings)
    if job.backend.offline:
        explained, scored = asyncio.run(_by_tables(job, source, found))
        _write(job, plan, source, explained, scored, None)
    else:
        asyncio.run(_by_model(job, plan, source, found))


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
    return {
        "sae": job.file.name,
        "latents": str(job.wanted),
        "rows": source.activations.n_rows,
        "window": f"{config.window} tokens",
        "explaining": f"{config.n_top} top, {config.n_quantile} quantile, {config.n_random} random windows a latent",
        "scoring": f"{config.score_top} top, {config.score_quantile} quantile, {config.score_random} random",
        "outputs": ", ".join(str(path) for path in (job.out, job.windows_path, job.export_path) if path is not None),
    }


# --- windows, explanations, scores -----------------------------------------------------------------------------


def _windows(job: Job, source: Source) -> "list[Explained]":
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
        found = list(engine.explain(source.activations, latents, counts, config, advance, near, source.strings))
    reasons = collections.Counter(e.reason for e in found if e.reason)
    if len(found) == sum(reasons.values()):
        said = ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items())) or f"all {sae.d_sae} dead"
        raise ArtifactError(
            f"{job.file.name}: no latent could be explained on {rows:,} rows ({said})",
            "cache more text, or change --latents, --min-firing, --max-density",
        )
    return found


async def _by_tables(job: Job, source: Source, found: "list[Explained]") -> "tuple[list[Explained], list[Scored]]":
    from saetool.engines.autointerp import with_tables

    explained = found if job.explainer == GIVEN else with_tables(found, source.strings)
    return explained, await _score(job, source, explained, None)


async def _by_model(job: Job, plan: h.Plan, source: Source, found: "list[Explained]") -> None:
    from saetool.engines import autointerp as engine
    from saetool.engines.judges import ModelJudge

    config, strings = job.config, source.strings
    async with sessions.opened(job, plan) as session:
        judge = ModelJudge(
            session.judge, strings, by_probability=job.backend.by_probability, limit=config.max_output_tokens
        )
        if job.explainer == LLM:
            n = sum(e.reason is None for e in found)
            with _progress(job, "explain", n) as advance:
                found = await engine.describe_all(
                    found, session.explain, judge, strings, config, job.backend.width, advance
                )
        elif job.explainer != GIVEN:
            found = engine.with_tables(found, strings)
        scored = await _score(job, source, found, judge)
        if job.dry_run:
            sessions.show_plan(job, _shown(job, source), session)
            return
        sessions.say_usage(job, session)
        _write(job, plan, source, found, scored, session)


async def _score(job: Job, source: Source, explained: "list[Explained]", judge: "Judge | None") -> "list[Scored]":
    """The scores by ``judge`` beside those of the tables; None: by the tables alone."""
    from saetool.engines.judges import TableJudge
    from saetool.engines.scores import score_all

    table = TableJudge(source.strings.words)

    n = sum(e.explanation is not None for e in explained)
    with _progress(job, "score", n) as advance:
        return await score_all(
            explained,
            judge or table,
            job.scorers,
            job.config,
            floor=None if judge is None else table,
            width=job.backend.width,
            advance=advance,
        )


def _progress(job: Job, label: str, total: int) -> Any:
    return (Console(quiet=True) if job.dry_run else job.console).progress(label, total, "latents")


# --- outputs ---------------------------------------------------------------------------------------------------


def _write(
    job: Job,
    plan: h.Plan,
    source: Source,
    found: "list[Explained]",
    scored: "list[Scored]",
    session: sessions.Session | None,
) -> None:
    """Write the windows, then the explanations: they are the mark that all is there. Raises if not all is done."""
    from saetool.core.scoring import SCORE_DEFINITION
    from saetool.engines import explanations as records

    config, strings = job.config, source.strings
    counts = records.counts(found, scored)
    complete = records.complete(counts, config.max_missing)
    if not scored:
        _stop(job, session, counts, "nothing was written")
    summary = records.summary(scored, config.seed, config.granularity, config.n_options)
    sha256 = None
    if str(job.out) != "-":
        shown = {"roles": list(records.ROLES), "strings": strings.of(records.window_tokens(scored))}
        windows_plan = dataclasses.replace(plan, schema=h.WINDOWS)
        header = windows_plan.header(config=shown, model=source.model, seed=config.seed, dtype="float32")
        sha256 = writing.write_tensors(job.windows_path, records.window_tensors(scored), header)
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
    written = writing.write_jsonl(job.out, header, payload)
    tables.latents(job.console, counts, summary)
    if not complete:
        _stop(job, session, counts, f"{job.out} holds what is done")
    job.console.emit(header, job.out, written, {"counts": counts, "summary": summary})


def _explainer_json(job: Job) -> dict[str, Any]:
    config = job.config
    about = {"kind": job.explainer, "table_size": config.table_size}
    if job.explainer == LLM:
        about |= {name: getattr(config, name) for name in MODEL}
    return about


def _export(job: Job, source: Source, scored: "Sequence[Scored]", session: sessions.Session | None) -> None:
    from saetool.engines.exports import neuronpedia

    assert job.export_path is not None
    by = session.explain.client.model if session is not None and job.explainer == LLM else "none"
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
    writing.write_bytes(job.export_path, text.encode("utf-8", "replace"))


def _stop(job: Job, session: sessions.Session | None, counts: dict[str, Any], kept: str) -> NoReturn:
    failed = ", ".join(f"{n} {name}" for name, n in counts["failed"].items())
    sessions.stop(
        job,
        session,
        done=f"{counts['scored']} of {counts['requested']} latents scored",
        missing=f"{failed} of {counts['requested']} latents",
        kept=kept,
    )
