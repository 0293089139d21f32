import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_sae, save_sae, write_cache
from planted_text import PAIR, RANDOM, UNIGRAM, D, planted_cache, planted_sae
from scipy import stats
from typer.testing import CliRunner, Result

from saetool.artifacts import container, writing
from saetool.artifacts import header as h
from saetool.artifacts import sae as sae_files
from saetool.cli import app
from saetool.core.sae import SAE, unit_rows

FAST = ("--window", "16", "--min-firing", "8", "--n-quantile", "5", "--score-quantile", "5")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["autointerp", *(str(a) for a in arguments), "--device", "cpu"])


def ok(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr + repr(result.exception)
    return result


def refused(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.stderr + repr(result.exception)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("hint: ")]
    lines = [line for line in lines if line.startswith("saetool ")]
    assert len(lines) == 1
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a planted cache ``acts``, its SAE, the explanations of all its latents, and a meta-SAE."""
    folder = tmp_path_factory.mktemp("autointerp")
    planted_cache(folder / "acts")
    save_sae(folder / "sae.st", planted_sae())
    ok(folder / "sae.st", "--acts", folder / "acts", "--latents", "all", *FAST, "-o", folder / "all.jsonl")
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Path:
    """A copy of the small files; the cache is used where it is."""
    for name in ("sae.st", "all.jsonl", "all.windows.st"):
        shutil.copy(made / name, tmp_path)
    (tmp_path / "acts").symlink_to(made / "acts")
    return tmp_path


# --- what comes out --------------------------------------------------------------------------------------------


def test_every_latent_asked_for_has_a_record_in_order(made: Path) -> None:
    header, records = container.read_jsonl(made / "all.jsonl")
    assert [r["latent"] for r in records] == list(range(D))
    assert header.schema == h.EXPLANATIONS
    assert header.config["complete"] is True
    assert header.config["score_definition"] == 1
    counts = header.config["counts"]
    assert counts["requested"] == D
    assert counts["scored"] == 18
    assert counts["skipped"] == {"dead": 1, "too_rare": 2, "too_dense": 1, "one_half": 0}
    assert {i["role"] for i in header.inputs} == {"sae", "acts"}
    by_latent = {r["latent"]: r for r in records}
    assert by_latent[18]["status"] == "skipped"
    assert by_latent[18]["reason"] == "dead"
    assert by_latent[2]["description"].startswith('" w2" ')
    assert 'after " w6": " w12" ' in by_latent[6]["description"]


def test_scores_can_be_computed_again_from_the_windows(made: Path) -> None:
    _, records = container.read_jsonl(made / "all.jsonl")
    windows = container.read_tensors(made / "all.windows.st", h.WINDOWS)
    t = {name: tensor.numpy() for name, tensor in windows.tensors.items()}
    roles = windows.header.config["roles"]
    for record in records:
        if record["status"] != "scored":
            continue
        mine = slice(*record["windows"])
        assert (t["latent"][mine] == record["latent"]).all()
        valid = t["pred_valid"][mine] == 1
        assert valid.tolist() == [roles[r].startswith("score") for r in t["role"][mine]]
        places = np.arange(t["acts"].shape[1]) < t["length"][mine][valid][:, None]
        y, p = t["acts"][mine][valid][places], t["pred"][mine][valid][places]
        score = record["scores"]["simulate"]
        if score["correlation"] is not None:
            assert score["correlation"] == pytest.approx(stats.pearsonr(y, p).statistic, abs=1e-6)
            assert score["spearman"] == pytest.approx(stats.spearmanr(y, p).statistic, abs=1e-6)
        else:
            assert np.ptp(p) == 0
            assert score["null_reason"] == "constant_prediction"
        assert score["n_tokens"] == len(y)
        assert sum(record["n"].values()) == record["windows"][1] - record["windows"][0]
        # The table alone gives the prediction.
        strengths = {(a, b): s for a, b, s in record["table"]}
        for tokens, predicted in zip(t["tokens"][mine][valid], t["pred"][mine][valid], strict=True):
            for i, token in enumerate(tokens.tolist()):
                want = strengths.get((None, token), 0)
                want = strengths.get((int(tokens[i - 1]), token), want) if i else want
                assert predicted[i] == want


def test_the_summary_is_the_mean_of_the_records(made: Path) -> None:
    header, records = container.read_jsonl(made / "all.jsonl")
    summary = header.config["summary"]["simulate"]
    scores = {r["latent"]: r["scores"]["simulate"] for r in records if r["scores"]}
    defined = [s["correlation"] for s in scores.values() if s["correlation"] is not None]
    assert summary["mean"] == pytest.approx(np.mean(defined))
    assert summary["mean_null0"] == pytest.approx(sum(defined) / len(scores))
    assert summary["n_null"] == len(scores) - len(defined)
    controls = [s["shuffled"] for s in scores.values() if s["shuffled"] is not None]
    assert summary["control_mean"] == pytest.approx(np.mean(controls))
    assert abs(summary["control_mean_null0"]) < 0.1
    for latents, low in ((UNIGRAM, 0.95), (PAIR, 0.9)):
        assert min(scores[j]["correlation"] for j in latents) >= low
    assert abs(np.mean([scores[j]["correlation"] or 0 for j in RANDOM])) <= 0.1


def test_strings_of_all_tokens_are_in_the_headers(made: Path) -> None:
    header, records = container.read_jsonl(made / "all.jsonl")
    windows = container.read_tensors(made / "all.windows.st", h.WINDOWS)
    assert windows.header.config["strings"]["5"] == " w5"
    shown = {str(t) for t in windows.tensors["tokens"].unique().tolist() if t >= 0}
    assert shown == set(windows.header.config["strings"])
    named = {str(t) for r in records for e in r["table"] or [] for t in e[:2] if t is not None}
    assert named == set(header.config["strings"])
    assert header.config["windows_sha256"] == windows.sha256


def test_two_runs_give_the_same_bytes_without_a_network(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in ("a", "b"):
        ok(here / "sae.st", "--acts", here / "acts", "--latents", "9", *FAST, "-o", here / f"{name}.jsonl")
    assert (here / "a.jsonl").read_bytes() == (here / "b.jsonl").read_bytes()
    assert (here / "a.windows.st").read_bytes() == (here / "b.windows.st").read_bytes()
    assert str(here).encode() not in (here / "a.jsonl").read_bytes()


def test_another_seed_is_another_sample(here: Path) -> None:
    for seed in (0, 1):
        ok(
            here / "sae.st",
            "--acts",
            here / "acts",
            "--latents",
            "9",
            *FAST,
            "--seed",
            seed,
            "-o",
            here / f"{seed}.jsonl",
        )
    first, second = (container.read_jsonl(here / f"{seed}.jsonl")[1] for seed in (0, 1))
    assert len(first) == len(second) == 9
    assert [r["latent"] for r in first] != [r["latent"] for r in second]
    assert all(r["reason"] != "dead" for r in first + second)


@pytest.mark.parametrize("on", ["train", "heldout"])
def test_only_the_split_asked_for_is_read(here: Path, on: str) -> None:
    out = here / "some.jsonl"
    ok(here / "sae.st", "--acts", here / "acts", "--latents", "0,1,", "--on", on, *FAST, "-o", out)
    windows = container.read_tensors(here / "some.windows.st", h.WINDOWS).tensors
    assert ((windows["document"] % 5 == 4) == (on == "heldout")).all()
    assert container.read_jsonl(out)[0].config["sampling"]["n_rows"] == {"train": 18432, "heldout": 4608}[on]


def test_latents_can_be_given_in_a_file(here: Path) -> None:
    (here / "ids.txt").write_text("7\n0, 3\n")
    command = (here / "sae.st", "--acts", here / "acts", *FAST, "-o", here / "some.jsonl")
    ok(*command, "--latents", f"@{here / 'ids.txt'}")
    assert [r["latent"] for r in container.read_jsonl(here / "some.jsonl")[1]] == [0, 3, 7]
    assert "up to date" in ok(*command, "--latents", "3,7,0").stderr


# --- the command's contract ------------------------------------------------------------------------------------


def test_a_second_run_is_up_to_date_and_other_options_are_refused(here: Path) -> None:
    command = (here / "sae.st", "--acts", here / "acts", "--latents", "all", *FAST)
    before = (here / "all.jsonl").read_bytes()
    again = ok(*command, "-o", here / "all.jsonl")
    assert again.stdout.strip() == str(here / "all.jsonl")
    assert "up to date" in again.stderr
    refused(run(*command, "-o", here / "all.jsonl", "--n-top", "6"), 1, "n_top 5 there, 6 here")
    assert (here / "all.jsonl").read_bytes() == before
    ok(*command, "-o", here / "all.jsonl", "--n-top", "6", "--overwrite")
    assert (here / "all.jsonl").read_bytes() != before


def test_missing_windows_are_made_again(here: Path) -> None:
    before = (here / "all.windows.st").read_bytes()
    (here / "all.windows.st").unlink()
    ok(here / "sae.st", "--acts", here / "acts", "--latents", "all", *FAST, "-o", here / "all.jsonl")
    assert (here / "all.windows.st").read_bytes() == before


def test_json_gives_one_record(here: Path) -> None:
    result = ok(here / "sae.st", "--acts", here / "acts", "--latents", "3,4", *FAST, "-o", here / "x.jsonl", "--json")
    record = json.loads(result.stdout)
    assert record["kind"] == "explanations"
    assert record["sha256"] == h.sha256_file(here / "x.jsonl")
    assert record["metrics"]["summary"]["simulate"]["mean"] > 0.95


def test_dash_writes_the_records_to_standard_output(here: Path) -> None:
    result = ok(here / "sae.st", "--acts", here / "acts", "--latents", "3,4", *FAST, "-o", "-", "--quiet")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line.get("latent") for line in lines] == [None, 3, 4]
    assert not list(here.glob("*.windows.st")) or sorted(p.name for p in here.glob("*.st")) == [
        "all.windows.st",
        "sae.st",
    ]


def test_dry_run_writes_nothing(here: Path) -> None:
    result = ok(here / "sae.st", "--acts", here / "acts", "-o", here / "x.jsonl", "--dry-run")
    assert "200" in result.stdout
    assert "23040" in result.stdout
    assert not list(here.glob("x.*"))


def test_the_table_on_standard_error_shows_score_and_control(here: Path) -> None:
    said = ok(here / "sae.st", "--acts", here / "acts", "--latents", "3,4", *FAST, "-o", here / "x.jsonl").stderr
    assert "correlation, mean" in said
    assert "control" in said


def test_why_scores_are_undefined_is_said(here: Path) -> None:
    never = here / "never.jsonl"
    never.write_text('{"latent": 2, "description": "\\"no such token\\" 3; \\" w2\\" 0"}\n')
    files = (here / "sae.st", "--acts", here / "acts", *FAST, "-o", here / "y.jsonl")
    assert "1: 1 constant_prediction" in ok(*files, "--explanations", never).stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--n-top", "0", "--n-random", "0"), "--n-top 0"),
        (("--score-top", "0"), "--score-top 0"),
        (("--n-random", "-1"), "--n-random -1"),
        (("--window", "65"), "longer than the cache's contexts of 64"),
        (("--window", "1"), "--window 1"),
        (("--skip-positions", "64"), "nothing is left of the cache's contexts of 64"),
        (("--split", "1"), "--split 1"),
        (("--max-density", "0"), "--max-density"),
        (("--table-size", "0"), "--table-size 0"),
        (("--on", "test"), "--on test"),
        (("--latents", "1,99"), "no latent 99 among 22"),
        (("--latents", "1,x"), "x is no latent's number"),
        (("--latents", "4,1,4"), "names latent 4 twice"),
        (("--latents", "0"), "not a positive count"),
        (("--latents", ","), "nothing is no latent's number"),
        (("--labels", "x.jsonl"), "is no meta-SAE"),
        (("--parent", "x.st"), "is no meta-SAE"),
        (("-o", "x.json"), "ends in .jsonl"),
    ],
)
def test_options_that_cannot_work_are_usage_errors(here: Path, options: tuple[str, ...], words: str) -> None:
    refused(run(here / "sae.st", "--acts", here / "acts", "-o", here / "x.jsonl", *options), 2, words)
    assert not list(here.glob("x.*"))


def test_inputs_that_do_not_fit_are_named(here: Path, tmp_path: Path) -> None:
    out = ("-o", here / "x.jsonl")
    refused(run(here / "none.st", "--acts", here / "acts", *out), 1, "none.st: no such file")
    refused(run(here / "sae.st", "--acts", here / "none", *out), 1, "no such cache")
    refused(run(here / "sae.st", "--acts", here / "acts", "--latents", "@none.txt", *out), 1, "cannot be read")
    wide = save_sae(here / "wide.st", random_sae(d_in=16))
    refused(run(wide, "--acts", here / "acts", *out), 1, "width 16", "width 22")
    (here / "cut.st").write_bytes((here / "sae.st").read_bytes()[:-4])
    refused(run(here / "cut.st", "--acts", here / "acts", *out), 1, "cut off")
    shard = next(iter(sorted((here / "acts").glob("shard-*.st"))))
    refused(run(shard, "--acts", here / "acts", *out), 1, shard.name)
    untrained = SAE(**{**vars(planted_sae()), "arch": "batchtopk", "threshold": None, "k": 2})
    refused(run(save_sae(here / "b.st", untrained), "--acts", here / "acts", *out), 2, "saetool threshold")
    assert not list(here.glob("x.*"))


def test_a_cache_of_another_hook_is_a_warning(tmp_path: Path) -> None:
    write_cache(tmp_path / "acts")
    sae = random_sae()
    header = h.Plan("train", h.SAE, {}).header(
        config=sae_files.config_of(sae), model={"hook_name": "blocks.7.hook_resid_pre"}
    )
    sae_files.save(tmp_path / "sae.st", sae, header)
    out = tmp_path / "x.jsonl"
    result = ok(tmp_path / "sae.st", "--acts", tmp_path / "acts", "--min-firing", "2", "-o", out)
    assert "warning: sae.st was trained on blocks.7.hook_resid_pre" in result.stderr


def test_activations_that_are_no_numbers_are_refused(here: Path, tmp_path: Path) -> None:
    (here / "acts").unlink()
    cache = planted_cache(here / "acts")
    shard = sorted(cache.path.glob("shard-*.st"))[-1]
    whole = bytearray(shard.read_bytes())
    begin = 8 + int.from_bytes(whole[:8], "little")
    acts = json.loads(whole[8:begin])["acts"]
    assert acts["dtype"] in ("F32", "BF16", "F16")
    first, end = (begin + i for i in acts["data_offsets"])
    whole[first:end] = b"\xff" * (end - first)  # all ones are NaN in every format
    shard.write_bytes(whole)
    refused(run(here / "sae.st", "--acts", here / "acts", *FAST, "-o", here / "x.jsonl"), 1, "hold NaN or infinity")
    assert not list(here.glob("x.*"))


@pytest.mark.parametrize("latents", ["200", "all", "18,19"])
def test_nothing_to_explain_is_an_error_with_counts(here: Path, latents: str) -> None:
    never = SAE(**{**vars(planted_sae()), "threshold": torch.full((D,), 1e9)})
    save_sae(here / "never.st", never)
    result = run(here / "never.st", "--acts", here / "acts", "--latents", latents, "-o", here / "x.jsonl")
    refused(result, 1, "no latent could be explained", {"200": "all 22 dead", "all": "22 dead"}.get(latents, "2 dead"))
    assert not list(here.glob("x.*"))


def test_a_token_without_a_string_is_named(here: Path, tmp_path: Path) -> None:
    (here / "acts").unlink()
    planted_cache(here / "acts")
    header, payload = container.read_json(here / "acts" / "vocabulary.json")
    writing.write_json(here / "acts" / "vocabulary.json", header, {"strings": payload["strings"][:3]})
    refused(run(here / "sae.st", "--acts", here / "acts", *FAST, "-o", here / "x.jsonl"), 1, "has 3 strings")
    (here / "acts" / "vocabulary.json").unlink()
    refused(run(here / "sae.st", "--acts", here / "acts", *FAST, "-o", here / "x.jsonl"), 1, "vocabulary.json: no such")
    assert not list(here.glob("x.*"))


# --- meta-SAEs -------------------------------------------------------------------------------------------------


N_META, N_PARENT = 8, 60


def save_parent_and_meta(folder: Path, planted: bool = True) -> None:
    """A parent whose decoder rows are sums of two of eight directions, and a meta-SAE with those directions.

    A parent's table in ``base.jsonl`` holds the tokens of its two directions; without ``planted``, random tokens.
    """
    g = np.random.default_rng(0)
    directions = np.linalg.qr(g.standard_normal((16, N_META)))[0].T
    parts = [g.choice(N_META, 2, replace=False) for _ in range(N_PARENT)]
    weights = [0.5 + g.random(2) for _ in range(N_PARENT)]
    rows = torch.tensor(np.stack([w @ directions[p] for w, p in zip(weights, parts, strict=True)])).float()
    parent = SAE(
        W_enc=rows.T.contiguous(),
        b_enc=torch.zeros(N_PARENT),
        W_dec=rows,
        b_dec=torch.zeros(16),
        threshold=torch.full((N_PARENT,), 0.1),
        arch="jumprelu",
        k=None,
    )
    save_sae(folder / "parent.st", parent)
    loaded = sae_files.load(folder / "parent.st")
    base = torch.tensor(directions).float()
    meta = SAE(
        W_enc=base.T.contiguous(),
        b_enc=torch.zeros(N_META),
        W_dec=unit_rows(base),
        b_dec=torch.zeros(16),
        threshold=torch.full((N_META,), 0.2),
        arch="batchtopk",
        k=2,
    )
    plan = h.Plan("meta", h.SAE, {}, [loaded.as_input("parent")], [loaded.header])
    header = plan.header(config={**sae_files.config_of(meta), "hook": "decoder"}, model={"hook_name": "decoder"})
    sae_files.save(folder / "meta.st", meta, header)
    records = []
    for i, part in enumerate(parts):
        tokens = [int(j) for j in part] if planted else g.choice(40, 2, replace=False).tolist()
        records.append({"latent": i, "status": "scored", "table": [[None, t, 10] for t in tokens]})
    strings = {str(j): f" m{j}" for j in range(40)}
    plan = h.Plan("autointerp", h.EXPLANATIONS, {}, [loaded.as_input("sae")], [loaded.header])
    writing.write_jsonl(folder / "base.jsonl", plan.header(config={"strings": strings}), records)


def meta_command(folder: Path) -> tuple[object, ...]:
    return (folder / "meta.st", "--labels", folder / "base.jsonl", "-o", folder / "meta.jsonl")


def test_a_planted_meta_sae_is_labelled_and_its_parents_are_found(tmp_path: Path) -> None:
    save_parent_and_meta(tmp_path)
    ok(*meta_command(tmp_path))
    header, records = container.read_jsonl(tmp_path / "meta.jsonl")
    assert [r["latent"] for r in records] == list(range(N_META))
    for record in records:
        assert record["description"].startswith(f'" m{record["latent"]}" 10')
        assert record["scores"]["choice"]["chance"] == 0.2
        assert record["members"][0][1] == pytest.approx(record["max_act"])
    choice = header.config["summary"]["choice"]
    assert choice["n"] == N_PARENT
    assert choice["accuracy"] > 0.9
    assert choice["wilson95"][0] > 0.2
    assert choice["control_wilson95"][0] < 0.2 < choice["control_wilson95"][1]
    right = [
        o[r] for o, r in zip(header.config["questions"]["options"], header.config["questions"]["right"], strict=True)
    ]
    assert right == header.config["questions"]["latent"]
    assert [i["role"] for i in header.inputs] == ["sae", "parent", "labels"]


def test_tables_that_have_nothing_to_do_with_the_meta_sae_answer_near_chance(tmp_path: Path) -> None:
    save_parent_and_meta(tmp_path, planted=False)
    ok(*meta_command(tmp_path))
    choice = container.read_jsonl(tmp_path / "meta.jsonl")[0].config["summary"]["choice"]
    low, high = choice["wilson95"]
    assert low < 0.2 < high


def test_meta_runs_give_the_same_bytes_and_are_up_to_date(tmp_path: Path) -> None:
    save_parent_and_meta(tmp_path)
    ok(*meta_command(tmp_path))
    before = (tmp_path / "meta.jsonl").read_bytes()
    assert "up to date" in ok(*meta_command(tmp_path)).stderr
    ok(*meta_command(tmp_path), "--overwrite")
    assert (tmp_path / "meta.jsonl").read_bytes() == before
    refused(run(*meta_command(tmp_path), "--n-options", "4"), 1, "n_options 5 there, 4 here")


def test_labels_of_the_parent_with_a_threshold_are_the_parents(tmp_path: Path) -> None:
    save_parent_and_meta(tmp_path)
    parent = sae_files.load(tmp_path / "parent.st")
    plan = h.Plan("threshold", h.SAE, {}, [parent.as_input("sae")], [parent.header])
    sae_files.save(tmp_path / "t.st", parent.sae, plan.header(config=parent.header.config))
    labelled = sae_files.load(tmp_path / "t.st")
    assert labelled.sha256 != parent.sha256
    header, records = container.read_jsonl(tmp_path / "base.jsonl")
    plan = h.Plan("autointerp", h.EXPLANATIONS, {}, [labelled.as_input("sae")], [labelled.header])
    writing.write_jsonl(tmp_path / "base.jsonl", plan.header(config=header.config), records)
    ok(*meta_command(tmp_path))


def test_labels_of_the_meta_sae_itself_are_not_its_parents(tmp_path: Path) -> None:
    save_parent_and_meta(tmp_path)
    # The parent got its threshold from another file: labels of that one are its labels, too.
    raw, meta = sae_files.load(tmp_path / "parent.st"), sae_files.load(tmp_path / "meta.st")
    plan = h.Plan("threshold", h.SAE, {}, [raw.as_input("sae")], [raw.header])
    sae_files.save(tmp_path / "with.st", raw.sae, plan.header(config=raw.header.config))
    parent = sae_files.load(tmp_path / "with.st")
    plan = h.Plan("meta", h.SAE, {}, [parent.as_input("parent")], [parent.header])
    sae_files.save(tmp_path / "meta.st", meta.sae, plan.header(config=meta.header.config, model=meta.header.model))
    ok(*meta_command(tmp_path))
    own = (tmp_path / "meta.st", "--labels", tmp_path / "meta.jsonl", "-o", tmp_path / "x.jsonl")
    refused(run(*own), 1, "explains another SAE than with.st")


def test_meta_inputs_that_do_not_fit_are_named(tmp_path: Path) -> None:
    save_parent_and_meta(tmp_path)
    command = meta_command(tmp_path)
    refused(run(command[0], *command[3:]), 2, "pass --labels")
    refused(run(*command, "--acts", tmp_path), 2, "no --acts")
    refused(run(command[0], "--labels", "-", *command[3:]), 2, "labels are a file")
    refused(run(*command, "--n-options", "61"), 2, "tables of only 60 latents")
    refused(run(*command, "--latents", "8,"), 2, "no latent 8 among 8")
    other = save_sae(tmp_path / "other.st", random_sae())
    refused(run(*command, "--parent", other), 1, "not the SAE that meta.st was made from")
    loaded = sae_files.load(other)
    plan = h.Plan("autointerp", h.EXPLANATIONS, {}, [loaded.as_input("sae")], [loaded.header])
    writing.write_jsonl(tmp_path / "foreign.jsonl", plan.header(config={}), [])
    refused(run(command[0], "--labels", tmp_path / "foreign.jsonl", *command[3:]), 1, "explains another SAE")
    header, _ = container.read_jsonl(tmp_path / "base.jsonl")
    writing.write_jsonl(tmp_path / "empty.jsonl", header, [])
    refused(run(command[0], "--labels", tmp_path / "empty.jsonl", *command[3:]), 1, "holds no token table")
    writing.write_jsonl(tmp_path / "bad.jsonl", header, [{"latent": 0, "table": [[1]]}])
    refused(run(command[0], "--labels", tmp_path / "bad.jsonl", *command[3:]), 1, "is damaged")
    (tmp_path / "parent.st").unlink()
    refused(run(*command), 1, "no such file", "pass --parent")
    assert not (tmp_path / "meta.jsonl").exists()


def test_meta_dry_run_writes_nothing(tmp_path: Path) -> None:
    save_parent_and_meta(tmp_path)
    assert "labelled latents: 60" in ok(*meta_command(tmp_path), "--dry-run").stdout
    assert not (tmp_path / "meta.jsonl").exists()


def save_two_parents_and_meta(folder: Path) -> tuple[Path, Path]:
    """The parent of ``save_parent_and_meta`` as the first 25 and the other 35 of its latents, and their meta-SAE."""
    save_parent_and_meta(folder)
    whole, meta = sae_files.load(folder / "parent.st"), sae_files.load(folder / "meta.st")
    header, records = container.read_jsonl(folder / "base.jsonl")
    paths = folder / "a.st", folder / "b.st"
    for path, mine in zip(paths, (slice(0, 25), slice(25, 60)), strict=True):
        sae = whole.sae
        half = {"W_enc": sae.W_enc[:, mine], "b_enc": sae.b_enc[mine], "W_dec": sae.W_dec[mine]}
        save_sae(path, SAE(**{**vars(sae), **half, "threshold": sae.threshold[mine]}))
        loaded = sae_files.load(path)
        plan = h.Plan("autointerp", h.EXPLANATIONS, {}, [loaded.as_input("sae")], [loaded.header])
        own = [{**r, "latent": r["latent"] - mine.start} for r in records[mine]]
        writing.write_jsonl(path.with_suffix(".jsonl"), plan.header(config=header.config), own)
    files = [sae_files.load(path) for path in paths]
    plan = h.Plan("meta", h.SAE, {}, [f.as_input("parent") for f in files], [f.header for f in files])
    config = {**sae_files.config_of(meta.sae), "hook": "decoder"}
    sae_files.save(folder / "both.st", meta.sae, plan.header(config=config, model={"hook_name": "decoder"}))
    return paths


def test_a_meta_sae_of_two_parents_is_labelled_from_both(tmp_path: Path) -> None:
    a, b = save_two_parents_and_meta(tmp_path)
    ok(*meta_command(tmp_path))
    _, whole = container.read_jsonl(tmp_path / "meta.jsonl")
    one = container.read_header(tmp_path / "meta.jsonl").config
    # Both lie beside it; labels in any order: each goes to its own parent.
    labels = ("--labels", tmp_path / "b.jsonl", "--labels", tmp_path / "a.jsonl")
    ok(tmp_path / "both.st", *labels, "-o", tmp_path / "out.jsonl")
    header, records = container.read_jsonl(tmp_path / "out.jsonl")
    assert records == whole, "the same latents, numbered through"
    for name in ("summary", "questions", "counts"):
        assert header.config[name] == one[name]
    assert [(p["name"], p["first"], p["d_sae"]) for p in header.config["parents"]] == [
        ("a.st", 0, 25),
        ("b.st", 25, 35),
    ]
    assert "parents" not in one
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in (a, b):
        path.rename(moved / path.name)
    refused(run(tmp_path / "both.st", *labels, "-o", tmp_path / "x.jsonl"), 1, "a.st: no such file", "--parent")
    given = ("--parent", moved / "b.st", "--parent", moved / "a.st")
    ok(tmp_path / "both.st", *labels, *given, "-o", tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


def test_labels_of_one_parent_alone_leave_the_others_latents_out(tmp_path: Path) -> None:
    save_two_parents_and_meta(tmp_path)
    files = (tmp_path / "both.st", "-o", tmp_path / "out.jsonl")
    said = ok(*files, "--labels", tmp_path / "b.jsonl").stderr
    assert "only 35 of" not in said, "more than half"
    header, records = container.read_jsonl(tmp_path / "out.jsonl")
    assert min(header.config["questions"]["latent"]) >= 25
    assert {m for r in records for m, _ in r["members"]} <= set(range(25, 60))
    said = ok(*files, "--labels", tmp_path / "a.jsonl", "--overwrite").stderr
    assert "only 25 of the parents' 60 latents" in said
    twice = ("--labels", tmp_path / "a.jsonl", "--labels", tmp_path / "a.jsonl")
    refused(run(*files, *twice, "--overwrite"), 2, "explains the same SAE")
    refused(run(*files, "--labels", tmp_path / "base.jsonl", "--overwrite"), 1, "explains another SAE than a.st, b.st")
    other = save_sae(tmp_path / "other.st", random_sae())
    refused(run(*files, *twice[:2], "--parent", other, "--overwrite"), 1, "none of the SAEs that both.st was made from")
