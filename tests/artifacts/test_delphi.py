"""Latents as delphi stores them: the same windows as from our own cache."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_sae
from planted_text import CTX, STRINGS, D, planted_cache, planted_sae
from safetensors.numpy import save_file
from typer.testing import CliRunner

from saetool.artifacts import container, delphi
from saetool.artifacts import header as h
from saetool.artifacts.cache import Cache
from saetool.cli import app
from saetool.config import AutointerpConfig
from saetool.engines import autointerp, stretches
from saetool.engines.activations import Encoded, Stored
from saetool.errors import ArtifactError

CONFIG = AutointerpConfig(window=16, min_firing=8, n_quantile=3, skip_positions=0)


def silent(n: int) -> None:
    """No progress bar."""


def save_delphi(folder: Path, cache: Cache, splits: int = 3, relative: bool = True) -> Path:
    """The activations of the planted SAE, as delphi would write them: ranges of latents, float16 or float32."""
    folder.mkdir()
    tokens = np.concatenate([cache.row_tensor(s, "tokens").numpy() for s in ("train", "heldout")]).reshape(-1, CTX)
    acts = torch.cat([t["acts"] for s in ("train", "heldout") for t in cache.iter_split(s)])
    z = planted_sae().encode(acts).numpy()
    edges = np.linspace(0, D, splits + 1).astype(int)
    for first, end in itertools.pairwise(edges):
        row, latent = np.nonzero(z[:, first:end])
        shown = latent if relative else latent + first
        locations = np.stack([row // CTX, row % CTX, shown], axis=1).astype(np.uint16)
        values = z[row, latent + first].astype(np.float32)
        tensors = {"locations": locations, "activations": values, "tokens": tokens.astype(np.int64)}
        save_file(tensors, folder / f"{first}_{end - 1}.safetensors")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return planted_cache(tmp_path_factory.mktemp("delphi") / "acts")


@pytest.mark.parametrize("relative", [True, False], ids=["newer", "older"])
def test_windows_are_the_same_as_from_the_cache(cache: Cache, tmp_path: Path, relative: bool) -> None:
    stored = Stored(delphi.open_delphi(save_delphi(tmp_path / "d", cache, relative=relative)), D)
    ours = Encoded(planted_sae(), cache, ("train", "heldout"), "cpu")
    assert stored.n_rows == ours.n_rows
    assert (stored.counts(None, silent) == ours.counts(None, silent)).all()
    some = [1, 12, 7]
    for a, b in zip(stored.collect(some, silent), ours.collect(some, silent), strict=True):
        assert a.latent == b.latent
        assert (a.rows == b.rows).all() and (a.values == b.values).all()
    # Contexts are documents there: our text is cut in the same way before windows are drawn.
    theirs, text = stored.text(0), ours.text(0)
    assert (theirs.tokens == text.tokens).all()
    by_context = stretches.cut(
        text.tokens, np.repeat(np.arange(len(text.tokens) // CTX), CTX), *[np.arange(len(text.tokens)) // CTX],
        np.arange(len(text.tokens)) % CTX,
    )  # fmt: skip
    assert (by_context.first == theirs.first).all() and (by_context.size == theirs.size).all()
    for firing in ours.collect(some, silent):
        parts = stretches.divide(by_context.document, CONFIG)
        a = autointerp.explain_latent(firing, theirs, parts, CONFIG)
        b = autointerp.explain_latent(firing, by_context, parts, CONFIG)
        assert a.table == b.table
        assert (a.windows.tokens == b.windows.tokens).all() and (a.windows.source == b.windows.source).all()


def test_first_positions_are_in_no_window(cache: Cache, tmp_path: Path) -> None:
    stored = Stored(delphi.open_delphi(save_delphi(tmp_path / "d", cache)), D)
    for skip in (1, 5):
        text = stored.text(skip)
        assert (text.position == skip).all() and (text.size == CTX - skip).all()
        (firing,) = stored.collect([3], silent)
        inside = text.inside(firing)
        assert (inside.rows % CTX >= skip).all()
        assert len(inside.rows) == (firing.rows % CTX >= skip).sum()


def test_the_command_reads_it_with_a_tokenizer(cache: Cache, tmp_path: Path, tiny_model_dir: Path) -> None:
    save_sae(tmp_path / "sae.st", planted_sae())
    folder = save_delphi(tmp_path / "d", cache)

    def run(*options: object):
        words = ["autointerp", tmp_path / "sae.st", "--acts", folder, "-o", tmp_path / "x.jsonl", *options]
        return CliRunner().invoke(app, [str(w) for w in (*words, "--window", 16, "--min-firing", 8)])

    assert "pass --tokenizer" in run().stderr
    assert "has no splits" in " ".join(run("--on", "train", "--tokenizer", "x").stderr.split()).replace("have", "has")
    result = run("--tokenizer", tiny_model_dir, "--latents", "0,1,2")
    assert result.exit_code == 0, result.stderr
    header, records = container.read_jsonl(tmp_path / "x.jsonl")
    assert header.inputs[1]["schema"] == "delphi/latents"
    assert all(r["scores"]["simulate"]["correlation"] > 0.95 for r in records)
    assert json.loads(json.dumps(header.config["strings"])) and len(STRINGS) == 24
    assert run("--tokenizer", tiny_model_dir, "--latents", "0,1,2").stderr.count("up to date") == 1
    assert container.read_header(tmp_path / "x.windows.st").schema == h.WINDOWS


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.pop("tokens"), "lacks the tensor tokens"),
        (lambda t: t.pop("locations"), "lacks the tensor locations"),
        (lambda t: t.update(locations=t["locations"][:, :2].copy()), r"where \[\d+, 3\] was expected"),
        (lambda t: t["activations"].__setitem__(0, np.nan), "NaN or infinity"),
        (lambda t: t["locations"].__setitem__((0, 1), 999), "position 999 among 64"),
        (lambda t: t["locations"].__setitem__((0, 2), 500), "latent 500 among 22"),
    ],
)
def test_damaged_files_are_named(cache: Cache, tmp_path: Path, damage, words: str) -> None:
    folder = save_delphi(tmp_path / "d", cache, splits=1)
    (file,) = folder.iterdir()
    from safetensors.numpy import load_file

    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file)
    with pytest.raises(ArtifactError, match=words):
        list(Stored(delphi.open_delphi(folder), D).collect([0], silent))


def test_a_file_that_is_cut_off_is_named(cache: Cache, tmp_path: Path) -> None:
    folder = save_delphi(tmp_path / "d", cache, splits=1)
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="cut off"):
        delphi.open_delphi(folder)
