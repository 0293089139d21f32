"""``saetool inspect``: header, history and shapes of any artifact, without torch."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from saetool.artifacts import container
from saetool.artifacts.header import KINDS
from saetool.options import DebugFlag, Json


def inspect(
    file: Annotated[
        Path, typer.Argument(help="A .st, .json or .jsonl artifact, a cache, or an SAE of another library.")
    ],
    json_: Json = False,
    debug: DebugFlag = False,
) -> None:
    """Show what a file is, what made it, and from what.

    Example: saetool inspect sae.st
    """
    shapes: dict[str, Any] = {}
    if container.is_foreign(file) and not (file / "manifest.json").is_file():
        from saetool.artifacts import sae as sae_files

        loaded = sae_files.load(file)
        header = loaded.header
        shapes = {n: ["F32", list(t.shape)] for n, t in sae_files.tensors_of(loaded.sae).items()}
    else:
        header = container.read_header(file)
    if file.suffix == ".st":
        shapes = {n: [t.dtype, list(t.shape)] for n, t in container.read_contents(file).tensors.items()}
    if json_:
        print(json.dumps({"header": header.to_json(), "tensors": shapes}, sort_keys=True, ensure_ascii=False))
        return
    print(f"{file}: {KINDS[header.schema]} ({header.schema}, saetool {header.version})")
    print(f"key      {header.key}")
    for title, fields in (("config", header.config), ("model", header.model)):
        for name, value in sorted(fields.items()):
            print(f"{title:<8} {name} = {_short(value)}")
    for name, value in (("seed", header.seed), ("dtype", header.dtype)):
        if value is not None:
            print(f"{name:<8} {value}")
    for name, (dtype, shape) in shapes.items():
        print(f"tensor   {name} {dtype} {shape}")
    for item in header.inputs:
        print(f"input    {item['role']}: {item['name']} sha256 {item['sha256'][:16]}… ({item['schema']})")
    for number, entry in enumerate(header.history, 1):
        options = " ".join(f"{k}={_short(v)}" for k, v in sorted(entry["options"].items()))
        print(f"history  {number}. {entry['verb']} {options} (saetool {entry['version']})")


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return text if len(text) <= 120 else text[:117] + "…"
