"""``saetool autointerp`` of a meta-SAE: labels from its parent's explanations, and the multiple choice."""

import asyncio
import collections
import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from saetool.artifacts import container
from saetool.artifacts import header as h
from saetool.commands import autointerp_backend as backends
from saetool.commands.autointerp_job import Job
from saetool.console import Console, Interruption
from saetool.errors import ArtifactError, BackendError, ConfigError
from saetool.options import resolve_device

if TYPE_CHECKING:
    from saetool.artifacts.sae import SAEFile
    from saetool.engines.choice import Label, Questions, Tables


def parent_input(meta: "SAEFile") -> dict[str, Any]:
    """The input that says which SAE ``meta`` was made from."""
    for item in meta.header.inputs:
        if item["role"] == "parent":
            return item
    raise ArtifactError(f"{meta.name}: a meta-SAE that does not say what it was made from", "make it again")


def run(job: Job, labels_path: Path, parent_path: Path) -> None:
    """Label meta-latents and run the multiple choice."""
    from saetool.artifacts import sae as sae_files

    wanted = parent_input(job.file)
    if not parent_path.exists():
        raise ArtifactError(f"{parent_path}: no such file; the meta-SAE was made from it", "pass --parent SAE.st")
    parent = sae_files.load(parent_path)
    if parent.sha256 != wanted["sha256"]:
        raise ArtifactError(
            f"{parent_path}: not the SAE that {job.file.name} was made from (sha256 {parent.sha256[:12]}…, "
            f"{wanted['sha256'][:12]}… expected)",
            f"pass --parent with the {wanted['name']} of that time",
        )
    labels, records = container.read_jsonl(labels_path)
    h.expect(labels, h.EXPLANATIONS, str(labels_path), "make them: saetool autointerp PARENT.st -o BASE.jsonl")
    if not {*_line(labels, "sae")} & {*_line(job.file.header, "parent")}:
        raise ArtifactError(
            f"{labels_path}: explains another SAE than {wanted['name']}, from which {job.file.name} was made",
            f"make them: saetool autointerp {parent_path} --latents all -o {labels_path}",
        )
    config = job.config
    options = {
        "explainer": job.explainer,
        "scorer": "choice",
        "latents": str(job.wanted),
        "table_size": config.table_size,
        "n_options": config.n_options,
        "n_questions": config.n_questions,
        "seed": config.seed,
        **job.backend.options(),
    }
    if not job.backend.offline:
        options |= {name: getattr(config, name) for name in ("temperature", "max_output_tokens", "max_missing")}
    inputs = [
        job.file.as_input("sae"),
        parent.as_input("parent"),
        h.Input("labels", labels_path.name, h.sha256_file(labels_path), h.EXPLANATIONS),
    ]
    plan = h.Plan("autointerp", h.EXPLANATIONS, options, inputs, [job.file.header, labels])
    strings = {int(k): str(v) for k, v in labels.config.get("strings", {}).items()}
    tables = _tables(records, str(labels_path), parent.sae.d_sae, strings)
    base = Base(parent, tables, strings, _members(records, labels_path, labels, strings))
    if not job.backend.offline:
        backends.check_environment(job.backend)
        base = base.only_described()
    if len(base.tables.labelled) < config.n_options:
        raise ConfigError(
            f"--n-options {config.n_options}: {labels_path} has tables of only {len(base.tables.labelled)} latents",
            "explain more of the parent's latents: --latents all",
        )
    if job.dry_run and job.backend.offline:
        job.console.plan(_shown(job, base))
        return
    if not job.dry_run and job.up_to_date(plan, None):
        return
    if len(base.tables.labelled) < parent.sae.d_sae / 2:
        job.console.say(
            f"only {len(base.tables.labelled)} of the parent's {parent.sae.d_sae} latents have a table; "
            "autointerp it with --latents all to use more"
        )
    asyncio.run(_work(job, plan, base))


@dataclass(frozen=True)
class Base:
    """The parent with what is known of its latents."""

    parent: "SAEFile"
    tables: "Tables"
    strings: dict[int, str]
    members: "dict[int, tuple[str, list[str]]]"
    """Description and some contexts of each described latent."""

    def only_described(self) -> "Base":
        """With the tables of described latents alone."""
        import numpy as np

        described = np.array(sorted(self.members), dtype=np.int64)
        return dataclasses.replace(self, tables=self.tables.only(described))


def _shown(job: Job, base: Base) -> dict[str, Any]:
    shown = {"meta": job.file.name, "parent": base.parent.name, "labelled latents": len(base.tables.labelled)}
    return {**shown, "latents": str(job.wanted), "output": str(job.out)}


def _line(header: h.Header, role: str) -> list[str]:
    """Hashes of the SAE that is the input ``role``, and of the one it was before ``threshold`` was run on it.

    ``threshold`` changes no decoder row and numbers no latent anew.
    """
    hashes = [i["sha256"] for i in header.inputs if i["role"] == role]
    made = [e for e in header.history if e["verb"] not in ("cache", "meta", "autointerp")]
    return hashes + ([made[-1]["inputs"][0]] if made and made[-1]["verb"] == "threshold" else [])


def _tables(records: list[dict[str, Any]], where: str, d_sae: int, strings: dict[int, str]) -> "Tables":
    from saetool.core.ngram import Entry
    from saetool.engines import choice

    tables = {}
    try:
        for record in records:
            if record.get("table"):
                tables[int(record["latent"])] = tuple(Entry(*entry) for entry in record["table"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{where}: a record is damaged ({error})", "make the explanations again") from None
    if not tables:
        raise ArtifactError(f"{where}: holds no token table", "explain the parent's latents first")
    if max(tables) >= d_sae:
        raise ArtifactError(f"{where}: explains latent {max(tables)}, and the parent has {d_sae}")
    return choice.token_tables(tables, d_sae, strings)


def _members(
    records: list[dict[str, Any]], path: Path, header: h.Header, strings: dict[int, str]
) -> dict[int, tuple[str, list[str]]]:
    """Descriptions of latents, with contexts where the windows are still beside the labels."""
    import numpy as np

    from saetool.engines.meta_labels import contexts
    from saetool.engines.windows import Windows

    described = {int(r["latent"]): str(r["description"]) for r in records if r.get("description")}
    found: dict[int, list[str]] = {}
    file = path.with_suffix(".windows.st")
    if str(path) != "-" and file.is_file() and h.sha256_file(file) == header.config.get("windows_sha256"):
        read = container.read_tensors(file, h.WINDOWS)
        t = {name: tensor.numpy() for name, tensor in read.tensors.items()}
        names = {int(k): str(v) for k, v in read.header.config.get("strings", {}).items()}
        everything = Windows(t["tokens"], t["acts"], t["length"], t["role"], t["source"], t["document"])
        latents, first = np.unique(t["latent"], return_index=True)
        for latent, begin, end in zip(latents.tolist(), first, [*first[1:], len(t["latent"])], strict=True):
            rows = everything.pick(np.arange(len(t["latent"]))[begin:end])
            found[latent] = contexts(rows, lambda token: names.get(token, ""))
    return {latent: (text, found.get(latent, [])) for latent, text in described.items()}


@dataclass(frozen=True)
class Judged:
    """Labels and answers by a language model."""

    labels: "list[tuple[str | None, str | None]]"
    """Label, or why there is none, of each meta-latent asked for."""
    valid: Any
    """Which questions were answered."""
    control_valid: Any
    floor: float | None
    """Accuracy of the tables on the answered questions."""


async def _work(job: Job, plan: h.Plan, base: Base) -> None:
    import numpy as np

    from saetool.core.meta import decoder_rows
    from saetool.engines import choice

    config, parent, tables = job.config, base.parent, base.tables
    rows = decoder_rows(parent.sae)
    z = np.zeros((parent.sae.d_sae, job.file.sae.d_sae), dtype=np.float32)
    z[rows.latents.numpy()] = job.file.sae.encode(rows.rows).numpy()
    found = choice.label(z, tables, _latents(job, z), config.table_size)
    counts = _counts(found)
    if not counts["explained"]:
        raise ArtifactError(
            f"{job.file.name}: none of the {len(found)} meta-latents asked for could be labelled "
            f"({counts['skipped']['dead']} dead, {counts['skipped']['unlabelled']} unlabelled)",
            "explain more of the parent's latents: --latents all",
        )
    questions = choice.ask(z, tables, config.n_questions, config.n_options, config.seed)
    if job.backend.offline:
        _write(job, plan, base, z, found, questions, None, None)
        return
    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(backends.store(job.backend, job.out, job.dry_run))
        log = stack.enter_context(backends.logging(None if job.dry_run else job.log, plan))
        interruption = None if job.dry_run else stack.enter_context(Interruption())
        console = Console(quiet=True) if job.dry_run else job.console
        advance = stack.enter_context(console.progress("questions", 2 * len(questions.latent), "answers"))
        session = await backends.session(
            job.backend,
            kept,
            resolve_device(job.device),
            rehearse=job.dry_run,
            log=log,
            advance=lambda: None,
            interruption=interruption,
        )
        try:
            questions, judged = await _judge(job, session, base, z, found, questions, advance)
        finally:
            await session.close()
            log({"event": "usage", **backends.usage_json(job.backend, session.usage)})
    used = backends.usage_json(job.backend, session.usage)
    if job.dry_run:
        named = ("calls", "prompt_tokens", "output_tokens", *(("cost",) if used["cost"] is not None else ()))
        job.console.plan(_shown(job, base) | {name: used[name] for name in named})
        return
    backends.say_usage(job.console, job.backend, session.usage)
    _write(job, plan, base, z, found, questions, judged, session)


async def _judge(
    job: Job,
    session: backends.Session,
    base: Base,
    z: Any,
    found: "list[Label]",
    questions: "Questions",
    advance: Any,
) -> "tuple[Questions, Judged]":
    """Labels by the model, and its answers to the questions."""
    import numpy as np

    from saetool.engines import meta_labels
    from saetool.engines.judges import ModelJudge

    config, width = job.config, job.backend.width
    limit = config.max_output_tokens
    labels = meta_labels.MetaLabels(
        z, base.tables, base.members, session.explain, config.n_options, limit, config.temperature
    )
    judge = ModelJudge(session.judge, str, by_probability=job.backend.by_probability, limit=limit)
    made = await meta_labels.label_all(labels, [one.latent for one in found], width)

    async def answers(source: Any) -> Any:
        return await meta_labels.answer(
            questions, source, z, labels, lambda latent: base.members[latent][0], judge, limit, width, advance
        )

    own, control = await answers(questions.latent), await answers(questions.control_latent)
    points = questions.answers.points[own.valid]
    floor = float(np.mean(points)) if len(points) else None
    judged = Judged(made, own.valid, control.valid, floor)
    return meta_labels.with_answers(questions, own, control), judged


def _write(
    job: Job,
    plan: h.Plan,
    base: Base,
    z: Any,
    found: "list[Label]",
    questions: "Questions",
    judged: Judged | None,
    session: backends.Session | None,
) -> None:
    from saetool.core.scoring import SCORE_DEFINITION
    from saetool.engines import choice

    config, strings = job.config, base.strings
    failures = (
        {} if judged is None else {f.latent: why for f, (_, why) in zip(found, judged.labels, strict=True) if why}
    )
    counts = _counts(found, failures)
    summary = {"choice": _summary(questions, config.n_options, judged)}
    missing = summary["choice"]["n_missing"] + len(failures)
    asked = len(questions.latent) + counts["explained"]
    stopped = session is not None and session.stopped_by is not None
    complete = not stopped and missing <= config.max_missing * asked
    header = plan.header(
        config={
            "explainer": {"kind": job.explainer, "table_size": config.table_size, "members": choice.N_MEMBERS},
            "backend": {"kind": backends.OFFLINE} if session is None else session.record(),
            "score_definition": SCORE_DEFINITION,
            "counts": counts,
            "summary": summary,
            "questions": {
                "latent": questions.latent.tolist(),
                "options": questions.options.tolist(),
                "right": questions.right.tolist(),
                "chosen": [None if c < 0 else c for c in questions.answers.chosen.tolist()],
                "control_latent": [None if c < 0 else c for c in questions.control_latent.tolist()],
                "control_chosen": [None if c < 0 else c for c in questions.control.chosen.tolist()],
            },
            "strings": {str(e.token): _text(strings, e.token) for one in found for e in one.table},
            "complete": complete,
        },
        model=job.file.header.model,
        seed=config.seed,
        dtype="float32",
    )
    correct, n = choice.by_meta_latent(z, questions, None if judged is None else judged.valid)
    payload = [
        _record(
            one,
            job.explainer,
            (None, None) if judged is None else judged.labels[i],
            strings,
            {"correct": float(correct[one.latent]), "n": int(n[one.latent]), "chance": 1 / config.n_options},
            z.shape[0],
        )
        for i, one in enumerate(found)
    ]
    sha256 = container.write_jsonl(job.out, header, payload)
    _table(job.console, counts, summary["choice"], job.backend.offline)
    if not complete:
        _stop(job, session, missing, asked)
    job.console.emit(header, job.out, sha256, {"counts": counts, "summary": summary})


def _stop(job: Job, session: backends.Session | None, missing: int, asked: int) -> None:
    by = None if session is None else session.stopped_by
    if by == "interrupted":
        job.console.say(f"interrupted: {job.out} holds what is done; run the same command again to go on")
        raise typer.Exit(130)
    if by is not None:
        raise BackendError(
            f"stopped at {by}: {missing} of {asked} answers are missing, {job.out} holds what is done",
            "answers so far are kept: run the same command with a larger limit to go on",
        )
    raise BackendError(
        f"too many answers are missing ({missing} of {asked}), {job.out} holds what is done",
        "--log FILE tells why each call failed; --max-missing 1 accepts them as missing",
    )


def _latents(job: Job, z: Any) -> list[int]:
    from saetool.engines.autointerp import choose

    if job.wanted.ids is not None:
        return list(job.wanted.ids)
    if job.wanted.number is None:
        return list(range(z.shape[1]))
    return choose((z > 0).sum(axis=0), job.wanted.number, job.config.seed)


def _text(strings: dict[int, str], token: int) -> str:
    return strings.get(token, f"#{token}")


def _counts(found: "list[Label]", failures: Mapping[int, str] | None = None) -> dict[str, Any]:
    failures = failures or {}
    done = sum(one.reason is None and one.latent not in failures for one in found)
    skipped = {name: sum(one.reason == name for one in found) for name in ("dead", "unlabelled")}
    failed = dict(sorted(collections.Counter(failures.values()).items()))
    return {"requested": len(found), "explained": done, "scored": done, "skipped": skipped, "failed": failed}


def _summary(questions: "Questions", n_options: int, judged: Judged | None) -> dict[str, Any]:
    """Accuracy with Wilson's interval, the control's, chance, and how many questions were ties."""
    import numpy as np

    from saetool.core.scoring import wilson

    valid = np.ones(len(questions.latent), dtype=bool) if judged is None else judged.valid
    has_control = (questions.control_latent >= 0) & (True if judged is None else judged.control_valid)
    points, n = float(questions.answers.points[valid].sum()), int(valid.sum())
    control, n_control = float(questions.control.points[has_control].sum()), int(has_control.sum())
    out = {
        "n": n,
        "n_missing": int((~valid).sum()),
        "accuracy": points / n if n else None,
        "wilson95": wilson(points, n),
        "chance": 1 / n_options,
        "ties": int((questions.answers.chosen[valid] < 0).sum()),
        "unexplained": questions.n_unexplained,
        "control_n": n_control,
        "control_accuracy": control / n_control if n_control else None,
        "control_wilson95": wilson(control, n_control),
        "control_ties": int((questions.control.chosen[has_control] < 0).sum()),
    }
    return out if judged is None else out | {"floor_accuracy": judged.floor}


def _record(
    one: "Label",
    explainer: str,
    label: tuple[str | None, str | None],
    strings: dict[int, str],
    score: dict[str, Any],
    n_parent: int,
) -> dict[str, Any]:
    from saetool.core.ngram import describe

    said, failure = label
    table = describe(one.table, lambda t: _text(strings, t)) if one.table else None
    reason = one.reason or failure
    status = "skipped" if one.reason else "failed" if failure else "scored" if score["n"] else "explained"
    return {
        "latent": one.latent,
        "status": status,
        "reason": reason,
        "description": table if explainer == "ngram" else said,
        "explainer": explainer,
        "table": [list(entry) for entry in one.table] or None,
        "members": [list(member) for member in one.members],
        "n_members": one.n_members,
        "density": one.n_members / n_parent,
        "max_act": one.max_act,
        "windows": None,
        "scores": {"choice": score} if score["n"] else {},
    }


def _table(console: Console, counts: dict[str, Any], summary: dict[str, Any], offline: bool) -> None:
    def share(value: float | None, interval: tuple[float, float] | None) -> str:
        return "–" if value is None or interval is None else f"{value:.1%} [{interval[0]:.1%}, {interval[1]:.1%}]"

    skipped = (
        ", ".join(f"{n} {reason}" for reason, n in {**counts["skipped"], **counts["failed"]}.items() if n) or "none"
    )
    rows = [
        ["meta-latents asked, labelled", f"{counts['requested']}, {counts['explained']} (left out: {skipped})"],
        ["questions", f"{summary['n']} ({summary['unexplained']} latents have no meta-latent)"],
        ["right", share(summary["accuracy"], summary["wilson95"])],
        ["chance", f"{summary['chance']:.1%}"],
        ["control: another latent's meta-latents", share(summary["control_accuracy"], summary["control_wilson95"])],
    ]
    if offline:
        rows.append(["ties, and in the control", f"{summary['ties']}, {summary['control_ties']}"])
    else:
        floor = summary.get("floor_accuracy")
        rows.append(["floor: tables of tokens", "–" if floor is None else f"{floor:.1%}"])
        rows.append(["without an answer", str(summary["n_missing"])])
    console.table(f"multiple choice by {'token tables' if offline else 'a language model'}", ["score", "value"], rows)
