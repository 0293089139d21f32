"""What artifacts hold beyond the essentials is on the page: each figure and table equals its artifact."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from synthetic_parts import PROFILE, STATISTICS
from synthetic_run import WORDS, SyntheticRun
from test_report import Parsed, build, payload
from typer.testing import CliRunner

from saetool.artifacts import container, writing
from saetool.artifacts import header as h
from saetool.cli import app
from saetool.config import ReportConfig
from saetool.report import behaviour, collect, sections, splits
from saetool.report.figure_data import csv_of, figures_of
from saetool.report.pairs import components
from saetool.report.run import Look, Run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts") / "run"
    SyntheticRun(folder).write()
    return folder


@pytest.fixture(scope="module")
def page(run_dir: Path) -> Parsed:
    return Parsed(build([run_dir]))


@pytest.fixture(scope="module")
def figures(run_dir: Path) -> dict[str, Any]:
    return {f.id: f for f in figures_of(sections.page(collect.collect([run_dir]), "t", Look(features=20)))}


def test_fates_equal_a_walk_over_the_components_and_hold_every_latent(run_dir: Path) -> None:
    for pair in payload(run_dir, "stitch.json")["pairs"]:
        found = splits.fates(pair)
        for side, n in ((0, pair["n_small"]), (1, pair["n_large"])):
            assert sum(v[side] for v in found.values()) == n
        sides = [({a for a, _, _ in c}, {b for _, b, _ in c}) for c in components(pair["edges"])]
        assert found["split"] == (
            sum(len(a) for a, b in sides if len(a) == 1 < len(b)),
            sum(len(b) for a, b in sides if len(a) == 1 < len(b)),
        )
        assert found["family"][0] == sum(len(a) for a, b in sides if len(a) > 1 and len(b) > 1)


def test_the_bars_of_fates_say_their_numbers(page: Parsed, run_dir: Path) -> None:
    pair = payload(run_dir, "stitch.json")["pairs"][0]
    table = "What becomes of the smaller SAE's latents, and where the larger one's come from"
    assert page.column(table, "no partner")[:2] == [pair["unmatched_small"], pair["novel"]]
    assert page.column(table, "one to one")[:2] == [splits.fates(pair)["one"][i] for i in (0, 1)]


def test_examples_of_splits_are_families_of_one_and_all_their_latents_have_cards(run_dir: Path, page: Parsed) -> None:
    found = splits.examples_of(Run(collect.collect([run_dir])))
    assert 0 < len(found) <= splits.N_EXAMPLES
    taken: list[tuple[str, int]] = []
    for pair, _, component in found:
        assert len({a for a, _, _ in component}) == 1 < len(component)
        taken += [(pair["small"], component[0][0]), *((pair["large"], b) for _, b, _ in component)]
    assert len(taken) == len(set(taken))  # no latent in two examples
    for i in range(len(found)):
        part = page.html.split(f'<figure id="split-{i}"')[1].split("</figure>")[0]
        links = part.split('<p class="note">')[1].split("</p>")[0]
        assert links.count("<a href=") == 1 + len(found[i][2])  # a card for each of its latents


def test_what_activations_say_of_a_pair_is_drawn_in_full(figures: dict[str, Any], run_dir: Path) -> None:
    pair = payload(run_dir, "stitch.json")["pairs"][0]
    data = pair["data"]
    at = [[row[i].value for row in figures["pair-0-roc"].data.rows] for i in (2, 3)]
    assert at == [data["roc"]["false_positive"], data["roc"]["true_positive"]]
    swaps = figures["pair-0-swaps"]
    assert sum(c.value for row in swaps.table.rows for c in row[1:]) == pair["components"]
    assert "Median change: MSE +0.040 %, L0 −0.030 %; 50.0 % raise the MSE, 100 % lower L0" in swaps.caption
    for name in ("novel", "reconstruction"):
        drawn = [row for row in figures["pair-0-cumulative"].data.rows if row[0].text == name]
        assert [row[2].value for row in drawn] == data["cumulative"][f"n_{name}"]
        last = sum(curve[-1] for curve in data["cumulative"][name]) / 3
        assert drawn[-1][3].value == pytest.approx(100 * last)
    counted = [sum(row[i].value for row in figures["pair-0-scaling"].table.rows) for i in (2, 3)]
    assert counted == [pair["novel"], pair["reconstruction"]]
    agreement = {row[1].value: (row[2].value, row[3].value) for row in figures["pair-0-agreement"].data.rows}
    values = zip(pair["max_cosine"]["values"], data["activation_cosine"]["values"], strict=True)
    assert agreement == dict(enumerate(values)) and "R² = 0.87" in figures["pair-0-agreement"].caption
    bars = [row[2].value for row in figures["pair-0-firing"].table.rows]
    means = data["firing_errors"]["mean_of_novel"]
    assert bars[:4] == [means[f"{w}_{p}"] for w in ("small", "large") for p in ("where_fires", "elsewhere")]
    losses = figures["pair-0-ce"].table.rows
    assert [row[2].value for row in losses] == [c["ce_loss_with_sae"] for c in data["ce"]]
    assert [row[1].value for row in losses] == [data["path"]["n_latents"][c["step"]] for c in data["ce"]]


def test_parts_that_a_record_lacks_are_no_figures(run_dir: Path) -> None:
    pair = payload(run_dir, "stitch.json")["pairs"][0]
    drawing = (behaviour.predictor, behaviour.cumulative, behaviour.swaps, behaviour.firing, behaviour.losses)
    assert [f(pair, {}, "x") for f in drawing] == [None] * 5
    assert behaviour.scaling(pair, {}, 0.7, "x") is behaviour.agreement(pair, {}, 0.7, "x") is None


def test_what_does_not_depend_on_theta_is_drawn_once(run_dir: Path, tmp_path: Path) -> None:
    header, record = container.read_json(run_dir / "stitch.json")
    writing.write_json(tmp_path / "a.json", header, record)
    writing.write_json(tmp_path / "b.json", header, record | {"theta": 0.5})
    drawn = {f.id for f in figures_of(sections.page(collect.collect([tmp_path]), "t", Look(features=0)))}
    assert {"pair-0-roc", "pair-0-effects", "pair-1-path"} <= drawn
    assert not {"pair-1-roc", "pair-1-effects", "pair-1-agreement"} & drawn


def test_matching_and_biases_stand_in_tables(page: Parsed, run_dir: Path) -> None:
    assert page.column("Matched one to one", "shared") == [0.755, 0.755, 0.7]
    mse = payload(run_dir, "stitch.json")["bias_exchange"]["mse"]
    assert page.column("Output biases exchanged", "with its own bias") == [mse[i][i] for i in range(3)]
    other = page.column("Output biases exchanged", "bias of sae-256.st")
    assert other == pytest.approx([mse[i][2] / mse[i][i] - 1 for i in range(3)])


def test_thresholds_stand_in_one_table_as_headers_state_them(page: Parsed, run_dir: Path) -> None:
    names = page.column("Inference thresholds", "SAE")
    values = page.column("Inference thresholds", "θ")
    for name, value in zip(names, values, strict=True):
        assert value == container.read_header(run_dir / name).config["threshold"]["value"]
    assert page.column("Inference thresholds", "off") == pytest.approx([12.34 / 12 - 1] * 4)


def test_the_ends_of_training_are_the_last_records(page: Parsed, run_dir: Path) -> None:
    records = container.read_jsonl(run_dir / "train.jsonl")[1]
    last = {r["sae"]: r for r in records}
    for row in page.tables["Where training ended"]:
        assert row[1:4] == [last[row[0]][f] for f in ("latents", "step", "tokens")]


def test_baselines_and_panels_of_a_meta_sae_are_the_records(figures: dict[str, Any], run_dir: Path) -> None:
    record = payload(run_dir, "meta.json")
    rows = figures["meta-0-bars"].table.rows
    assert [row[1].value for row in rows] == [b["variance_explained"] for b in record["bars"]]
    assert "comparable SAE: sae-64.st, 64 latents against 12 meta-latents" in figures["meta-0-bars"].caption
    for part, names in (
        ("within", ("within", "within_comparable", "within_parent")),
        ("to", ("to_parent", "to_comparable", "random_to_parent", "random_to_comparable")),
        ("from", ("parent_to_meta", "parent_to_comparable", "parent_to_random")),
    ):
        counted = [row[3].value for row in figures[f"meta-0-cosine-{part}"].table.rows]
        assert counted == [c for name in names for c in record["max_cosine"][name]["counts"] if c]
    members = [row[3].value for row in figures["meta-0-members"].data.rows]
    assert members == sorted(record["meta_latents"]["n_members"], reverse=True)


def test_evaluations_intervals_bounds_and_positions_are_the_records(figures: dict[str, Any], run_dir: Path) -> None:
    saes = payload(run_dir, "eval.json")["saes"]
    ends = [[c.value for c in row[2:]] for row in figures["saes-ev"].table.rows]
    assert ends == [s["intervals"]["explained_variance"] for s in saes]
    assert [row[1].value for row in figures["saes-bound"].table.rows] == [s["recovery_bound"]["bound"] for s in saes]
    lost = [s["ce"]["ce_loss_with_sae"] - s["ce"]["ce_loss_without_sae"] for s in saes]
    assert [row[5].value for row in figures["saes-loss"].table.rows] == lost
    drawn = [row[3].value for row in figures["saes-position-0"].data.rows]
    assert drawn == [v for s in saes for v in s["by"]["position"]["explained_variance"]]


def test_tokens_are_ranked_by_their_share_of_the_error_and_shown_as_text(page: Parsed) -> None:
    rows = page.tables["Tokens that hold most of sae-64.st's error"]
    assert [row[1] for row in rows] == [0, 30, 12, 6]  # 900·1, 500·0.5, 40·2, 3·3
    assert [row[0] for row in rows[:2]] == [f'"{WORDS[0]}"', f'"{WORDS[30]}"']
    assert sum(row[4] for row in rows) == pytest.approx(1)


def test_the_cache_is_described_as_its_manifest_says(page: Parsed, figures: dict[str, Any]) -> None:
    assert page.column("Activation caches", "mean norm") == [STATISTICS["mean_norm"]]
    assert page.column("Activation caches", "rows, train") == [450_000]
    quantiles = [[c.value for c in row] for row in figures["activations-0-norms"].table.rows]
    assert quantiles == PROFILE["norm_quantiles"]
    dims = [row[0].value for row in figures["activations-0-dims"].table.rows]
    assert dims == [d["dim"] for d in PROFILE["outlier_dims"]]
    assert page.column("The 5 most frequent tokens of acts", "token")[0] == '" the"'


def test_what_is_not_measured_is_named_with_its_option(run_dir: Path, tmp_path: Path) -> None:
    header, record = container.read_json(run_dir / "eval.json")
    for sae in record["saes"]:
        del sae["by"]
        sae["ce"] = None
    writing.write_json(tmp_path / "eval.json", header, record)
    text = Parsed(build([tmp_path])).text()
    assert all(w in text for w in ("saetool eval --ce", "saetool eval --by position", "saetool eval --by token"))


def test_the_distribution_of_scores_holds_every_score(figures: dict[str, Any], run_dir: Path) -> None:
    records = container.read_jsonl(run_dir / "explanations.jsonl")[1]
    known = sorted(
        v for r in records if (v := (r.get("scores") or {}).get("simulate", {}).get("correlation")) is not None
    )
    drawn = [row for row in figures["explained-0-ecdf"].data.rows if row[0].text == "descriptions"]
    assert [row[2].value for row in drawn] == known and drawn[-1][3].value == 1
    assert len(figures["explained-0-density"].data.rows) == len(known)
    assert b"descriptions," in csv_of(figures["explained-0-ecdf"])


def test_the_cost_of_calls_is_added_up_over_the_sessions_of_its_log(run_dir: Path, tmp_path: Path) -> None:
    header, records = container.read_jsonl(run_dir / "explanations.jsonl")
    header.config["backend"] = {"kind": "openai", "model": "big"}
    writing.write_jsonl(tmp_path / "e.jsonl", header, records)
    assert "saetool autointerp --log" in Parsed(build([tmp_path])).text()
    lines = []
    for key, cost in ((header.key, 0.25), (header.key, 0.5), ("another run's", 9.0)):
        log = h.Plan("autointerp", h.RUN_LOG, {"key": key}, []).header()
        used = {"calls": 10, "kept": 3, "prompt_tokens": 4100, "output_tokens": 90, "failures": {"timeout": 1}}
        lines += [{container.METADATA_KEY: log.to_json()}, {"time": 1.0, "event": "call"}]
        lines.append({"time": 2.0, "event": "usage", "cost": cost, **used})
    (tmp_path / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = Parsed(build([tmp_path])).tables["What the calls cost"]
    assert [r[1:] for r in row] == [["openai big", 20, 6, 8200, 180, 2, 0.75, 8200 / 41]]


def test_a_page_keeps_near_its_budget_unless_the_number_of_cards_is_given(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = importlib.import_module("saetool.commands.report")  # the package's own name is the function

    def cards(*more: str) -> tuple[int, int]:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.html"
        result = CliRunner().invoke(app, ["report", str(run_dir), "-o", str(out), "--json", *more])
        record = json.loads(result.stdout)
        return record["metrics"]["cards"], record["metrics"]["bytes"]

    whole, size = cards()
    monkeypatch.setattr(ReportConfig, "budget", f"{(size * 2) // 3000}KB")
    monkeypatch.setattr(report, "LEAST_CARDS", 3)
    fewer, smaller = cards()
    assert 3 <= fewer < whole and smaller < size
    assert cards("--features", "200")[0] == whole
