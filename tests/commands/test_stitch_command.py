"""``saetool stitch`` from the shell: records, stitched SAEs, streams and refusals."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import planted_pair, random_sae, save_sae, sparse_data, write_cache
from typer.testing import CliRunner, Result

from saetool.artifacts import container, records
from saetool.artifacts import header as h
from saetool.artifacts import sae as sae_files
from saetool.cli import app
from saetool.commands.stitch import stitch
from saetool.config import StitchConfig
from saetool.report.collect import collect


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a planted pair, ``small.st`` and ``large.st``."""
    monkeypatch.chdir(tmp_path)
    small, large = planted_pair()
    save_sae(Path("small.st"), small)
    save_sae(Path("large.st"), large)
    return tmp_path


@pytest.fixture
def acts() -> Path:
    """A cache of rows in which the planted directions fire."""
    small, large = planted_pair()
    strength = torch.rand(1280, large.d_sae, generator=torch.Generator().manual_seed(0)) + 0.5
    on = torch.rand(1280, large.d_sae, generator=torch.Generator().manual_seed(1)) < 0.15
    write_cache(Path("acts"), small.b_dec + (on * strength) @ large.W_dec + 0.01 * sparse_data(1280, 32))
    return Path("acts")


def saetool(*arguments: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(app, ["stitch", *map(str, arguments)], input=stdin)


def record(*arguments: object) -> dict:
    result = saetool(*arguments, "--quiet")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return json.loads(result.stdout)


def refused(*arguments: object, stdin: bytes | None = None) -> tuple[int, str]:
    """Exit code and the one line on standard error (and at most a hint)."""
    before = {p.name for p in Path().iterdir()}
    result = saetool(*arguments, stdin=stdin)
    lines = result.stderr.splitlines()
    assert result.exit_code != 0
    assert result.stdout == ""
    assert lines[0].startswith("saetool stitch: ")
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: "))
    assert {p.name for p in Path().iterdir()} == before
    return result.exit_code, lines[0]


def test_as_typed_it_prints_the_planted_answer():
    result = saetool("small.st", "large.st", "--theta", "0.7")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["saetool"]["schema"] == h.STITCH
    assert found["saetool"]["model"]["hook_name"] == "blocks.0.hook_resid_post"
    assert found["theta"] == 0.7
    assert [(s["name"], s["d_sae"], s["arch"], s["seed"]) for s in found["saes"]] == [
        ("small.st", 10, "jumprelu", 0),
        ("large.st", 20, "jumprelu", 0),
    ]
    [pair] = found["pairs"]
    assert (pair["n_small"], pair["n_large"]) == (10, 20)
    assert (pair["novel"], pair["reconstruction"], pair["unmatched_small"], pair["components"]) == (6, 14, 0, 10)
    assert (pair["novel_share"], pair["reconstruction_share"]) == (0.3, 0.7)
    assert pair["component_shapes"] == [[1, 1, 6], [1, 2, 4]]
    assert pair["largest_components"] == [[1, 2]] * 4 + [[1, 1]] * 6
    assert pair["nearest"][:14] == [*range(10), *range(4)]
    assert pair["small_sha256"] == h.sha256_file(Path("small.st"))
    assert len(pair["max_cosine"]["values"]) == 20
    assert [[s, big] for s, big, _ in pair["edges"]] == [[i, i] for i in range(10)] + [[i, 10 + i] for i in range(4)]
    assert [row["theta"] for row in pair["sweep"]] == list(StitchConfig.sweep)
    assert {row["novel"] for row in pair["sweep"]} == {6}
    assert pair["null"]["reconstruction_share"] == 0
    assert pair["data"] is None
    assert "1→1 ×6, 1→2 ×4" in result.stderr


def test_with_a_cache_it_measures_effects_groups_and_the_path(acts):
    [pair] = record("small.st", "large.st", "--acts", acts)["pairs"]
    data = pair["data"]
    assert (data["split"], data["n_tokens"]) == ("heldout", 256)
    assert data["auc"] == 1
    assert max(data["effects"]["delta_mse"][14:]) < 0 < min(data["effects"]["delta_mse"][:14])
    assert len(data["effects"]["firing_rate"]) == 20
    novel = next(g for g in data["groups"] if g["theta"] == 0.7)
    assert (novel["n_novel"], novel["n_reconstruction"]) == (6, 14)
    assert novel["novel_delta"] < 0 < novel["reconstruction_delta"]
    assert data["best_theta"] in [g["theta"] for g in data["groups"]]
    way = data["path"]
    assert (way["order"], way["bias"], way["theta"]) == ("random", "eq5", 0.7)
    assert (way["n_add_steps"], way["n_swap_steps"]) == (6, 10)
    assert len(way["mse"]) == len(way["l0"]) == len(way["n_latents"]) == 17
    assert way["n_latents"][0] == 10 and way["n_latents"][6] == 16 and way["n_latents"][-1] == 20
    assert way["mse"][0] == pytest.approx(data["mse_small"], rel=1e-12)
    assert way["mse"][-1] == pytest.approx(data["mse_large"], rel=1e-12)
    assert way["l0"][0] == pytest.approx(data["l0_small"])
    assert way["l0"][-1] == pytest.approx(data["l0_large"])
    assert max(data["path_end_error"].values()) < 1e-12
    assert data["alive"] == {"novel": 6, "reconstruction": 14, "novel_share": 0.3}


def test_own_numbers_are_those_of_the_sae_on_the_split_asked_for(acts):
    small = sae_files.load(Path("small.st")).sae
    for split, tokens, n in (("heldout", "100", 100), ("train", "1k", 1000)):
        [pair] = record("small.st", "large.st", "--acts", acts, "--split", split, "--tokens", tokens)["pairs"]
        shards = container.read_json(acts / "manifest.json")[1]["shards"]
        parts = [container.open_tensors(acts / s["name"], ["acts"])["acts"] for s in shards if s["split"] == split]
        x = torch.cat(parts)[:n]
        z = small.encode(x)
        assert pair["data"]["n_tokens"] == n
        assert pair["data"]["mse_small"] == pytest.approx(float((x - small.decode(z)).square().sum(1).mean()), rel=1e-5)
        assert pair["data"]["l0_small"] == pytest.approx(float((z > 0).sum()) / n)


def test_only_dead_latents_are_left_out_of_the_shares_of_the_living(acts):
    large = sae_files.load(Path("large.st")).sae
    threshold = large.threshold.clone()
    threshold[[0, 15]] = 1e6
    save_sae(Path("dead.st"), replace(large, threshold=threshold))
    [pair] = record("small.st", "dead.st", "--acts", acts)["pairs"]
    assert pair["novel"] == 6
    assert pair["data"]["dead_large"] == 2
    assert pair["data"]["alive"] == {"novel": 5, "reconstruction": 13, "novel_share": 5 / 18}


@pytest.mark.parametrize("bias", ["small", "large"])
def test_a_fixed_bias_reaches_only_its_own_end(acts, bias):
    [pair] = record("small.st", "large.st", "--acts", acts, "--bias", bias, "--order", "cosine")["pairs"]
    error = pair["data"]["path_end_error"]
    other = {"small": "large", "large": "small"}[bias]
    assert error[f"mse_{bias}"] < 1e-12
    assert error[f"mse_{other}"] is None
    assert (pair["data"]["path"]["bias"], pair["data"]["path"]["order"]) == (bias, "cosine")


def test_several_saes_give_a_pair_each_as_they_do_alone(acts):
    small, _ = planted_pair()
    save_sae(Path("other.st"), replace(small, b_dec=small.b_dec + 0.1))
    alone = [
        record("other.st", "small.st", "--acts", acts)["pairs"][0],
        record("small.st", "large.st", "--acts", acts)["pairs"][0],
    ]
    together = record("other.st", "small.st", "large.st", "--acts", acts)
    assert [s["name"] for s in together["saes"]] == ["other.st", "small.st", "large.st"]
    for one, two in zip(together["pairs"], alone, strict=True):
        for name in ("small", "large", "novel", "components", "edges", "null", "sweep"):
            assert one[name] == two[name]
        assert one["data"]["path"]["mse"] == pytest.approx(two["data"]["path"]["mse"], rel=1e-12)


def test_the_same_inputs_give_the_same_bytes_and_another_seed_another_order(acts):
    for name, seed in (("a.json", 1), ("b.json", 1), ("c.json", 2)):
        result = saetool("small.st", "large.st", "--acts", acts, "--seed", seed, "-o", name, "--quiet")
        assert (result.exit_code, result.stdout) == (0, f"{name}\n")
    a, b, c = (Path(name).read_bytes() for name in ("a.json", "b.json", "c.json"))
    assert a == b
    assert json.loads(a)["pairs"][0]["data"]["path"]["mse"] != json.loads(c)["pairs"][0]["data"]["path"]["mse"]


def test_an_existing_output_is_kept_refused_or_replaced(acts):
    assert saetool("small.st", "large.st", "-o", "r.json").exit_code == 0
    before = Path("r.json").read_bytes()
    again = saetool("small.st", "large.st", "-o", "r.json", "--order", "index")  # without a cache, order plays no part
    assert (again.exit_code, again.stdout) == (0, "r.json\n")
    assert "up to date" in again.stderr
    code, line = refused("small.st", "large.st", "-o", "r.json", "--theta", "0.5")
    assert code == 1
    assert "theta 0.7 there, 0.5 here" in line
    assert Path("r.json").read_bytes() == before
    assert saetool("small.st", "large.st", "-o", "r.json", "--theta", "0.5", "--overwrite").exit_code == 0
    assert json.loads(Path("r.json").read_bytes())["theta"] == 0.5


def test_json_gives_one_line_about_the_record_written(acts):
    result = saetool("small.st", "large.st", "--acts", acts, "-o", "r.json", "--json", "--quiet")
    found = json.loads(result.stdout)
    assert (found["kind"], found["path"], found["sha256"]) == ("stitch", "r.json", h.sha256_file(Path("r.json")))
    assert found["metrics"]["pairs"][0]["novel"] == 6
    assert found["metrics"]["pairs"][0]["auc"] == 1


def test_a_second_run_says_the_same_numbers(acts):
    for arguments in (["--acts", acts, "-o", "r.json"], ["-o", "both.st"]):
        first, second = (saetool("small.st", "large.st", *arguments, "--json", "--quiet") for _ in range(2))
        now = json.loads(second.stdout)["metrics"]
        assert now
        assert now.items() <= json.loads(first.stdout)["metrics"].items()
    assert now == {"take": "small+novel", "n_small": 10, "n_large": 6}


def test_a_long_record_is_two_files_that_are_drawn_as_one(acts, monkeypatch):
    saetool("small.st", "large.st", "--acts", acts, "-o", "one.json", "--quiet")
    monkeypatch.setattr(records, "INLINE", 100)
    monkeypatch.setattr(records, "LONG", 10)
    result = saetool("small.st", "large.st", "--acts", acts, "-o", "two.json")
    assert (result.exit_code, result.stdout) == (0, "two.json\n")
    assert "two.arrays.st" in result.stderr
    pair = json.loads(Path("two.json").read_bytes())["pairs"][0]
    assert (pair["novel"], pair["data"]["path"]["mse"]) == (6, {"array": "pairs.0.data.path.mse"})
    assert container.read_header(Path("two.arrays.st")).schema == h.ARRAYS
    one, two = (collect([Path(f"{name}.json")]).of(h.STITCH)[0] for name in ("one", "two"))
    assert one.payload == two.payload
    assert one.header == two.header
    piped = record("small.st", "large.st", "--acts", acts)
    assert {**piped, "saetool": None} == {**one.payload, "saetool": None}


def test_a_long_record_is_up_to_date_with_both_files_and_replaced_only_if_asked(acts, monkeypatch):
    monkeypatch.setattr(records, "INLINE", 100)
    monkeypatch.setattr(records, "LONG", 10)
    long = ("small.st", "large.st", "--acts", acts, "-o", "r.json")
    saetool(*long, "--quiet")
    before = {name: Path(name).read_bytes() for name in ("r.json", "r.arrays.st")}
    assert "up to date" in saetool(*long).stderr
    Path("r.arrays.st").unlink()
    found = collect([Path()])
    assert not found.of(h.STITCH)
    assert found.warnings == ("r.json: its long lists are in r.arrays.st, which is not beside it: left out",)
    assert "up to date" not in saetool(*long).stderr
    assert {name: Path(name).read_bytes() for name in before} == before
    Path("r.json").unlink()
    Path("r.arrays.st").write_text("notes")
    assert refused(*long) == (1, "saetool stitch: r.arrays.st: not JSON (Expecting value: line 1 column 1 (char 0)): "
                                 "exists, will not be replaced")  # fmt: skip
    assert saetool(*long, "--overwrite").exit_code == 0
    assert {name: Path(name).read_bytes() for name in before} == before


def test_a_st_output_is_the_small_sae_with_the_novel_latents(acts):
    result = saetool("small.st", "large.st", "-o", "both.st", "--json", "--quiet")
    assert json.loads(result.stdout)["kind"] == "sae"
    both, small, large = (sae_files.load(Path(name)) for name in ("both.st", "small.st", "large.st"))
    sources = [{"name": f.name, "sha256": f.sha256, "d_sae": f.sae.d_sae} for f in (small, large)]
    assert both.header.config["stitched"] == {
        "take": "small+novel", "theta": 0.7, "bias": "eq5", "n_small": 10, "n_large": 6,
        "sources": sources, "latents": [[0, 0, 10], [1, 14, 6]],
    }  # fmt: skip
    assert [entry["verb"] for entry in both.header.history] == ["train", "train", "stitch"]
    x = container.open_tensors(acts / "shard-00000.st", ["acts"])["acts"]
    alpha = 10 / 16
    expected = alpha * small.sae.b_dec + (1 - alpha) * large.sae.b_dec
    expected = expected + small.sae.encode(x) @ small.sae.W_dec + large.sae.encode(x)[:, 14:] @ large.sae.W_dec[14:]
    torch.testing.assert_close(both.sae.decode(both.sae.encode(x)), expected, rtol=1e-4, atol=1e-4)
    record("small.st", "both.st", "--acts", acts)  # an ordinary SAE: it can be stitched in its turn


def test_two_saes_of_one_width_can_be_compared():
    [pair] = record("small.st", "small.st")["pairs"]
    assert (pair["novel"], pair["components"], pair["component_shapes"]) == (0, 10, [[1, 1, 10]])


def test_an_sae_may_come_from_a_pipe(acts):
    piped = saetool("-", "large.st", "--quiet", stdin=Path("small.st").read_bytes())
    assert piped.exit_code == 0
    assert json.loads(piped.stdout)["pairs"][0]["small"] == "-"
    assert json.loads(piped.stdout)["pairs"][0]["novel"] == 6


def test_a_dry_run_writes_nothing_and_loads_no_torch(acts):
    result = saetool("small.st", "large.st", "--acts", acts, "-o", "r.json", "--dry-run")
    assert result.exit_code == 0
    assert "small.st (10)" in result.stdout
    assert not Path("r.json").exists()
    code = (
        "import sys; from saetool.cli import app\n"
        "app(['stitch', 'small.st', 'large.st', '--dry-run'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_hooks_that_differ_are_warned_of(acts):
    file = sae_files.load(Path("large.st"))
    sae_files.save(Path("large.st"), file.sae, replace(file.header, model={"hook_name": "blocks.5.hook_resid_pre"}))
    result = saetool("small.st", "large.st", "--acts", acts)
    assert result.exit_code == 0
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2
    assert all("large.st was trained on blocks.5.hook_resid_pre" in line for line in warnings)


def test_an_sae_wider_than_the_next_is_a_usage_error():
    code, line = refused("large.st", "small.st")
    assert code == 2
    assert "large.st has 20 latents and comes before small.st with 10" in line


@pytest.mark.parametrize("theta", ["-1", "1.5", "nan"])
def test_theta_must_be_a_cosine_above_minus_1(theta):
    code, line = refused("small.st", "large.st", "--theta", theta)
    assert code == 2
    assert f"--theta {float(theta)}: not a cosine above -1 and up to 1" in line


def test_usage_errors_say_what_is_wrong(acts):
    for arguments, words in (
        (["small.st"], "one SAE given"),
        (["-", "-"], "only one input can be -"),
        (["small.st", "large.st", "-o", "r.txt"], "neither .json nor .st"),
        (["small.st", "small.st", "large.st", "-o", "r.st"], "3 were given"),
        (["small.st", "large.st", "--acts", "acts", "--split", "test"], "--split test: unknown"),
        (["small.st", "large.st", "--tokens", "few"], "--tokens few: not a positive count"),
    ):
        code, line = refused(*arguments)
        assert code == 2
        assert words in line


def test_saes_and_caches_of_different_width_are_refused(acts):
    save_sae(Path("narrow.st"), random_sae(8, 16))
    code, line = refused("narrow.st", "large.st")
    assert code == 1
    assert "large.st: made for activations of width 32, and narrow.st for width 16" in line
    save_sae(Path("wide.st"), random_sae(9, 16))
    code, line = refused("narrow.st", "wide.st", "--acts", "acts")
    assert code == 1
    assert "narrow.st: made for activations of width 16, and acts holds width 32" in line


def test_wrong_and_damaged_inputs_are_named(acts):
    assert saetool("small.st", "large.st", "-o", "r.json").exit_code == 0
    Path("cut.st").write_bytes(Path("large.st").read_bytes()[:-20])
    for arguments, words in (
        (["small.st", "none.st"], "none.st: no such file"),
        (["small.st", "acts"], "acts: is an activation cache where an SAE was expected"),
        (["small.st", "r.json"], "r.json: is a stitching record (schema saetool/stitch@1) where an SAE was expected"),
        (["small.st", "cut.st"], "cut.st: cut off"),
        (["small.st", "large.st", "--acts", "large.st"], "large.st: is not an activation cache"),
        (["small.st", "large.st", "--acts", "none"], "none: no such cache"),
    ):
        code, line = refused(*arguments)
        assert code == 1
        assert words in line


@pytest.mark.parametrize("arch", ["topk", "batchtopk"])
def test_latents_selected_by_rank_are_not_merged_into_a_file(arch):
    large = sae_files.load(Path("large.st")).sae
    save_sae(Path("ranked.st"), replace(large, threshold=None, arch=arch, k=3))
    code, line = refused("small.st", "ranked.st", "-o", "both.st")
    assert code == 2
    assert f"ranked.st: latents of a {arch} SAE without a threshold cannot be put into another SAE" in line
    assert record("small.st", "ranked.st")["pairs"][0]["novel"] == 6  # the decoders alone can always be compared


def test_a_batchtopk_sae_without_threshold_is_refused_with_a_cache_and_told_what_to_run(acts):
    large = sae_files.load(Path("large.st")).sae
    save_sae(Path("batch.st"), replace(large, threshold=None, arch="batchtopk", k=3))
    result = saetool("small.st", "batch.st", "--acts", acts)
    assert result.exit_code == 2
    assert "batch.st: a BatchTopK SAE without a threshold cannot encode single tokens" in result.stderr
    assert "hint: saetool threshold batch.st" in result.stderr


def test_nan_in_the_weights_is_refused():
    large = sae_files.load(Path("large.st"))
    broken = replace(large.sae, W_dec=large.sae.W_dec * float("nan"))
    sae_files.save(Path("nan.st"), broken, large.header)
    code, line = refused("small.st", "nan.st")
    assert code == 1
    assert "W_dec holds NaN" in line


def test_option_defaults_are_those_of_the_config():
    import inspect

    defaults = {name: p.default for name, p in inspect.signature(stitch).parameters.items()}
    for name in ("theta", "split", "order", "bias", "seed"):
        assert defaults[name] == getattr(StitchConfig(), name)
