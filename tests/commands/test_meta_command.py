"""``meta`` as a user meets it: presets, sweeps, several parents, comparisons, resume, edits, graphs."""

import errno
import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import generator, random_sae, save_sae, write_cache
from typer.testing import CliRunner

from saetool.artifacts import container, writing
from saetool.artifacts import sae as sae_files
from saetool.cli import app, spread
from saetool.config import META_PRESETS, MetaConfig
from saetool.core.sae import SAE, unit_rows
from saetool.engines import meta as engine
from saetool.engines.recipe import n_steps
from saetool.errors import SaetoolError

runner = CliRunner()
SHORT = ["--latents", "6", "--k", "2", "--steps", "40"]
D = 16


def planted(n: int, atoms: torch.Tensor, seed: int) -> torch.Tensor:
    """``n`` unit rows, each two atoms and noise."""
    g = generator(seed)
    pairs = torch.stack([torch.randperm(len(atoms), generator=g)[:2] for _ in range(n)])
    weights = torch.rand(n, 2, 1, generator=g) + 0.5
    return unit_rows((atoms[pairs] * weights).sum(1) + 0.02 * torch.randn(n, atoms.shape[1], generator=g))


def parent(rows: torch.Tensor) -> SAE:
    return replace(random_sae(len(rows), rows.shape[1]), W_dec=rows)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two parents made of the same 10 atoms, and an SAE whose latents are those atoms, among others."""
    monkeypatch.chdir(tmp_path)
    atoms = unit_rows(torch.randn(10, D, generator=generator(5)))
    save_sae(tmp_path / "a.st", parent(planted(120, atoms, 1)))
    save_sae(tmp_path / "b.st", parent(planted(60, atoms, 2)))
    save_sae(tmp_path / "atoms.st", parent(torch.cat([atoms, unit_rows(torch.randn(2, D, generator=generator(6)))])))
    return tmp_path


def run(*args: str) -> str:
    result = runner.invoke(app, ["meta", *args])
    assert result.exit_code == 0, result.output
    return result.stderr


def record(name: str = "meta.json") -> dict:
    return container.read_json(Path(name))[1]


def test_planted_atoms_order_the_bars_as_in_the_paper(here: Path) -> None:
    run("a.st", "--latents", "12", "--k", "2", "--steps", "500", "--compare", "atoms.st")
    payload = record()
    bars = {bar["name"]: bar for bar in payload["bars"]}
    mse = {name: bar["mse_mean"] for name, bar in bars.items()}
    assert mse["meta_sae"] < mse["random_directions_tuned"] < mse["random_directions"]
    assert mse["zero"] < mse["random_directions"]
    assert mse["zero"] == pytest.approx(1 / D, rel=1e-6)
    assert bars["mean"]["variance_explained"] == pytest.approx(0.0, abs=1e-9)
    # Its own directions are the pool: what the rows were made of explains them, and the encoder can be had for it.
    assert bars["nearest_sae_latents_tuned"]["variance_explained"] > 0.7
    assert mse["nearest_sae_latents_tuned"] < mse["nearest_sae_latents"]
    assert mse["nearest_sae_latents_tuned"] < mse["random_directions_tuned"]
    # (Its weights are of w − w̄, which is no sum of two atoms.)
    assert bars["omp_comparable"]["variance_explained"] > bars["omp_random_directions"]["variance_explained"] + 0.2
    cosines = {name: panel["mean"] for name, panel in payload["max_cosine"].items()}
    assert cosines["to_comparable"] > cosines["random_to_comparable"] + 0.2
    assert payload["compare"]["shared_edges"]["overlap"] > 1.5 * payload["compare"]["shared_edges"]["chance"]
    for control in payload["controls"]:
        assert control["variance_explained"] < payload["variance_explained"]["threshold_mode"] - 0.2
        assert control["train_mode"] == pytest.approx(control["variance_explained"], abs=0.05)


def test_a_parent_is_not_compared_with_itself(here: Path) -> None:
    run("a.st", *SHORT, "--no-controls", "--compare", "atoms.st", "-o", "without.st")
    save_sae(here / "copy.st", replace(sae_files.load(Path("a.st")).sae, threshold=torch.full((120,), 0.7)))
    said = run("a.st", *SHORT, "--no-controls", "--compare", "a.st", "atoms.st", "copy.st", "-o", "with.st")
    assert "a.st has the rows of a.st, which are explained: left out of --compare" in said
    assert "copy.st has the rows of a.st" in said
    assert Path("with.json").read_bytes() == Path("without.json").read_bytes()
    assert Path("with.st").read_bytes() == Path("without.st").read_bytes()


def test_members_are_the_decompositions_the_other_way_round(here: Path) -> None:
    run("a.st", *SHORT, "--no-controls")
    payload = record()
    parts = payload["decompositions"]
    members = [[row for row, indices in enumerate(parts["indices"]) if j in indices] for j in range(6)]
    assert payload["meta_latents"]["n_members"] == [len(rows) for rows in members]
    for rows, strongest in zip(members, payload["meta_latents"]["strongest_rows"], strict=True):
        assert set(strongest) <= set(rows)
        assert len(strongest) == min(len(rows), 10)


def test_several_parents_make_one_meta_sae_with_numbers_for_each(here: Path) -> None:
    run("a.st", "b.st", *SHORT, "--no-controls")
    payload = record()
    assert payload["n_rows"] == 180
    assert [(p["name"], p["n_rows"]) for p in payload["parents"]] == [("a.st", 120), ("b.st", 60)]
    active = sum(p["mean_active"] * p["n_rows"] for p in payload["parents"]) / 180
    assert payload["mean_active"] == pytest.approx(active)
    assert len(payload["decompositions"]["latents"]) == 120  # of the first: readers know one parent
    assert len(payload["parents"][1]["decompositions"]["latents"]) == 60
    roles = [i["role"] for i in sae_files.load(Path("meta.st")).header.inputs]
    assert roles == ["parent", "parent"]


def test_a_sweep_is_a_file_each_as_if_alone_and_one_table(here: Path) -> None:
    said = run("a.st", "--latents", "4,6", "--k", "1,2", "--steps", "30", "-o", "m-{latents}-{k}.st")
    table = said[said.index("120 rows\n") :].splitlines()
    assert [line.split("\t")[:2] for line in table[2:]] == [["4", "1"], ["4", "2"], ["6", "1"], ["6", "2"]]
    assert table[1].split("\t")[4:6] == ["random_directions", "shuffled_coordinates"]
    run("a.st", "--latents", "6", "--k", "2", "--steps", "30", "-o", "alone.st")
    assert Path("alone.st").read_bytes() == Path("m-6-2.st").read_bytes()
    assert Path("alone.json").read_bytes() == Path("m-6-2.json").read_bytes()
    again = run("a.st", "--latents", "4,6", "--k", "1,2", "--steps", "30", "-o", "m-{latents}-{k}.st")
    assert again.count("up to date") == 4
    assert not list(here.glob("*.ckpt.st"))


def test_rows_are_left_out_and_drawn_by_how_often_their_latents_fire(here: Path) -> None:
    write_cache(here / "acts")
    sae = random_sae(60, D, threshold=0.6)
    sae.b_enc[:20] = -100.0  # never fire
    save_sae(here / "p.st", sae)
    run("p.st", *SHORT, "--no-controls", "--acts", "acts", "--min-rate", "0", "--weighted")
    payload = record()
    one = payload["parents"][0]
    assert one["left_out"]["zero"] == 0
    assert one["left_out"]["rare"] >= 20
    assert one["n_rows"] + one["left_out"]["rare"] == 60
    assert not set(range(20)) & set(payload["decompositions"]["latents"])
    explained = payload["variance_explained"]
    assert explained["threshold_mode_weighted"] != explained["threshold_mode"]


def test_weighted_batches_follow_the_weights_and_are_functions_of_the_step() -> None:
    rows, weights = torch.eye(4), torch.tensor([0.0, 1.0, 2.0, 1.0])
    batches = engine.RowBatches(rows, seed=3, weights=weights)
    drawn = batches.batch(5, 20_000)
    assert torch.equal(drawn, engine.RowBatches(rows, seed=3, weights=weights).batch(5, 20_000))
    assert torch.allclose(drawn.mean(0), weights / 4, atol=0.02)
    assert float(drawn.mean(0)[0]) == 0.0
    assert torch.allclose(batches.statistics.mean, weights.double() / 4)


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from saetool.engines.trainee import Trainee

    run("a.st", *SHORT, "-o", "whole.st")
    step, done = Trainee.step, []

    def failing(self, x):
        done.append(1)
        if len(done) == 60:  # in the first control
            raise SaetoolError("power cut")
        return step(self, x)

    with monkeypatch.context() as patched:
        patched.setattr(Trainee, "step", failing)
        assert runner.invoke(app, ["meta", "a.st", *SHORT, "-o", "cut.st"]).exit_code == 1
    assert not Path("cut.st").exists()
    assert [p.name for p in here.glob("*.ckpt.st")] == ["cut.st.ckpt.st"]
    said = run("a.st", *SHORT, "-o", "cut.st", "--log", "log.jsonl")
    assert "cut.st.ckpt.st: resuming at step 40" in said
    assert Path("cut.st").read_bytes() == Path("whole.st").read_bytes()
    assert Path("cut.json").read_bytes() == Path("whole.json").read_bytes()
    assert not list(here.glob("*.ckpt.st"))


@pytest.mark.parametrize("cut_at", [5, 55, 130, 190])  # the meta-SAE, its control, the encoders
def test_an_interrupted_training_goes_on_where_it_was(here: Path, monkeypatch: pytest.MonkeyPatch, cut_at: int) -> None:
    from saetool.engines.trainee import Trainee

    options = ["a.st", *SHORT, "--compare", "atoms.st"]
    run(*options, "-o", "whole.st")
    step, done = Trainee.step, []

    def interrupting(self, x):
        done.append(1)
        if len(done) == cut_at:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, x)

    with monkeypatch.context() as patched:
        patched.setattr(Trainee, "step", interrupting)
        result = runner.invoke(app, ["meta", *options, "-o", "cut.st"])
        assert result.exit_code == 130
        assert f"stopped at step {(cut_at - 1) % 40 + 1}; the same command goes on from there\n" in result.stderr
        assert len(done) == cut_at
        assert not Path("cut.st").exists()
        run(*options, "-o", "cut.st")
    assert len(done) == 5 * 40  # every step once
    assert Path("cut.st").read_bytes() == Path("whole.st").read_bytes()
    assert Path("cut.json").read_bytes() == Path("whole.json").read_bytes()
    assert not list(here.glob("*.ckpt.st"))


def test_an_interrupted_sweep_goes_on_with_the_same_bytes(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from saetool.engines.trainee import Trainee

    options = ["a.st", "--latents", "4,6", "--k", "1,2", "--steps", "20", "--no-controls"]
    run(*options, "-o", "whole-{latents}-{k}.st")
    step, done = Trainee.step, []

    def interrupting(self, x):
        done.append(1)
        if len(done) == 30:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, x)

    with monkeypatch.context() as patched:
        patched.setattr(Trainee, "step", interrupting)
        assert runner.invoke(app, ["meta", *options, "-o", "cut-{latents}-{k}.st"]).exit_code == 130
    assert len(list(here.glob("cut-*.ckpt.st"))) == 4
    run(*options, "-o", "cut-{latents}-{k}.st")
    for path in here.glob("whole-*"):
        assert path.read_bytes() == here.joinpath(path.name.replace("whole", "cut")).read_bytes()


def test_a_killed_run_goes_on_from_its_last_checkpoint(here: Path) -> None:
    run("a.st", *SHORT, "-o", "whole.st")
    killed = f"""
import os
from saetool.cli import app
from saetool.engines.trainee import Trainee

step, done = Trainee.step, []
def dying(self, x):
    done.append(1)
    if len(done) == 60:
        os._exit(9)
    return step(self, x)

Trainee.step = dying
app({["meta", "a.st", *SHORT, "--checkpoint-every", "0", "-o", "cut.st"]})
"""
    assert subprocess.run([sys.executable, "-c", killed], capture_output=True, check=False).returncode == 9
    assert {p.name for p in here.glob("cut*")} == {"cut.st.ckpt.st", "cut.st.random_directions.ckpt.st"}
    said = run("a.st", *SHORT, "-o", "cut.st")
    assert "cut.st.random_directions.ckpt.st: resuming at step 19" in said
    assert Path("cut.st").read_bytes() == Path("whole.st").read_bytes()
    assert Path("cut.json").read_bytes() == Path("whole.json").read_bytes()


def test_a_full_disk_is_one_line_and_the_run_can_go_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("a.st", *SHORT, "-o", "whole.st")
    save = sae_files.save

    def full(path: Path, *rest):
        with writing.atomic_file(path) as file:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(sae_files, "save", full)
        result = runner.invoke(app, ["meta", "a.st", *SHORT, "-o", "m.st"])
    assert result.exit_code == 1
    assert "saetool meta: m.st: cannot be written (No space left on device)\nhint: free some space" in result.stderr
    assert not Path("m.st").exists()
    assert not list(here.glob(".*"))
    said = run("a.st", *SHORT, "-o", "m.st")
    assert said.count("resuming at step 40") == 4
    assert save is sae_files.save
    assert Path("m.st").read_bytes() == Path("whole.st").read_bytes()


def test_a_pipe_gets_the_files_bytes_and_nothing_else(here: Path) -> None:
    run("a.st", *SHORT, "-o", "m.st")
    before = sorted(here.iterdir())
    for extra in ([], ["--json"]):
        result = runner.invoke(app, ["meta", "a.st", *SHORT, "-o", "-", *extra])
        assert result.exit_code == 0, result.stderr
        assert result.stdout_bytes == Path("m.st").read_bytes()
    read = runner.invoke(app, ["meta", "-", *SHORT, "-o", "-"], input=Path("a.st").read_bytes())
    assert read.exit_code == 0, read.stderr
    assert sorted(here.iterdir()) == before


def test_json_is_one_record_of_the_recorded_numbers(here: Path) -> None:
    result = runner.invoke(app, ["meta", "a.st", *SHORT, "--json"])
    again = runner.invoke(app, ["meta", "a.st", *SHORT, "--json"])
    assert json.loads(again.stdout) == json.loads(result.stdout)
    got, payload = json.loads(result.stdout), record()
    assert (got["kind"], got["path"]) == ("sae", "meta.st")
    assert got["sha256"] == sae_files.load(Path("meta.st")).sha256
    assert got["metrics"]["variance_explained"] == payload["variance_explained"]
    assert got["metrics"]["bars"] == payload["bars"]


def test_two_processes_make_what_one_makes(here: Path) -> None:
    """Under torchrun with gloo: every training of the command joint, one writer, the same to float32 rounding."""
    options = ["a.st", *SHORT, "--compare", "atoms.st", "--device", "cpu"]
    run(*options, "-o", "one.st", "--graph", "one.dot")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "saetool"]
    result = subprocess.run(
        [*command, "meta", *options, "-o", "two.st", "--graph", "two.dot"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == "two.st\n"
    assert result.stderr.count("2 processes, 120 rows") == 5
    one, two = sae_files.load(Path("one.st")), sae_files.load(Path("two.st"))
    assert one.header.key == two.header.key
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
        torch.testing.assert_close(getattr(two.sae, name), getattr(one.sae, name), rtol=1e-2, atol=2e-3)
    a, b = record("one.json"), record("two.json")
    for first, second in zip(a["bars"] + a["controls"], b["bars"] + b["controls"], strict=True):
        assert first["variance_explained"] == pytest.approx(second["variance_explained"], abs=0.01), first["name"]
    assert Path("two.dot").exists()
    assert not list(here.glob("*.ckpt.st"))


def test_the_log_has_the_meta_sae_and_not_its_controls(here: Path) -> None:
    run("a.st", *SHORT, "--log", "log.jsonl")
    records = container.read_jsonl(Path("log.jsonl"))[1]
    assert {r["sae"] for r in records} == {"meta.st"}
    assert records[-1]["step"] == 40


@pytest.mark.parametrize("preset", META_PRESETS)
def test_presets_are_what_their_sources_say(preset: str) -> None:
    settings = MetaConfig(**META_PRESETS[preset].options)
    config = engine.training_config(settings, 49152, 768)
    wanted = {
        "paper": (2304, 24_000, 4096, 1e-4),
        "released": (2304, 2000, 16_384, 1e-3),
        "saebench": (12_288, 1500, 1024, 5e-4),
    }[preset]
    assert (config.latents, n_steps(config), config.batch_size, config.lr) == wanted
    assert config.k == 4
    small = engine.training_config(settings, 300, 768)
    assert small.batch_size == (1024 if preset == "saebench" else 300)


def test_a_preset_yields_to_options_and_is_named(here: Path) -> None:
    run("a.st", "--preset", "saebench", "--steps", "20", "--no-controls")
    config = sae_files.load(Path("meta.st")).header.config
    assert (config["preset"], config["latents"], config["batch_size"]) == ("saebench", 30, 1024)
    assert config["tokens"] == 20 * 1024
    assert config["replacement"] is True


def test_edits_write_an_sae_that_differs_in_those_rows(here: Path) -> None:
    run("a.st", *SHORT, "--no-controls")
    latent, meta = 7, record()["decompositions"]["indices"][7][0]
    run("a.st", "--edit", f"{latent}:{meta}=0", f"{latent + 1}:{meta}=0.5", "-o", "edited.st")
    before, after = sae_files.load(Path("a.st")), sae_files.load(Path("edited.st"))
    differs = (before.sae.W_dec != after.sae.W_dec).any(1).nonzero().flatten().tolist()
    assert differs == [latent, latent + 1]
    assert after.header.model == before.header.model
    assert [i["role"] for i in after.header.inputs] == ["sae", "meta"]
    assert after.header.config["edited"]["changed"] == 2
    write_cache(here / "acts")
    found = json.loads(runner.invoke(app, ["eval", "a.st", "edited.st", "--acts", "acts"]).stdout)["saes"]
    mse = [one["metrics"]["mse"] for one in found]
    assert mse[0] != mse[1]


def test_an_edited_sae_is_no_meta_sae(here: Path) -> None:
    run("a.st", *SHORT, "--no-controls")
    run("a.st", "--edit", "*:0=0", "-o", "edited.st")
    result = runner.invoke(app, ["meta", "a.st", "--edit", "1:0=5", "--meta-sae", "edited.st", "-o", "nonsense.st"])
    assert result.exit_code == 1
    assert "edited.st: is not a meta-SAE" in result.stderr
    assert not Path("nonsense.st").exists()
    run("meta.st", "--latents", "3", "--k", "1", "--steps", "20", "--no-controls", "-o", "metameta.st")
    run("meta.st", "--edit", "*:0=0", "--meta-sae", "metameta.st", "-o", "edited-meta.st")
    with pytest.raises(SaetoolError, match="does not say what it was made from"):  # not: from meta.st
        sae_files.load(Path("edited-meta.st")).meta_parents()


def test_an_edited_sae_does_not_claim_its_parents_quality(here: Path) -> None:
    facts = {"threshold": {"method": "mean-min", "l0_heldout": 3.0, "explained_variance_heldout": 0.9}}
    a = sae_files.load(Path("a.st"))
    config = a.header.config | facts | {"train_metrics": {"explained_variance": 0.8}, "lr": 0.1}
    sae_files.save(Path("a.st"), a.sae, replace(a.header, config=config))
    run("a.st", *SHORT, "--no-controls")
    run("a.st", "--edit", "*:0=0", "-o", "edited.st")
    found = sae_files.load(Path("edited.st")).header.config
    assert found["threshold"] == {"method": "mean-min", "l0_heldout": 3.0}
    assert "train_metrics" not in found
    assert found["lr"] == 0.1


def test_graphs_have_an_edge_for_every_weight(here: Path) -> None:
    run("a.st", *SHORT, "--no-controls", "--dot", "g.dot")
    run("a.st", *SHORT, "--no-controls", "--graph", "g.graphml")
    weights = [w for ws in record()["decompositions"]["weights"] for w in ws]
    dot = Path("g.dot").read_text()
    assert dot.count(" -- ") == len(weights)
    names = {"g": "http://graphml.graphdrawing.org/xmlns"}
    edges = ET.parse("g.graphml").findall(".//g:edge", names)
    assert [float(e.findtext("g:data", namespaces=names) or "") for e in edges] == weights


def test_several_values_after_an_option_are_that_options() -> None:
    assert spread(["p", "--compare", "a", "b", "-o", "m", "q"], ("--compare",)) == [
        "p", "--compare", "a", "--compare", "b", "-o", "m", "q"
    ]  # fmt: skip
    assert spread(["--compare=a", "p"], ("--compare",)) == ["--compare=a", "p"]
    assert spread(["--compare", "a", "--", "b"], ("--compare",)) == ["--compare", "a", "--", "b"]
    assert spread(["--compare", "-", "b"], ("--compare",)) == ["--compare", "-", "--compare", "b"]


def test_dry_run_names_the_preset_and_the_grid(here: Path) -> None:
    result = runner.invoke(app, ["meta", "a.st", "--preset", "paper", "--latents", "4,6", "-o", "{latents}.st",
                                 "--dry-run", "--json"])  # fmt: skip
    plan = json.loads(result.stdout)
    assert (plan["latents"], plan["steps"], plan["output"]) == ([4, 6], 2000, "4.st, 6.st")
    assert plan["preset"].startswith("paper: Leask")


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["a.st", "--preset", "post"], 2, "--preset post: unknown"),
        (["a.st", "--latents", "4,6"], 2, "several --latents need {latents} in the name"),
        (["a.st", "--k", "1,2", "-o", "{latents}.st"], 2, "several --k need {k}"),
        (["a.st", "--weighted"], 2, "need to know how often latents fire"),
        (["a.st", "wide.st"], 1, "wide.st: its rows have width 20, and those of a.st 16"),
        (["a.st", "--compare", "b.st", "wide.st"], 1, "wide.st: its rows have width 20"),
        (["-", "-"], 2, "only one input can be -"),
        (["a.st", "--graph", "g.png"], 2, "--graph g.png: of what format?"),
        (["a.st", "--steps", "0"], 2, "--steps 0: must be positive"),
        (["a.st", "--rebuild"], 2, "--rebuild is for --edit"),
        (["a.st", "--edit", "1:2=0"], 2, "--edit needs one SAE and an output"),
        (["a.st", "--edit", "1:2", "-o", "e.st", "--meta-sae", "m.st"], 2, "--edit 1:2: not LATENT:META=VALUE"),
        (["a.st", "--edit", "1:2=nan", "-o", "e.st", "--meta-sae", "m.st"], 2, "--edit 1:2=nan: not"),
        (["b.st", "--edit", "1:2=0", "-o", "e.st", "--meta-sae", "m.st"], 1, "not the SAE that m.st was made from"),
        (["a.st", "--edit", "1:2=0", "-o", "e.st", "--meta-sae", "b.st"], 1, "b.st: is not a meta-SAE"),
        (["a.st", "a.st"], 2, "a.st: given twice"),
        (["a.st", "--edit", "1:2=0", "-o", "m.st", "--meta-sae", "m.st"], 1, "m.st: exists"),
        (["a.st", *SHORT, "-o", "m.st"], 1, "m.st: exists and is not what was asked for (controls"),
        (["b.st", *SHORT, "--no-controls", "-o", "m.st"], 1, "m.st: exists and is not what was asked for"),
        (["a.st", *SHORT, "-o", "m.json"], 2, "-o m.json: an SAE and its record NAME.json would be one file"),
        (["a.st", "--latents", "4,6", "-o", "m.{latents}"], 2, "would be one file"),
        (["a.st", *SHORT, "-o", "no/m.st"], 1, "no/m.st: its folder no/ does not exist"),
        (["a.st", *SHORT, "-o", "new.st", "--graph", "no/g.dot"], 1, "no/g.dot: its folder no/ does not exist"),
        (["a.st", *SHORT, "-o", "new.st", "--graph", "taken.dot"], 1, "taken.dot: exists and is another graph"),
    ],
)
def test_bad_input_is_one_line(here: Path, args: list[str], code: int, text: str) -> None:
    save_sae(here / "wide.st", random_sae(d_in=20))
    (here / "taken.dot").write_text("graph {}")
    if "m.st" in args:
        run("a.st", *SHORT, "--no-controls", "-o", "m.st")
    before = sorted(here.rglob("*"))
    result = runner.invoke(app, ["meta", *args])
    lines = [line for line in result.stderr.splitlines() if not line.startswith("hint:")]
    assert result.exit_code == code, result.output
    assert len(lines) == 1, lines
    assert text in lines[0]
    assert sorted(here.rglob("*")) == before
