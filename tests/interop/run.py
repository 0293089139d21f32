"""Compare saetool's reading and writing with the libraries' own code. Run by hand; not part of the tests:

    python tests/interop/run.py [--work DIR] [--checkouts DIR] [--golden] [--readme]

It builds an environment for each of sae-lens 6.54.12, eai-sparsify 1.3.3 and dictionary-learning 0.1.0 (they cannot
share one; torch and what else fits is taken from the Python that runs this), trains a tiny SAE of every architecture
they offer with their code, saves it with their code, imports it as ``saetool convert`` does, and compares encode and
decode on random inputs to 1e-5. Then it exports each SAE to every library that can hold it, loads the folder with that
library's code, and compares again. --checkouts DIR adds the libraries that are no packages (repositories_side.py).
--golden writes the small golden files that the default tests read, --readme the table of README.md.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import torch
from data import ANSWER, PROBE, read_probe
from safetensors.torch import load_file

from saetool.artifacts import foreign
from saetool.artifacts import header as h
from saetool.artifacts import sae as sae_files
from saetool.artifacts.foreign import export
from saetool.core.sae import SAE
from saetool.errors import SaetoolError

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
GOLDEN = ROOT / "tests" / "artifacts" / "golden_foreign"
PACKAGES = {
    "saelens": ("sae-lens==6.54.12", "saelens_side.py"),
    "sparsify": ("eai-sparsify==1.3.3", "sparsify_side.py"),
    "dictionary_learning": ("dictionary-learning==0.1.0", "dictionary_learning_side.py"),
}
TOLERANCE = 1e-5
"""Largest absolute difference allowed; values are of order 1 to 10."""


@dataclass
class Row:
    """One SAE of one library."""

    library: str
    name: str
    arch: str = ""
    imported: tuple[float, float] | None = None
    """Largest differences in z and x̂ between their code and ours, on their inputs."""
    proof: tuple[float, float] | None = None
    refused: str | None = None
    exported: dict[str, tuple[float, float] | str] = field(default_factory=dict)
    """By target: largest differences between our SAE and the target library's code, or why it was refused."""


def environment(work: Path, library: str) -> Path:
    """The Python of a library's environment, built on first use."""
    spec = PACKAGES[library][0]
    home = work / "environments" / library
    python = home / "bin" / "python"
    if (home / "done").is_file():
        return python
    print(f"building an environment for {spec}", file=sys.stderr)
    shutil.rmtree(home, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    site = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    (Path(site) / "zz_outer.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own packages come first
    constraints = home / "constraints.txt"
    constraints.write_text(f"torch=={torch.__version__.partition('+')[0]}\n")
    subprocess.run([str(python), "-m", "pip", "install", "-q", "-c", str(constraints), spec], check=True)
    # It comes for another build of torch than a CPU's, and then transformers cannot be imported. Nothing here needs it.
    subprocess.run([str(python), "-m", "pip", "uninstall", "-q", "-y", "torchvision"], check=True)
    (home / "done").touch()
    return python


def side(work: Path, library: str, action: str, folder: Path, checkouts: Path | None) -> None:
    """Run one side's script in its environment."""
    if library == "batchtopk":
        command = [sys.executable, str(HERE / "repositories_side.py"), action, str(folder), str(checkouts)]
    else:
        command = [str(environment(work, library)), str(HERE / PACKAGES[library][1]), action, str(folder)]
    log = work / f"{library}-{action}.log"
    with open(log, "w") as file:
        done = subprocess.run(command, cwd=HERE, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        print(log.read_text()[-3000:], file=sys.stderr)
        raise SystemExit(f"{library} {action} failed, see {log}")


def differences(sae: SAE, probe: dict[str, torch.Tensor], *, batch: bool) -> tuple[float, float]:
    """max |z − theirs|, max |x̂ − theirs|. Two latents for one signed one (abstopk) are put together again."""
    z = sae.encode(probe["x"], batch=batch)
    x_hat = sae.decode(z, probe["x"])
    theirs = probe["z"]
    if z.shape[1] == 2 * theirs.shape[1]:
        z = z[:, : theirs.shape[1]] - z[:, theirs.shape[1] :]
    return float((z - theirs).abs().max()), float((x_hat - probe["x_hat"]).abs().max())


def import_all(made: Path, library: str) -> list[tuple[Row, Path, sae_files.SAEFile | None]]:
    rows = []
    for probe in sorted(made.rglob(PROBE)):
        folder = probe.parent
        row = Row(library, str(folder.relative_to(made)))
        try:
            loaded = sae_files.load(folder)
        except SaetoolError as error:
            row.refused = error.message.partition(": ")[2]
            rows.append((row, folder, None))
            continue
        batch = loaded.inference == "batchtopk" or folder.name.endswith("checkpoint")
        row.arch = loaded.sae.arch
        row.imported = differences(loaded.sae, read_probe(folder), batch=batch)
        proof = loaded.header.config["proof"]
        row.proof = (proof["max_difference_z"], proof["max_difference_x_hat"])
        rows.append((row, folder, loaded))
    return rows


def export_all(work: Path, rows: list[tuple[Row, Path, sae_files.SAEFile | None]], checkouts: Path | None) -> None:
    """Every imported SAE to every target; then each target's code loads the folders and answers."""
    out = work / "exported"
    shutil.rmtree(out, ignore_errors=True)
    for target in foreign.WRITERS:
        (out / target).mkdir(parents=True)
        for row, folder, loaded in rows:
            if loaded is None:
                continue
            name = f"{row.library}-{row.name}".replace("/", "-")
            plan = h.Plan("convert", h.EXPORT, {"to": target}, [loaded.as_input("sae")], [loaded.header])
            try:
                export.write(out / target / name, loaded.sae, loaded.header, plan, target)
            except SaetoolError as error:
                row.exported[target] = error.message
                continue
            shutil.copy(folder / PROBE, out / target / name / PROBE)
        if target in PACKAGES or (target == "batchtopk" and checkouts):
            side(work, target, "check", out / target, checkouts)
        for row, _, loaded in rows:
            place = out / target / f"{row.library}-{row.name}".replace("/", "-")
            if loaded is not None and target not in row.exported and (place / ANSWER).is_file():
                answer = load_file(place / ANSWER)
                probe = {"x": read_probe(place)["x"], **answer}
                row.exported[target] = differences(loaded.sae, probe, batch=loaded.inference == "batchtopk")


def worst(pairs: list[tuple[float, float]]) -> str:
    return f"{max(max(p) for p in pairs):.1e}" if pairs else "–"


def cell(rows: list[Row], target: str) -> str:
    """Exports of one library's SAEs to ``target``: how many could be held, and the largest difference."""
    held = [r.exported[target] for r in rows if isinstance(r.exported.get(target), tuple)]
    tried = [r for r in rows if target in r.exported]
    return f"{len(held)}/{len(tried)}, {worst(held)}" if tried else "–"  # type: ignore[arg-type]


def others(work: Path, made: Path, library: str) -> dict[str, list[float] | str]:
    """SAELens' own loaders on ``library``'s folders."""
    place = work / f"others-{library}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for probe in sorted(made.rglob(PROBE)):
        shutil.copytree(probe.parent, place / str(probe.parent.relative_to(made)).replace("/", "-"))
    side(work, "saelens", "others", place, None)
    return json.loads((place / "saelens_reads.json").read_text())


def table(rows: list[Row], reads: dict[str, dict[str, list[float] | str]]) -> str:
    """The README's table: rows are who wrote it, columns who reads it."""
    lines = [
        "| written by ↓, read by → | saetool | SAELens | sparsify | dictionary_learning |",
        "|---|---|---|---|---|",
    ]
    labels = {
        "saelens": "SAELens 6.54.12",
        "sparsify": "sparsify 1.3.3",
        "dictionary_learning": "dictionary_learning 0.1.0",
        "batchtopk": "BatchTopK, matryoshka_sae, OpenAI",
    }
    for library in dict.fromkeys(r.library for r in rows):
        mine = [r for r in rows if r.library == library]
        read = [r.imported for r in mine if r.imported]
        own = {target: "its own" if target == library else "no" for target in PACKAGES}
        if library in reads:
            good = [v for v in reads[library].values() if isinstance(v, list) and max(v) <= TOLERANCE]
            own["saelens"] = f"{len(good)}/{len(reads[library])} as written"
        cells = " | ".join(own[target] for target in PACKAGES)
        lines.append(f"| {labels[library]} | {len(read)}/{len(mine)}, {worst(read)} | {cells} |")
    through = " | ".join(cell(rows, target) for target in PACKAGES)
    lines.append(f"| saetool (what it read above, exported) | yes | {through} |")
    return "\n".join(lines)


def write_golden(rows: list[tuple[Row, Path, sae_files.SAEFile | None]]) -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    for row, folder, _ in rows:
        place = GOLDEN / row.library / row.name
        place.mkdir(parents=True)
        for file in folder.iterdir():
            if file.is_file() and file.suffix in (".json", ".safetensors", ".pt") and file.stat().st_size < 40_000:
                shutil.copy(file, place / file.name)
    for run in {folder.parent for row, folder, _ in rows if row.library == "sparsify"}:
        if (run / "config.json").is_file():
            shutil.copy(run / "config.json", GOLDEN / "sparsify" / "config.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("interop-work"))
    parser.add_argument("--checkouts", type=Path)
    parser.add_argument("--golden", action="store_true")
    parser.add_argument("--readme", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    work = options.work.resolve()
    checkouts = options.checkouts.resolve() if options.checkouts else None
    work.mkdir(parents=True, exist_ok=True)
    all_rows: list[tuple[Row, Path, sae_files.SAEFile | None]] = []
    reads: dict[str, dict[str, list[float] | str]] = {}
    for library in [*PACKAGES, *(["batchtopk"] if checkouts else [])]:
        made = work / "made" / library
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        side(work, library, "make", made, checkouts)
        all_rows += import_all(made, library)
        if library in ("sparsify", "dictionary_learning"):
            reads[library] = others(work, made, library)
    export_all(work, all_rows, checkouts)
    rows = [row for row, _, _ in all_rows]
    report(rows, reads)
    if options.golden:
        write_golden(all_rows)
    text = table(rows, reads)
    print(text)
    if options.readme:
        readme = ROOT / "README.md"
        pattern = r"(<!-- interop: generated -->\n).*?(<!-- /interop -->)"
        readme.write_text(re.sub(pattern, lambda m: m[1] + text + "\n" + m[2], readme.read_text(), flags=re.DOTALL))
    bad = [r for r in rows if r.imported and max(r.imported) > TOLERANCE]
    bad += [r for r in rows for v in r.exported.values() if isinstance(v, tuple) and max(v) > TOLERANCE]
    if bad:
        raise SystemExit(f"differences above {TOLERANCE:g}: {', '.join(f'{r.library}/{r.name}' for r in bad)}")


def report(rows: list[Row], reads: dict[str, dict[str, list[float] | str]]) -> None:
    """Every SAE in full, on standard output."""
    for row in rows:
        said = (
            f"refused: {row.refused}"
            if row.imported is None
            else f"{row.arch:10s} {row.imported[0]:.1e} {row.imported[1]:.1e}"
        )
        print(f"{row.library:20s} {row.name:24s} {said}")
        for target, result in row.exported.items():
            said = result if isinstance(result, str) else f"{result[0]:.1e} {result[1]:.1e}"
            print(f"{'':20s} {'':24s}   → {target}: {said}")
    for library, results in reads.items():
        for name, result in results.items():
            said = result if isinstance(result, str) else f"{result[0]:.1e} {result[1]:.1e}"
            print(f"SAELens reading {library}/{name}: {said}")


if __name__ == "__main__":
    main()
