"""``saetool autointerp`` of a meta-SAE: labels from its parents' explanations, and the multiple choice."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saetool.artifacts import container, writing
from saetool.artifacts import header as h
from saetool.commands import autointerp_backend as backends
from saetool.commands import autointerp_session as sessions
from saetool.commands import autointerp_table as tables
from saetool.commands.autointerp_job import Job
from saetool.console import Console
from saetool.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from saetool.artifacts.sae import SAEFile
    from saetool.engines.meta_base import Base, Labels, Parents
    from saetool.engines.meta_explanations import Chosen

MODEL = ("temperature", "max_output_tokens", "max_missing")


def run(job: Job, beside: Path, labels_paths: Sequence[Path], parent_paths: Sequence[Path]) -> None:
    """Label meta-latents and run the multiple choice. Parents not in ``parent_paths`` are looked for ``beside``."""
    from saetool.engines import meta_base

    parents = _parents(job, beside, parent_paths)
    files = _labels(job, parents, labels_paths)
    plan = _plan(job, parents, files)
    base = meta_base.read(parents, files)
    if not job.backend.offline:
        backends.check_environment(job.backend)
        base = base.only_described()
    n = len(base.tables.labelled)
    if n < job.config.n_options:
        raise ConfigError(
            f"--n-options {job.config.n_options}: {', '.join(str(p) for p in labels_paths)} has tables of only {n} "
            "latents",
            "explain more of the parent's latents: --latents all",
        )
    if job.dry_run and job.backend.offline:
        job.console.plan(_shown(job, base))
        return
    if not job.dry_run and job.up_to_date(plan, None):
        return
    if n < parents.n / 2:
        whose = "the parent's" if len(parents.files) == 1 else "the parents'"
        job.console.say(
            f"only {n} of {whose} {parents.n} latents have a table; autointerp it with --latents all to use more"
        )
    asyncio.run(_work(job, plan, base))


# --- inputs ----------------------------------------------------------------------------------------------------


def _parents(job: Job, beside: Path, given: Sequence[Path]) -> "Parents":
    """The SAEs that the meta-SAE says it was made from, in its order."""
    from saetool.artifacts import sae as sae_files
    from saetool.engines.meta_base import Parents

    wanted = job.file.meta_parents()
    found: dict[str, SAEFile] = {}

    def add(path: Path, expected: Sequence[dict[str, Any]]) -> None:
        file = sae_files.load(path)
        if file.sha256 not in {item["sha256"] for item in expected}:
            hashes = ", ".join(f"{item['sha256'][:12]}…" for item in expected)
            which = "not the SAE" if len(expected) == 1 else "none of the SAEs"
            raise ArtifactError(
                f"{path}: {which} that {job.file.name} was made from (sha256 {file.sha256[:12]}…, {hashes} expected)",
                f"pass --parent with the {' and the '.join(item['name'] for item in expected)} of that time",
            )
        found[file.sha256] = file

    for path in given:
        add(path, wanted)
    for item in wanted:
        if item["sha256"] not in found:
            path = beside.with_name(item["name"])
            if not path.exists():
                raise ArtifactError(
                    f"{path}: no such file; the meta-SAE was made from it",
                    "pass --parent SAE.st" + ("" if len(wanted) == 1 else ", once for each SAE that lies elsewhere"),
                )
            add(path, [item])
    return Parents([found[item["sha256"]] for item in wanted])


def _labels(job: Job, parents: "Parents", paths: Sequence[Path]) -> "list[Labels]":
    """The explanations, each with the parent that it is of."""
    from saetool.engines.meta_base import Labels

    out: list[Labels] = []
    for path in paths:
        if str(path) == "-":
            raise ConfigError("--labels -: labels are a file, with their windows beside it", "pass --labels BASE.jsonl")
        header, records = container.read_jsonl(path)
        h.expect(header, h.EXPLANATIONS, str(path), "make them: saetool autointerp PARENT.st -o BASE.jsonl")
        explained = [i["sha256"] for i in header.inputs if i["role"] == "sae"]
        same = [i for i, p in enumerate(parents.files) if {*_line(header, explained)} & {*_line(p.header, [p.sha256])}]
        exact = [i for i in same if parents.files[i].sha256 in explained]
        if not same:
            raise ArtifactError(
                f"{path}: explains another SAE than {parents.names}, from which {job.file.name} was made",
                f"make them: saetool autointerp {parents.files[0].name} --latents all -o BASE.jsonl",
            )
        parent = (exact or same)[0]
        twice = [other.path for other in out if other.parent == parent]
        if twice:
            raise ConfigError(f"--labels {path}: {twice[0]} explains the same SAE", "one file for each parent")
        out.append(Labels(path, header, records, parent))
    return out


def _line(header: h.Header, hashes: list[str]) -> list[str]:
    """``hashes`` of an SAE, and of the one it was before ``threshold`` was run on it.

    ``threshold`` changes no decoder row and numbers no latent anew. A meta-SAE, whose history begins with its parent's,
    has been nothing before.
    """
    made = [e for e in header.history if e["verb"] not in ("cache", "autointerp")]
    return hashes + ([made[-1]["inputs"][0]] if made and made[-1]["verb"] == "threshold" else [])


def _plan(job: Job, parents: "Parents", labels: "Sequence[Labels]") -> h.Plan:
    config = job.config
    options = {
        "explainer": job.explainer,
        "scorer": "choice",
        "latents": str(job.wanted),
        **{name: getattr(config, name) for name in ("table_size", "n_options", "n_questions", "seed")},
        **job.backend.options(),
    }
    if not job.backend.offline:
        options |= {name: getattr(config, name) for name in MODEL}
    inputs = [job.file.as_input("sae"), *(file.as_input("parent") for file in parents.files)]
    inputs += [h.Input("labels", one.path.name, h.sha256_file(one.path), h.EXPLANATIONS) for one in labels]
    return h.Plan("autointerp", h.EXPLANATIONS, options, inputs, [job.file.header, *(one.header for one in labels)])


def _shown(job: Job, base: "Base") -> dict[str, Any]:
    shown = {"meta": job.file.name, "parent": base.parents.names, "labelled latents": len(base.tables.labelled)}
    return {**shown, "latents": str(job.wanted), "output": str(job.out)}


# --- labels and choice -----------------------------------------------------------------------------------------


async def _work(job: Job, plan: h.Plan, base: "Base") -> None:
    from saetool.engines import choice, meta_labels
    from saetool.engines.judges import ModelJudge
    from saetool.engines.meta_explanations import Chosen

    config, backend = job.config, job.backend
    z = base.parents.codes(job.file.sae)
    labels = choice.label(z, base.tables, _latents(job, z), config.table_size)
    questions = choice.ask(z, base.tables, config.n_questions, config.n_options, config.seed)
    found = Chosen(z, labels, questions, None)
    counts = found.counts()
    if not counts["explained"]:
        raise ArtifactError(
            f"{job.file.name}: none of the {len(labels)} meta-latents asked for could be labelled "
            f"({counts['skipped']['dead']} dead, {counts['skipped']['unlabelled']} unlabelled)",
            "explain more of the parent's latents: --latents all",
        )
    if backend.offline:
        _write(job, plan, base, found, None)
        return
    async with sessions.opened(job, plan) as session:
        limit = config.max_output_tokens
        made = meta_labels.MetaLabels(
            z, base.tables, base.members, session.explain, config.n_options, limit, config.temperature
        )
        judge = ModelJudge(session.judge, str, by_probability=backend.by_probability, limit=limit)
        console = Console(quiet=True) if job.dry_run else job.console
        with console.progress("questions", 2 * len(questions.latent), "answers") as advance:
            latents = [one.latent for one in labels]
            questions, judged = await meta_labels.judge_all(made, latents, questions, judge, backend.width, advance)
        if job.dry_run:
            sessions.show_plan(job, _shown(job, base), session)
            return
        sessions.say_usage(job, session)
        _write(job, plan, base, Chosen(z, labels, questions, judged), session)


def _latents(job: Job, z: Any) -> list[int]:
    from saetool.engines.autointerp import choose

    if job.wanted.ids is not None:
        return list(job.wanted.ids)
    if job.wanted.number is None:
        return list(range(z.shape[1]))
    return choose((z > 0).sum(axis=0), job.wanted.number, job.config.seed)


# --- outputs ---------------------------------------------------------------------------------------------------


def _write(job: Job, plan: h.Plan, base: "Base", found: "Chosen", session: sessions.Session | None) -> None:
    """Write the records. Raises if not all is done."""
    from saetool.core.scoring import SCORE_DEFINITION
    from saetool.engines import choice, meta_explanations

    config = job.config
    counts, summary = found.counts(), found.summary()
    missing, asked = found.missing()
    stopped = session is not None and session.stopped_by is not None
    complete = not stopped and missing <= config.max_missing * asked
    several = {"parents": base.parents.to_json()} if len(base.parents.files) > 1 else {}
    header = plan.header(
        config={
            "explainer": {"kind": job.explainer, "table_size": config.table_size, "members": choice.N_MEMBERS},
            "backend": {"kind": backends.OFFLINE} if session is None else session.record(),
            "score_definition": SCORE_DEFINITION,
            "counts": counts,
            "summary": summary,
            "questions": found.asked(),
            "strings": meta_explanations.strings(found.labels, base),
            "complete": complete,
            **several,
        },
        model=job.file.header.model,
        seed=config.seed,
        dtype="float32",
    )
    sha256 = writing.write_jsonl(job.out, header, found.records(job.explainer, base))
    tables.choice(job.console, counts, summary["choice"], job.backend.offline)
    if not complete:
        sessions.stop(
            job,
            session,
            done=f"{missing} of {asked} answers are missing",
            missing=f"{missing} of {asked}",
            kept=f"{job.out} holds what is done",
        )
    job.console.emit(header, job.out, sha256, {"counts": counts, "summary": summary})
