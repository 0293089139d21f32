"""`saetool cache --from-tensors`: any matrix becomes a cache that the other verbs read."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import D, sparse_data
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from saetool.artifacts.cache import HELDOUT, TRAIN, Cache, open_cache
from saetool.cli import app
from saetool.config import CacheConfig
from saetool.errors import ArtifactError

N = 600


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["cache", *map(str, arguments)])


def made(result: Result) -> Cache:
    assert result.exit_code == 0, result.stderr
    return open_cache(Path(result.stdout.strip()))


@pytest.fixture
def acts() -> torch.Tensor:
    return sparse_data(N)


@pytest.fixture
def npy(acts: torch.Tensor, tmp_path: Path) -> Path:
    np.save(tmp_path / "vit.npy", acts.numpy())
    return tmp_path / "vit.npy"


def rows(cache: Cache) -> dict[int, torch.Tensor]:
    """Row number in the input → what is stored."""
    found = {}
    for split in (TRAIN, HELDOUT):
        whole = torch.cat([part["acts"].float() for part in cache.iter_split(split)])
        found |= dict(zip(cache.row_tensor(split, "positions").tolist(), whole, strict=True))
    return found


def test_every_row_is_in_one_split_as_it_was(npy: Path, acts: torch.Tensor, tmp_path: Path) -> None:
    cache = made(invoke("--from-tensors", npy, "-o", tmp_path / "acts"))
    found = rows(cache)
    assert sorted(found) == list(range(N)) and all(torch.equal(found[i], acts[i]) for i in range(N))
    assert cache.rows(HELDOUT) == pytest.approx(N / 10, abs=2) and cache.d_in == D
    assert (cache.storage, cache.header.model["hook_name"]) == ("float32", "vit")


def test_rows_of_one_id_are_on_one_side(npy: Path, tmp_path: Path) -> None:
    ids = torch.randint(0, 40, (N,), generator=torch.Generator().manual_seed(0)) * 1_000_003 - 7
    np.save(tmp_path / "image.npy", ids.numpy())
    cache = made(invoke("--from-tensors", npy, "--ids", tmp_path / "image.npy", "--heldout", 0.3, "-o", tmp_path / "a"))
    train, held = (set(cache.row_tensor(split, "ids").tolist()) for split in (TRAIN, HELDOUT))
    assert train and held and not train & held
    for split in (TRAIN, HELDOUT):
        positions, mine = cache.row_tensor(split, "positions").long(), cache.row_tensor(split, "ids")
        assert torch.equal(mine, ids[positions])
        assert len(cache.row_tensor(split, "documents").unique()) == len(mine.unique())
    assert sum(cache.splits[s]["documents"] for s in (TRAIN, HELDOUT)) == 40


def test_safetensors_of_several_files_shards_and_types(
    acts: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CacheConfig, "shard_bytes", 50 * D * 2)
    group = torch.arange(N) // 3
    for name, part in (("a", slice(0, 250)), ("b", slice(250, N))):
        save_file({"x": acts[part].bfloat16(), "group": group[part], "bias": acts[0]}, tmp_path / f"{name}.safetensors")
    given = ["--from-tensors", tmp_path / "a.safetensors", "--from-tensors", tmp_path / "b.safetensors"]
    cache = made(invoke(*given, "--ids", "group", "-o", tmp_path / "acts"))
    assert cache.storage == "bfloat16" and len(cache.shards) > 8
    found = rows(cache)
    assert all(torch.equal(found[i], acts[i].bfloat16().float()) for i in range(N)) and len(found) == N
    eight = made(invoke(*given, "--store", "int8", "--tokens", 100, "-o", tmp_path / "eight"))
    assert eight.storage == "int8" and sorted(rows(eight)) == list(range(100))


def test_center_and_max_norm_work_as_with_text(npy: Path, acts: torch.Tensor, tmp_path: Path) -> None:
    cache = made(invoke("--from-tensors", npy, "--center", "--max-norm", 1.3, "-o", tmp_path / "acts"))
    centred = acts - acts.mean(1, keepdim=True)
    norms = centred.norm(dim=1)
    kept = (norms <= 1.3 * norms.median()).nonzero().squeeze(1)
    found = rows(cache)
    assert sorted(found) == kept.tolist() and 0 < len(kept) < N
    assert all(torch.allclose(found[i], centred[i]) for i in kept.tolist())
    assert cache.header.config["rows_dropped_by_norm"] == N - len(kept)


def test_training_reads_it_and_text_is_said_to_be_missing(npy: Path, tmp_path: Path) -> None:
    cache = made(invoke("--from-tensors", npy, "-o", tmp_path / "acts"))
    sae = tmp_path / "sae.st"
    command = ["train", tmp_path / "acts", "--latents", "32", "--k", "3", "--tokens", "2k", "--batch-size", "100"]
    trained = CliRunner().invoke(app, [*map(str, command), "-o", str(sae), "--quiet"])
    assert trained.exit_code == 0 and sae.exists(), trained.stderr
    for what in (lambda: cache.input_ids(TRAIN), lambda: cache.row_tensor(TRAIN, "tokens"), lambda: cache.vocabulary):
        with pytest.raises(ArtifactError, match="made from tensors"):
            what()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_verbs_that_need_no_text_work_on_it_and_the_others_say_so(
    npy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made(invoke("--from-tensors", npy, "-o", "acts"))
    done = [
        run(
            *["train", "acts", "--k", "3", "--tokens", "2k", "--batch-size", "100"],
            "--latents",
            "16,32",
            "-o",
            "raw-{latents}.st",
        ),
        *(run("threshold", f"raw-{n}.st", "acts", "-o", f"sae-{n}.st") for n in (16, 32)),
        run("eval", "sae-16.st", "sae-32.st", "--acts", "acts", "--by", "position", "-o", "eval.json"),
        run("stitch", "sae-16.st", "sae-32.st", "--acts", "acts", "-o", "stitch.json"),
        run("report", ".", "-o", "report.html"),
    ]
    for result in done:
        assert result.exit_code == 0, result.stderr
    assert "nan" not in "".join(result.stderr for result in done)
    for refused in (
        ["eval", "sae-16.st", "--acts", "acts", "--ce"],
        ["eval", "sae-16.st", "--acts", "acts", "--by", "token"],
        ["stitch", "sae-16.st", "sae-32.st", "--acts", "acts", "--ce"],
        ["autointerp", "sae-16.st", "--acts", "acts"],
    ):
        result = run(*refused)
        assert result.exit_code == 1 and result.stdout == ""
        line, hint = result.stderr.splitlines()
        assert line == f"saetool {refused[0]}: acts: made from tensors, so there is no text in it"
        assert hint == "hint: cache text instead"


def test_the_same_again_is_up_to_date_and_the_dry_run_tells(npy: Path, tmp_path: Path) -> None:
    out = tmp_path / "acts"
    plan = json.loads(invoke("--from-tensors", npy, "-o", out, "--dry-run", "--json").stdout)
    assert not out.exists() and plan["rows_train"] + plan["rows_heldout"] == N and plan["width"] == D
    made(invoke("--from-tensors", npy, "-o", out))
    assert "up to date" in invoke("--from-tensors", npy, "-o", out).stderr
    assert "will not" in (r := invoke("--from-tensors", npy, "--center", "-o", out)).stderr or r.exit_code == 1


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--from-tensors", "gone.npy"], 1, "gone.npy: no such file"),
        (["--from-tensors", "line.npy"], 1, "where a matrix of floats was expected"),
        (["--from-tensors", "text.npy"], 1, "not a readable .npy"),
        (["--from-tensors", "notes.txt"], 1, "neither .npy nor .safetensors"),
        (["--from-tensors", "two.safetensors"], 1, "which matrix? It has a [4, 3], b [4, 3]"),
        (["--from-tensors", "two.safetensors", "--tensor", "c"], 1, 'no matrix of floats "c"'),
        (["--from-tensors", "two.safetensors", "--tensor", "a", "--ids", "c"], 1, 'no tensor "c" for --ids'),
        (["--from-tensors", "two.safetensors", "--tensor", "a", "--ids", "b"], 1, "a list of whole numbers"),
        (["--from-tensors", "vit.npy", "--ids", "b"], 2, "holds one matrix and no names"),
        (["--from-tensors", "vit.npy", "--ids", "few.npy"], 1, "3 ids for 600 rows"),
        (["--from-tensors", "vit.npy", "--from-tensors", "narrow.npy"], 1, "width 3, and vit.npy has 16"),
        (["--from-tensors", "nan.npy"], 1, "NaN or infinity"),
        (["--from-tensors", "vit.npy", "--layer", "3"], 2, "needs no text, model or hook"),
        (["--from-tensors", "vit.npy", "-o", "acts-{hook}"], 2, "tensors have no hook"),
        (["--tensor", "a"], 2, "go with --from-tensors"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    npy: Path, tmp_path: Path, more: list[str], code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("line.npy", np.zeros(4, dtype=np.float32))
    np.save("few.npy", np.arange(3))
    np.save("narrow.npy", np.zeros((4, 3), dtype=np.float32))
    np.save("nan.npy", np.full((40, 3), np.nan, dtype=np.float32))
    Path("text.npy").write_text("text")
    Path("notes.txt").write_text("text")
    save_file({"a": torch.zeros(4, 3), "b": torch.zeros(4, 3)}, "two.safetensors")
    result = invoke(*more)
    assert result.exit_code == code, result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith("hint: ")]
    assert len(lines) == 1 and message in lines[0]
    assert not Path("acts").exists()
