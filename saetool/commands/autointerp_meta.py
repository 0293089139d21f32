"""``saetool autointerp`` of a meta-SAE: labels from its parent's explanations, and the multiple choice."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from saetool.artifacts import container
from saetool.artifacts import header as h
from saetool.commands.autointerp_job import Job
from saetool.console import Console
from saetool.errors import ArtifactError, ConfigError

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
        "explainer": "ngram",
        "scorer": "choice",
        "latents": str(job.wanted),
        "table_size": config.table_size,
        "n_options": config.n_options,
        "n_questions": config.n_questions,
        "seed": config.seed,
    }
    inputs = [
        job.file.as_input("sae"),
        parent.as_input("parent"),
        h.Input("labels", labels_path.name, h.sha256_file(labels_path), h.EXPLANATIONS),
    ]
    plan = h.Plan("autointerp", h.EXPLANATIONS, options, inputs, [job.file.header, labels])
    tables = _tables(records, str(labels_path), parent.sae.d_sae)
    if len(tables.labelled) < config.n_options:
        raise ConfigError(
            f"--n-options {config.n_options}: {labels_path} has tables of only {len(tables.labelled)} latents",
            "explain more of the parent's latents: --latents all",
        )
    if job.dry_run:
        shown = {"meta": job.file.name, "parent": parent.name, "labelled latents": len(tables.labelled)}
        job.console.plan({**shown, "latents": str(job.wanted), "output": str(job.out)})
        return
    if job.up_to_date(plan, None):
        return
    if len(tables.labelled) < parent.sae.d_sae / 2:
        job.console.say(
            f"only {len(tables.labelled)} of the parent's {parent.sae.d_sae} latents have a table; "
            "autointerp it with --latents all to use more"
        )
    _work(job, plan, parent, tables, labels)


def _line(header: h.Header, role: str) -> list[str]:
    """Hashes of the SAE that is the input ``role``, and of the one it was before ``threshold`` was run on it.

    ``threshold`` changes no decoder row and numbers no latent anew.
    """
    hashes = [i["sha256"] for i in header.inputs if i["role"] == role]
    made = [e for e in header.history if e["verb"] not in ("cache", "meta", "autointerp")]
    return hashes + ([made[-1]["inputs"][0]] if made and made[-1]["verb"] == "threshold" else [])


def _tables(records: list[dict[str, Any]], where: str, d_sae: int) -> "Tables":
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
    return choice.token_tables(tables, d_sae)


def _work(job: Job, plan: h.Plan, parent: "SAEFile", tables: "Tables", labels: h.Header) -> None:
    import numpy as np

    from saetool.core.meta import decoder_rows
    from saetool.core.scoring import SCORE_DEFINITION
    from saetool.engines import choice

    config = job.config
    rows = decoder_rows(parent.sae)
    z = np.zeros((parent.sae.d_sae, job.file.sae.d_sae), dtype=np.float32)
    z[rows.latents.numpy()] = job.file.sae.encode(rows.rows).numpy()
    chosen = _latents(job, z)
    found = choice.label(z, tables, chosen, config.table_size)
    counts = _counts(found)
    if not counts["explained"]:
        raise ArtifactError(
            f"{job.file.name}: none of the {len(found)} meta-latents asked for could be labelled "
            f"({counts['skipped']['dead']} dead, {counts['skipped']['unlabelled']} unlabelled)",
            "explain more of the parent's latents: --latents all",
        )
    questions = choice.ask(z, tables, config.n_questions, config.n_options, config.seed)
    strings = {str(k): str(v) for k, v in labels.config.get("strings", {}).items()}
    summary = {"choice": _summary(questions, config.n_options)}
    header = plan.header(
        config={
            "explainer": {"kind": "ngram", "table_size": config.table_size, "members": choice.N_MEMBERS},
            "backend": {"kind": "offline"},
            "score_definition": SCORE_DEFINITION,
            "counts": counts,
            "summary": summary,
            "questions": {
                "latent": questions.latent.tolist(),
                "options": questions.options.tolist(),
                "right": questions.right.tolist(),
                "chosen": [None if c < 0 else c for c in questions.answers.chosen.tolist()],
                "control_latent": [None if c < 0 else c for c in questions.control_latent.tolist()],
            },
            "strings": {str(e.token): _text(strings, e.token) for one in found for e in one.table},
            "complete": True,
        },
        model=job.file.header.model,
        seed=config.seed,
        dtype="float32",
    )
    correct, asked = choice.by_meta_latent(z, questions)
    payload = [_record(one, strings, correct, asked, z.shape[0], config.n_options) for one in found]
    sha256 = container.write_jsonl(job.out, header, payload)
    _table(job.console, counts, summary["choice"])
    job.console.emit(header, job.out, sha256, {"counts": counts, "summary": summary})


def _latents(job: Job, z: Any) -> list[int]:
    from saetool.engines.autointerp import choose

    if job.wanted.ids is not None:
        return list(job.wanted.ids)
    if job.wanted.number is None:
        return list(range(z.shape[1]))
    return choose((z > 0).sum(axis=0), job.wanted.number, job.config.seed)


def _text(strings: dict[str, str], token: int) -> str:
    return strings.get(str(token), f"#{token}")


def _counts(found: "list[Label]") -> dict[str, Any]:
    done = sum(one.reason is None for one in found)
    skipped = {name: sum(one.reason == name for one in found) for name in ("dead", "unlabelled")}
    return {"requested": len(found), "explained": done, "scored": done, "skipped": skipped}


def _summary(questions: "Questions", n_options: int) -> dict[str, Any]:
    """Accuracy with Wilson's interval, the control's, chance, and how many questions were ties."""
    from saetool.core.scoring import wilson

    points, n = float(questions.answers.points.sum()), len(questions.latent)
    has_control = questions.control_latent >= 0
    control, n_control = float(questions.control.points[has_control].sum()), int(has_control.sum())
    return {
        "n": n,
        "accuracy": points / n if n else None,
        "wilson95": wilson(points, n),
        "chance": 1 / n_options,
        "ties": int((questions.answers.chosen < 0).sum()),
        "unexplained": questions.n_unexplained,
        "control_n": n_control,
        "control_accuracy": control / n_control if n_control else None,
        "control_wilson95": wilson(control, n_control),
        "control_ties": int((questions.control.chosen[has_control] < 0).sum()),
    }


def _record(
    one: "Label", strings: dict[str, str], correct: Any, asked: Any, n_parent: int, n_options: int
) -> dict[str, Any]:
    from saetool.core.ngram import describe

    n = int(asked[one.latent])
    score = {"correct": float(correct[one.latent]), "n": n, "chance": 1 / n_options}
    return {
        "latent": one.latent,
        "status": "skipped" if one.reason else ("scored" if n else "explained"),
        "reason": one.reason,
        "description": describe(one.table, lambda t: _text(strings, t)) if one.table else None,
        "explainer": "ngram",
        "table": [list(entry) for entry in one.table] or None,
        "members": [list(member) for member in one.members],
        "n_members": one.n_members,
        "density": one.n_members / n_parent,
        "max_act": one.max_act,
        "windows": None,
        "scores": {"choice": score} if n else {},
    }


def _table(console: Console, counts: dict[str, Any], summary: dict[str, Any]) -> None:
    def share(value: float | None, interval: tuple[float, float] | None) -> str:
        return "–" if value is None or interval is None else f"{value:.1%} [{interval[0]:.1%}, {interval[1]:.1%}]"

    skipped = ", ".join(f"{n} {reason}" for reason, n in counts["skipped"].items() if n) or "none"
    rows = [
        ["meta-latents asked, labelled", f"{counts['requested']}, {counts['explained']} (skipped: {skipped})"],
        ["questions", f"{summary['n']} ({summary['unexplained']} latents have no meta-latent)"],
        ["right", share(summary["accuracy"], summary["wilson95"])],
        ["chance", f"{summary['chance']:.1%}"],
        ["control: another latent's meta-latents", share(summary["control_accuracy"], summary["control_wilson95"])],
        ["ties, and in the control", f"{summary['ties']}, {summary['control_ties']}"],
    ]
    console.table("multiple choice by token tables", ["score", "value"], rows)
