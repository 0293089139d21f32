"""Which library's SAE lies at a path: by the files in a folder, or by the tensors' names of a file alone."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from saetool.artifacts.container import FOREIGN_SUFFIXES
from saetool.artifacts.foreign import files
from saetool.artifacts.foreign.imported import Asked, Found
from saetool.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

READS = "SAELens, sparsify, dictionary_learning, BatchTopK, OpenAI, Llamascopium, Llama Scope, Gemma Scope, Qwen Scope"
LAYOUTS: tuple[tuple[str, tuple[str, ...], str, tuple[str, ...]], ...] = (
    # format, files it must have beside the weights, weights, further files that are read if there
    ("saelens", ("cfg.json",), "sae_weights.safetensors", ("activation_scaler.json",)),
    ("sparsify", ("cfg.json",), "sae.safetensors", ("../config.json", "../../config.json")),
    ("dictionary_learning", ("config.json",), "ae.pt", ()),
    ("batchtopk", ("config.json",), "sae.pt", ()),
    ("llamascopium", ("config.json",), "sae_weights.safetensors", ()),
    ("llama_scope", ("hyperparams.json",), "checkpoints/final.safetensors", ()),
    ("gemma_scope_2", ("config.json",), "params.safetensors", ()),
    ("gemma_scope", (), "params.npz", ()),
    ("gemma_scope_2", (), "params.safetensors", ()),
    ("dictionary_learning", (), "ae.pt", ()),
)
_INDEXED = ".index.json"
_LISTED = 12


def find(path: Path, where: str, asked: Asked) -> Found:
    """The SAE at ``path``, a folder or file that exists. Raises ``ArtifactError`` saying what is there instead."""
    name = path.resolve().name if path.name in ("", ".", "..") else path.name
    if path.is_dir():
        return _in_folder(path, where, name, asked)
    folder = path.parent
    for kind, needs, weights, more in LAYOUTS:
        if path.name == Path(weights).name and asked.format in (None, kind):
            home = path.parents[len(Path(weights).parts) - 1] if len(path.parents) >= len(Path(weights).parts) else None
            if home is not None and all((home / n).is_file() for n in needs):
                return _found(kind, where, home.name or name, home, needs, weights, more)
    homes = [folder, folder.parent] if folder.name == "checkpoints" else [folder]
    configs = tuple(home / "config.json" for home in homes if (home / "config.json").is_file())[:1]
    configs = configs if path.suffix in (".pt", ".pth") else ()
    kind = asked.format or _by_tensors(path, where, bool(configs))
    if kind not in ("dictionary_learning", "batchtopk"):
        configs = ()
    return Found(kind, where, name, folder, path, configs)


def _found(
    kind: str, where: str, name: str, home: Path, needs: tuple[str, ...], weights: str, more: tuple[str, ...]
) -> Found:
    extra = [home / n for n in more if (home / n).is_file()]
    index = home / (weights + _INDEXED)
    if not (home / weights).exists() and index.is_file():
        extra += [index, *files.indexed(index)]
    return Found(kind, where, name, home, home / weights, (*(home / n for n in needs), *extra))


def _in_folder(folder: Path, where: str, name: str, asked: Asked) -> Found:
    if (folder / "manifest.json").is_file():
        raise ArtifactError(f"{where}: is an activation cache where an SAE was expected", "give it as the cache")
    for kind, needs, weights, more in LAYOUTS:
        there = (folder / weights).is_file() or (folder / (weights + _INDEXED)).is_file()
        if there and all((folder / n).is_file() for n in needs) and asked.format in (None, kind):
            return _found(kind, where, name, folder, needs, weights, more)
    single = sorted(p for p in folder.iterdir() if p.suffix in FOREIGN_SUFFIXES and p.is_file())
    if len(single) == 1:
        return find(single[0], where, asked)
    choices = [str(p.relative_to(folder)) for p in single] or _below(folder)
    if choices:
        raise several(where, choices)
    held = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
    raise ArtifactError(
        f"{where}: no SAE that saetool can read (it holds {held})", f"read are {READS}; saetool's own are .st files"
    )


def several(where: str, choices: list[str]) -> ArtifactError:
    """The error for a place that holds more than one SAE: they are listed, none is picked."""
    shown = ", ".join(choices[:_LISTED]) + (f" and {len(choices) - _LISTED} more" if len(choices) > _LISTED else "")
    return ArtifactError(f"{where}: holds {len(choices)} SAEs: {shown}", f"name one: {where.rstrip('/')}/{choices[0]}")


def _below(folder: Path) -> list[str]:
    """Folders under ``folder``, up to three levels down, that hold an SAE."""
    names = {Path(weights).name for _, _, weights, _ in LAYOUTS}
    found: set[str] = set()
    for depth in ("*", "*/*", "*/*/*", "*/*/*/*"):
        for path in folder.glob(depth):
            if path.name in names and path.is_file():
                home = path.parent.parent if path.parent.name == "checkpoints" else path.parent
                if home != folder:
                    found.add(str(home.relative_to(folder)))
    return sorted(found, key=_natural)


def _natural(text: str) -> list[tuple[int, str]]:
    """Sorts average_l0_82 before average_l0_176."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def _by_tensors(path: Path, where: str, configured: bool) -> str:
    """The format of one file by its name and tensors' names."""
    if path.suffix == ".npz":
        return "gemma_scope"
    if path.suffix not in FOREIGN_SUFFIXES:
        raise ArtifactError(
            f"{where}: safetensors without a saetool header or the configuration of another library beside it",
            f"read are {READS}; give the SAE's folder",
        )
    t, _ = files.read_torch(path)
    if "pre_bias" in t:
        return "openai"
    if "encoder_linear.weight" in t:
        return "goodfire"
    if "jumprelu.log_threshold" in t:
        return "batchtopk"
    if {"encoder.weight", "decoder.weight"} <= set(t) or "group_sizes" in t:
        return "dictionary_learning"
    if {"W_enc", "W_dec", "b_enc", "b_dec"} <= set(t):
        return _bare(path, t, where, configured)
    held = ", ".join(sorted(t)[:6]) or "no tensor"
    raise ArtifactError(f"{where}: no SAE that saetool can read (it has {held})", f"read are {READS}")


def _bare(path: Path, t: dict[str, "Tensor"], where: str, configured: bool) -> str:
    """W_enc, W_dec, b_enc, b_dec and no more: three libraries use these names."""
    if re.fullmatch(r"layer\d+\.sae\.pt", path.name):
        return "qwen_scope"
    if configured:
        return "batchtopk"
    if "threshold" in t and t["threshold"].dim() == 1:
        return "dictionary_learning"
    d, f = len(t["b_dec"]), len(t["b_enc"])
    if d != f:
        return "batchtopk" if tuple(t["W_enc"].shape) == (d, f) else "qwen_scope"
    raise ConfigError(
        f"{where}: W_enc, W_dec, b_enc and b_dec alone, and square: which library wrote it?",
        "say it: --from batchtopk|qwen_scope",
    )
