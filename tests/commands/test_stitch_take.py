"""``saetool stitch -o FILE.st --take``: the SAE of any state, its provenance; and what the record measures."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import planted_pair, random_sae, save_sae, write_cache
from typer.testing import CliRunner, Result

from saetool.artifacts import container
from saetool.artifacts import sae as sae_files
from saetool.artifacts.cache import open_cache
from saetool.cli import app
from saetool.core.sae import SAE
from saetool.engines.evaluate import reconstruct


def saetool(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def record(*arguments: object) -> dict:
    result = saetool("stitch", *arguments, "--quiet")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refused(*arguments: object) -> tuple[int, str]:
    before = {p.name for p in Path().iterdir()}
    result = saetool("stitch", *arguments)
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("warning: ", "stitch: "))]
    assert result.exit_code != 0
    assert result.stdout == ""
    assert lines[0].startswith("saetool stitch: ")
    assert len(lines) <= 2
    assert {p.name for p in Path().iterdir()} == before
    return result.exit_code, lines[0]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two random SAEs of 16 dimensions, ``a.st`` (12 latents) and ``b.st`` (20), and ``acts``."""
    monkeypatch.chdir(tmp_path)
    save_sae(Path("a.st"), random_sae(12, seed=1))
    save_sae(Path("b.st"), replace(random_sae(20, seed=2), subtract_b_dec=False))
    write_cache(Path("acts"))
    return tmp_path


def sae(name: str) -> SAE:
    return sae_files.load(Path(name)).sae


def own_numbers(name: str) -> tuple[float, float]:
    """MSE and L0 as ``saetool eval`` measures them."""
    *_, [found] = reconstruct([sae(name)], open_cache(Path("acts")), "heldout", 64)
    return found.quality.mse, found.quality.l0


@pytest.mark.parametrize(("order", "bias"), [("random", "eq5"), ("effect", "small"), ("cosine", "large")])
def test_the_sae_of_a_step_evaluates_to_the_numbers_of_the_path_there(order, bias):
    options = ["--theta", 0.4, "--order", order, "--bias", bias, "--seed", 3, "--acts", "acts"]
    [pair] = record("a.st", "b.st", *options)["pairs"]
    way = pair["data"]["path"]
    assert way["n_add_steps"] > 0 and 0 < way["n_swap_steps"] < len(way["mse"]) - 1 - way["n_add_steps"]
    for step in (0, way["n_add_steps"], way["n_add_steps"] + 2, len(way["mse"]) - 1):
        assert saetool("stitch", "a.st", "b.st", *options, "-o", f"{step}.st", "--take", f"path:{step}").exit_code == 0
        mse, l0 = own_numbers(f"{step}.st")
        assert mse == pytest.approx(way["mse"][step], rel=1e-5)
        assert l0 == pytest.approx(way["l0"][step], abs=1e-6)
        assert sae(f"{step}.st").d_sae == way["n_latents"][step]


def test_small_and_novel_is_the_state_after_all_adds_and_large_is_the_large_sae():
    [pair] = record("a.st", "b.st", "--theta", 0.4, "--acts", "acts")["pairs"]
    way = pair["data"]["path"]
    for take, step in ((None, way["n_add_steps"]), ("small+novel", way["n_add_steps"]), ("large", -1)):
        chosen = [] if take is None else ["--take", take]
        assert saetool("stitch", "a.st", "b.st", "--theta", 0.4, "-o", "t.st", *chosen, "--overwrite").exit_code == 0
        assert own_numbers("t.st") == pytest.approx((way["mse"][step], way["l0"][step]), rel=1e-5)


def test_each_latent_of_a_list_keeps_its_decoder_row_and_its_origin():
    Path("list.txt").write_text("small 3-5  # three\n\nlarge 0\nlarge 19\nlarge 1\n")
    assert saetool("stitch", "a.st", "b.st", "-o", "t.st", "--take", "@list.txt").exit_code == 0
    taken, made = sae("t.st"), sae_files.load(Path("t.st")).header.config["stitched"]
    assert [s["name"] for s in made["sources"]] == ["a.st", "b.st"]
    assert made["latents"] == [[0, 3, 3], [1, 0, 2], [1, 19, 1]]
    assert torch.equal(taken.W_dec, torch.cat([sae("a.st").W_dec[3:6], sae("b.st").W_dec[[0, 1, 19]]]))
    assert saetool("stitch", "a.st", "b.st", "-o", "t.st", "--take", "@list.txt").exit_code == 0  # up to date
    Path("list.txt").write_text("small all\n")
    code, line = refused("a.st", "b.st", "-o", "t.st", "--take", "@list.txt")
    assert (code, "latents input changed" in line) == (1, True)


def test_a_list_of_the_latents_of_a_step_evaluates_to_the_numbers_of_that_step():
    """The latents of a step, read from its provenance, listed one a line."""
    options = ["--theta", 0.4, "--acts", "acts"]
    [pair] = record("a.st", "b.st", *options)["pairs"]
    way = pair["data"]["path"]
    step = way["n_add_steps"] + way["n_swap_steps"] // 2
    assert saetool("stitch", "a.st", "b.st", "--theta", 0.4, "-o", "p.st", "--take", f"path:{step}").exit_code == 0
    made = sae_files.load(Path("p.st")).header.config["stitched"]
    side = [{"a.st": "small", "b.st": "large"}[source["name"]] for source in made["sources"]]
    lines = [f"{side[n]} {first}-{first + count - 1}" for n, first, count in made["latents"]]
    Path("list.txt").write_text("\n".join(lines))
    assert saetool("stitch", "a.st", "b.st", "-o", "t.st", "--take", "@list.txt").exit_code == 0
    assert own_numbers("t.st") == pytest.approx((way["mse"][step], way["l0"][step]), rel=1e-5)
    assert torch.equal(sae("t.st").W_dec, sae("p.st").W_dec)


def test_provenance_survives_a_threshold_and_is_looked_through_when_stitched_again():
    Path("list.txt").write_text("small 2-4\nlarge 7\n")
    saetool("stitch", "a.st", "b.st", "-o", "t.st", "--take", "@list.txt")
    done = saetool("threshold", "t.st", "acts", "--l0", 2, "--batch-size", 64, "--precision", 1, "-o", "u.st")
    assert done.exit_code == 0, done.stderr
    made = sae_files.load(Path("t.st")).header.config["stitched"]
    assert sae_files.load(Path("u.st")).header.config["stitched"] == made
    Path("list.txt").write_text("small 1-3\nlarge 5\n")
    save_sae(Path("c.st"), random_sae(9, seed=5))
    assert saetool("stitch", "u.st", "c.st", "-o", "v.st", "--take", "@list.txt").exit_code == 0
    again = sae_files.load(Path("v.st")).header.config["stitched"]
    assert [s["name"] for s in again["sources"]] == ["a.st", "b.st", "c.st"]
    assert again["latents"] == [[0, 3, 2], [1, 7, 1], [2, 5, 1]]


def test_provenance_survives_a_saelens_folder_unless_its_latents_are_others():
    Path("list.txt").write_text("small 2-4\nlarge 7\n")
    saetool("stitch", "a.st", "b.st", "-o", "t.st", "--take", "@list.txt")
    done = saetool("convert", "t.st", "--to", "saelens", "-o", "folder")
    assert done.exit_code == 0, done.stderr
    made = sae_files.load(Path("t.st")).header.config["stitched"]
    assert saetool("convert", "folder", "-o", "back.st").exit_code == 0
    assert sae_files.load(Path("back.st")).header.config["stitched"] == made
    again = ("stitch", "folder", "b.st", "--theta", -0.9, "-o", "again.st")
    assert saetool(*again).exit_code == 0
    sources = sae_files.load(Path("again.st")).header.config["stitched"]["sources"]
    assert [s["name"] for s in sources] == ["a.st", "b.st"]
    config = json.loads(Path("folder/cfg.json").read_text())
    for other in (
        {**made, "latents": [[0, 2, 3]]},
        {**made, "latents": [[2, 0, 4]]},
        {**made, "latents": [4]},
        [1],
        None,
    ):
        config["metadata"]["saetool_provenance"]["stitched"] = other
        Path("folder/cfg.json").write_text(json.dumps(config))
        assert "stitched" not in sae_files.load(Path("folder")).header.config


def test_lists_that_name_no_latents_are_refused_with_their_line():
    for text, words in (
        ("small 0\nlarge 20\n", "list.txt, line 2: the large SAE has no latents 20, it has 0 to 19"),
        ("small 5-3\n", "line 1: the small SAE has no latents 5-3"),
        ("medium 5\n", "line 1: 'medium 5' is not a latent"),
        ("small x\n", "line 1: 'x' is not a latent's number"),
        ("# nothing\n", "needs at least one latent"),
    ):
        Path("list.txt").write_text(text)
        code, line = refused("a.st", "b.st", "-o", "t.st", "--take", "@list.txt")
        assert code == 2
        assert words in line


def test_what_cannot_be_taken_or_measured_is_refused():
    for arguments, code, words in (
        (["--take", "large"], 2, "--take large: says what to write, and no SAE is written"),
        (["--take", "novel", "-o", "t.st"], 2, "--take novel: unknown"),
        (["--take", "path:x", "-o", "t.st"], 2, "--take path:x: STEP is not a number"),
        (["--take", "path:999", "-o", "t.st"], 2, "step 999: the path has the steps 0 (small) to"),
        (["--take", "@none.txt", "-o", "t.st"], 1, "none.txt: cannot be read"),
        (["--order", "effect"], 2, "--order effect needs activations"),
        (["--ce"], 2, "--ce needs activations"),
        (["--ce", "--acts", "acts", "-o", "t.st"], 2, "--ce: measures points of the path, and -o t.st is one SAE"),
    ):
        found, line = refused("a.st", "b.st", *arguments)
        assert found == code
        assert words in line


def test_an_sae_of_which_nothing_fires_is_refused():
    silent = sae("b.st")
    save_sae(Path("silent.st"), replace(silent, threshold=torch.full((20,), 1e9)))
    code, line = refused("a.st", "silent.st", "--acts", "acts")
    assert code == 1
    assert "silent.st: none of its latents fires on these 256 tokens" in line


def test_an_sae_that_normalises_each_token_is_not_merged():
    save_sae(Path("n.st"), replace(sae("b.st"), normalization="per_token"))
    code, line = refused("a.st", "n.st", "-o", "t.st")
    assert code == 2
    assert "n.st: normalises each token (per_token)" in line
    for early in ([], ["--dry-run"]):
        code, line = refused("a.st", "n.st", "--acts", "acts", *early)
        assert code == 2
        assert "n.st: normalises each token (per_token), so what its latents do" in line
    assert saetool("stitch", "a.st", "n.st").exit_code == 0


def test_twins_other_models_and_giant_components_are_warned_of():
    assert "b.st is the same SAE as b.st: nothing will be novel" in saetool("stitch", "b.st", "b.st").stderr
    file = sae_files.load(Path("b.st"))
    sae_files.save(Path("m.st"), file.sae, replace(file.header, model={"id": "another", "hook_name": "x"}))
    assert "m.st was trained on another, and a.st on tests" in saetool("stitch", "a.st", "m.st").stderr
    small, large = planted_pair()
    rows = large.W_dec.clone()
    rows[14:] = torch.nn.functional.normalize(small.W_dec[:6] + small.W_dec[1:7], dim=1)  # each joins two latents
    save_sae(Path("p.st"), small)
    save_sae(Path("q.st"), replace(large, W_dec=rows))
    result = saetool("stitch", "p.st", "q.st", "--theta", 0.65)
    assert "warning: p.st → q.st: one component holds 7 small and 17 large latents, 80.0% of all in" in result.stderr
    assert "one component" not in saetool("stitch", "p.st", "q.st", "--theta", 0.9).stderr
    assert (
        "one component holds 12 small and 20 large latents, 100.0% of"
        in saetool("stitch", "a.st", "b.st", "--theta", -0.8).stderr
    )
    [pair] = json.loads(result.stdout)["pairs"]
    assert pair["largest_component_share"] == sum(pair["largest_components"][0]) / sum(
        n * (a + b) for a, b, n in pair["component_shapes"]
    )


def test_two_seeds_are_matched_one_to_one_unless_told_not_to():
    small = sae("a.st")
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = replace(
        small, W_enc=small.W_enc[:, order], W_dec=small.W_dec[order], b_enc=small.b_enc[order], b_dec=small.b_dec + 0.1
    )
    save_sae(Path("s.st"), shuffled)
    found = record("a.st", "s.st")["pairs"][0]["matching"]
    assert found["same_partner"] == 1
    assert [found[by]["shared"] for by in ("decoder", "encoder", "both")] == [1, 1, 1]
    assert record("a.st", "s.st", "--no-match")["pairs"][0]["matching"] is None
    assert record("a.st", "b.st")["pairs"][0]["matching"] is None
    assert record("a.st", "b.st", "--match")["pairs"][0]["matching"]["same_partner"] < 1


def test_the_record_holds_what_the_activations_say():
    found = record("a.st", "b.st", "--theta", 0.4, "--acts", "acts")
    [pair] = found["pairs"]
    data = pair["data"]
    assert len(data["swaps"]["delta_mse"]) == len(data["swaps"]["sizes"]) == pair["components"]
    assert len(data["cumulative"]["novel"]) == 5
    last = next(g for g in data["groups"] if g["theta"] == 0.4)
    for curve in data["cumulative"]["novel"]:
        assert (curve[0], curve[-1]) == (0, pytest.approx(last["novel_delta"], abs=1e-9))
    for curve in data["cumulative"]["reconstruction"]:
        assert (curve[0], curve[-1]) == (0, pytest.approx(last["reconstruction_delta"], abs=1e-9))
    assert (data["roc"]["false_positive"][0], data["roc"]["true_positive"][-1]) == (1, 0)
    assert data["roc"]["theta"][-1] is None
    assert len(data["latent_scaling"]["error"]) == len(data["activation_cosine"]["values"]) == 20
    assert data["swaps"]["median_mse"] == pytest.approx(np.median(data["swaps"]["delta_mse"]) / data["mse_small"])
    assert data["swaps"]["median_l0"] == pytest.approx(np.median(data["swaps"]["delta_l0"]) / data["l0_small"])
    for group, novel in (("novel", True), ("reconstruction", False)):
        mine = np.array(data["effects"]["firing_rate"]) > 0
        mine &= (np.array(pair["max_cosine"]["values"]) < 0.4) == novel
        for of in ("error", "reconstruction"):
            values = np.array(data["latent_scaling"][of], dtype=float)[mine]
            assert data["latent_scaling"][f"median_of_{group}"][of] == pytest.approx(np.median(values))
    assert set(data["firing_errors"]["mean_of_novel"]) == {
        "small_where_fires", "small_elsewhere", "large_where_fires", "large_elsewhere",
    }  # fmt: skip
    assert data["ce"] is None
    matrix = found["bias_exchange"]["mse"]
    assert [matrix[0][0], matrix[1][1]] == pytest.approx([data["mse_small"], data["mse_large"]], rel=1e-12)
    x = torch.cat([s["acts"] for s in open_cache(Path("acts")).iter_split("heldout")])
    exchanged = replace(sae("a.st"), b_dec=sae("b.st").b_dec)
    truth = (x - exchanged.decode(sae("a.st").encode(x))).square().sum(1).mean()
    assert matrix[0][1] == pytest.approx(float(truth), rel=1e-5)


def test_the_table_shows_what_the_record_holds():
    result = saetool("stitch", "a.st", "b.st", "--theta", 0.5, "--acts", "acts")
    [pair] = json.loads(result.stdout)["pairs"]
    shown = dict(
        line.split("\t", 1) for line in result.stderr.splitlines() if line.count("\t") == 1 and line[0] != "\t"
    )
    alive, (small, large) = pair["data"]["alive"], pair["largest_components"][0]
    assert shown["novel"] == f"{pair['novel']} ({100 * pair['novel_share']:.1f}%)"
    assert shown["novel, of those that fire"] == f"{alive['novel']} ({100 * alive['novel_share']:.1f}%)"
    assert shown["largest component"] == f"{small}→{large}"
    cosines = ", ".join(f"{pair['max_cosine'][name]:.3f}" for name in ("mean", "median", "sd"))
    assert shown["max cosine: mean, median, sd"] == cosines
    swept = {entry["theta"]: f"{100 * entry['novel_share']:.1f}%" for entry in pair["sweep"]}
    line = ", ".join(swept[theta] for theta in (0.1, 0.3, 0.5, 0.7, 0.9))
    assert shown["novel share at theta 0.1, 0.3, 0.5, 0.7, 0.9"] == line
    assert swept[0.5] == f"{100 * pair['novel_share']:.1f}%"


@pytest.fixture
def with_model(tiny_model_dir: Path) -> list[object]:
    """Options to run a model with ``r.st`` (12 latents), ``t.st`` (20) and ``u.st`` (30) on its cache ``real``."""
    hook = ["--model", tiny_model_dir, "--hook", "blocks.1.hook_resid_post"]
    assert saetool("cache", _text(), *hook, "--ctx-len", 32, "-o", "real").exit_code == 0
    x = torch.cat([s["acts"].float() for s in open_cache(Path("real")).iter_split("train")])
    for name, seed, n in (("r.st", 1, 12), ("t.st", 2, 20), ("u.st", 3, 30)):
        save_sae(Path(name), replace(random_sae(n, 32, seed=seed), b_dec=x.mean(0)))
    options = ["--acts", "real", "--model", tiny_model_dir, "--ce-tokens", 256, "--dtype", "fp32", "--split", "train"]
    return list(options)


def own_losses(names: list[str], options: list[object]) -> list[dict]:
    """The same figures as ``saetool eval`` measures them."""
    return [entry["ce"] for entry in json.loads(saetool("eval", *names, *options, "-q").stdout)["saes"]]


def test_the_model_may_be_run_at_points_of_the_path(with_model):
    [pair] = record("r.st", "t.st", "--theta", 0.2, *with_model)["pairs"]
    points, way = pair["data"]["ce"], pair["data"]["path"]
    own, last = own_losses(["r.st", "t.st"], with_model), len(way["mse"]) - 1
    assert [points[0], points[-1]] == [own[0] | {"step": 0}, own[1] | {"step": last}]
    assert way["n_add_steps"] in [p["step"] for p in points]
    for point in points:  # each is what eval says of the SAE of that step, the merged ends among them
        made = saetool("stitch", "r.st", "t.st", "--theta", 0.2, "--take", f"path:{point['step']}", "-o", "s.st",
                       "--overwrite")  # fmt: skip
        assert made.exit_code == 0, made.stderr
        [there] = own_losses(["s.st"], with_model)
        assert point["ce_loss_with_sae"] == pytest.approx(there["ce_loss_with_sae"], rel=1e-5)


def test_saes_that_two_pairs_share_are_run_once_and_a_fixed_bias_keeps_one_end(with_model):
    result = saetool("stitch", "r.st", "t.st", "u.st", "--theta", 0.2, *with_model)
    first, second = (pair["data"]["ce"] for pair in json.loads(result.stdout)["pairs"])
    assert first[-1] == second[0] | {"step": first[-1]["step"]}
    [passes] = [line.split()[2] for line in result.stderr.splitlines() if line.startswith("stitch --ce: ")]
    runs = len(first) + len(second) - 1 + 2
    assert passes == f"{first[0]['n_tokens'] * runs:,}/{first[0]['n_tokens'] * runs:,}"
    [biased] = (
        pair["data"]["ce"] for pair in record("r.st", "t.st", "--theta", 0.2, "--bias", "small", *with_model)["pairs"]
    )
    assert biased[0] == first[0]
    assert biased[-1]["ce_loss_with_sae"] != first[-1]["ce_loss_with_sae"]


def test_a_model_that_is_not_there_is_said_before_anything_is_measured(with_model):
    result = saetool("stitch", "r.st", "t.st", *with_model, "--model", "nothere.gguf")
    assert result.exit_code == 1
    assert "--model nothere.gguf: no such file" in result.stderr
    assert "tokens/s" not in result.stderr


def _text() -> Path:
    from conftest import tiny_documents

    Path("text.txt").write_text("\n\n".join(tiny_documents()))
    return Path("text.txt")


def test_a_stitched_sae_is_read_by_the_other_verbs():
    saetool("stitch", "a.st", "b.st", "--theta", 0.4, "-o", "t.st")
    assert container.read_header(Path("t.st")).config["arch"] == "jumprelu"
    for verb in (["eval", "t.st", "--acts", "acts"], ["inspect", "t.st"], ["stitch", "a.st", "t.st"]):
        result = saetool(*verb)
        assert result.exit_code == 0, result.stderr
