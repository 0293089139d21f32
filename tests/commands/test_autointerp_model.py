"""``saetool autointerp`` with a language model behind HTTP: a stub that speaks the protocols and plays parts."""

import collections
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import save_sae
from planted_text import STRINGS, planted_cache, planted_sae
from scipy import stats
from stub_llm import Body, Fault, Stub, answer_all, prompt_of, serving
from test_autointerp_command import meta_command, ok, refused, run, save_parent_and_meta

from saetool.artifacts import container, writing
from saetool.artifacts import header as h
from saetool.llm import http, local

KEY = "sk-canary-0987654321"
FAST = ("--window", "16", "--min-firing", "8")
SEVEN = ("--latents", "0,1,2,6,7,12,13")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planted cache, its SAE, and the windows of the seven latents with their true activations."""
    folder = tmp_path_factory.mktemp("model")
    planted_cache(folder / "acts")
    save_sae(folder / "sae.st", planted_sae())
    ok(folder / "sae.st", "--acts", folder / "acts", *SEVEN, *FAST, "-o", folder / "offline.jsonl")
    return folder


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http, "BACKOFF", 0.001)
    with serving() as running:
        monkeypatch.setenv("OPENAI_BASE_URL", running.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("ANTHROPIC_BASE_URL", running.url)
        monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
        yield running


@pytest.fixture
def here(base: Path, tmp_path: Path) -> Path:
    shutil.copy(base / "sae.st", tmp_path)
    (tmp_path / "acts").symlink_to(base / "acts")
    return tmp_path


def command(here: Path, *options: object, latents: tuple[str, ...] = SEVEN) -> tuple[object, ...]:
    files = (here / "sae.st", "--acts", here / "acts", "-o", here / "out.jsonl")
    return (*files, *latents, *FAST, "--backend", "openai", "--model", "m", *options)


def results(here: Path) -> tuple[dict, dict[int, dict], dict[str, np.ndarray]]:
    header, records = container.read_jsonl(here / "out.jsonl")
    windows = container.read_tensors(here / "out.windows.st", h.WINDOWS)
    return header.config, {r["latent"]: r for r in records}, {k: v.numpy() for k, v in windows.tensors.items()}


# --- parts that the stub plays -----------------------------------------------------------------------------------


class Player:
    """Knows the true activations of every window, by its tokens; each latent's description is its number."""

    def __init__(self, base: Path, strengths: Callable[[int, np.ndarray], np.ndarray]) -> None:
        t = {k: v.numpy() for k, v in container.read_tensors(base / "offline.windows.st", h.WINDOWS).tensors.items()}
        self.acts: dict[tuple[int, tuple[str, ...]], np.ndarray] = {}
        self.of_text: dict[str, int] = {}
        self.strengths = strengths
        for i, latent in enumerate(t["latent"].tolist()):
            n = int(t["length"][i])
            tokens = tuple(STRINGS[j] for j in t["tokens"][i, :n])
            self.acts[latent, tokens] = t["acts"][i, :n]
            self.of_text["".join(tokens)] = latent
        self.largest = {j: t["acts"][t["latent"] == j].max() for j in set(t["latent"].tolist())}

    def __call__(self, body: Body) -> str:
        prompt = prompt_of(body)
        if "What does the latent fire on?" in prompt:
            silent = re.findall(r"^\d+\. (.*)$", prompt.split("is silent in")[1], re.M)
            return json.dumps({"description": f"latent {self.of_text[silent[0]]}"})
        if "maps each excerpt's number to a number" in prompt:
            return answer_all(body)
        latent = int(re.search(r"fires on: latent (\d+)$", prompt, re.M)[1])
        out = {}
        for number, line in re.findall(r"^Excerpt (\d+): (.*)$", prompt, re.M):
            tokens = tuple(json.loads(t) for t in re.findall(r'\d+:("(?:[^"\\]|\\.)*")', line))
            truth = self.acts.get((latent, tokens), np.zeros(len(tokens)))
            levels = self.strengths(latent, 10 * truth / self.largest[latent])
            out[number] = {str(i): float(v) for i, v in enumerate(levels) if v}
        return json.dumps(out)


def test_an_oracle_is_right_about_every_latent(base: Path, here: Path, stub: Stub) -> None:
    stub.answer = Player(base, lambda latent, levels: levels)
    ok(*command(here))
    config, records, _ = results(here)
    for latent, record in records.items():
        assert record["description"] == f"latent {latent}"
        assert record["scores"]["simulate"]["correlation"] == pytest.approx(1, abs=1e-6)
        assert record["scores"]["simulate"]["n_missing"] == 0
    summary = config["summary"]["simulate"]
    assert summary["mean"] == pytest.approx(1, abs=1e-6)
    floors = [r["scores"]["simulate"].get("ngram") or 0 for r in records.values()]
    assert summary["floor_mean_null0"] == pytest.approx(np.mean(floors))
    assert summary["floor_n"] == sum(f != 0 for f in floors)
    assert summary["control_n"] == 0, "the oracle says nothing of other latents' windows: undefined, not 0"
    assert summary["floor_mean"] == pytest.approx(
        np.mean(
            [r["scores"]["simulate"]["ngram"] for r in records.values() if r["scores"]["simulate"]["ngram"] is not None]
        )
    )
    assert config["backend"] == {
        "kind": "openai",
        "model": "m",
        "scorer_model": "m",
        "host": re.sub(r"http://|/v1", "", stub.url),
        "capabilities": [],
    }


def test_the_model_is_shown_the_explaining_windows_with_their_strengths_and_no_others(here: Path, stub: Stub) -> None:
    ok(*command(here, "--concurrency", "1"))
    _, records, t = results(here)
    shown = [prompt for prompt in stub.prompts if "What does the latent fire on?" in prompt]
    assert len(shown) == 7
    for latent, prompt in zip(records, shown, strict=True):
        mine = (t["latent"] == latent) & (t["role"] < 3)
        want = []
        for tokens, acts in zip(t["tokens"][mine], t["acts"][mine], strict=True):
            strings = [STRINGS[i] for i in tokens]
            levels = np.ceil(10 * acts / t["acts"][mine].max()).astype(int).tolist()
            named = ", ".join(f'"{s}" {v}' for s, v in zip(strings, levels, strict=True) if v)
            want.append(("".join(strings), named))
        firing, silent = prompt.split("The latent is silent in these excerpts:")
        texts = [re.sub("<<|>>", "", x) for x in re.findall(r"^\d+\. (.*)$", firing, re.M)]
        strengths = re.findall(r"^   strengths: (.*)$", firing, re.M)
        assert list(zip(texts, strengths, strict=True)) == [w for w in want if w[1]]
        assert re.findall(r"^\d+\. (.*)$", silent, re.M) == [text for text, named in want if not named]


def test_the_floor_is_what_the_table_scores_offline(base: Path, here: Path, stub: Stub) -> None:
    ok(*command(here))
    offline = {r["latent"]: r for r in container.read_jsonl(base / "offline.jsonl")[1]}
    _, records, windows = results(here)
    for latent, record in records.items():
        assert record["scores"]["simulate"]["ngram"] == offline[latent]["scores"]["simulate"]["correlation"]
        assert record["table"] == offline[latent]["table"]
    before = container.read_tensors(base / "offline.windows.st", h.WINDOWS).tensors
    assert (windows["tokens"] == before["tokens"].numpy()).all(), "the same windows"


def test_noise_scores_nothing(base: Path, here: Path, stub: Stub) -> None:
    g = np.random.default_rng(0)
    stub.answer = Player(base, lambda latent, levels: np.round(g.random(len(levels)) * 10, 3))
    ok(*command(here, "--concurrency", "1"))
    _, records, windows = results(here)
    values = [r["scores"]["simulate"]["correlation"] for r in records.values()]
    assert abs(np.mean(values)) < 3 * np.std(values, ddof=1) / np.sqrt(len(values)) + 0.01
    for record in records.values():
        mine = slice(*record["windows"])
        valid = windows["pred_valid"][mine] == 1
        y, p = windows["acts"][mine][valid].ravel(), windows["pred"][mine][valid].ravel()
        assert record["scores"]["simulate"]["correlation"] == pytest.approx(stats.pearsonr(y, p).statistic, abs=1e-6)


def test_a_constant_is_undefined_and_in_no_mean(base: Path, here: Path, stub: Stub) -> None:
    stub.answer = Player(base, lambda latent, levels: np.full(len(levels), 3.0))
    ok(*command(here))
    config, records, _ = results(here)
    for record in records.values():
        assert record["scores"]["simulate"]["correlation"] is None
        assert record["scores"]["simulate"]["null_reason"] == "constant_prediction"
    summary = config["summary"]["simulate"]
    assert (summary["n"], summary["n_null"], summary["mean"], summary["mean_null0"]) == (0, 7, None, 0.0)


def test_anthropic_gives_the_same_scores(base: Path, here: Path, stub: Stub) -> None:
    stub.answer = Player(base, lambda latent, levels: levels)
    ok(*command(here, "--backend", "anthropic"))
    assert results(here)[0]["summary"]["simulate"]["mean"] == pytest.approx(1, abs=1e-6)
    assert {path for path, _, _ in stub.requests} == {"/v1/messages"}


def test_another_model_can_judge(base: Path, here: Path, stub: Stub) -> None:
    stub.answer = Player(base, lambda latent, levels: levels)
    ok(*command(here, "--scorer-model", "j"))
    asked = collections.Counter((body["model"], "What does" in prompt_of(body)) for _, _, body in stub.requests)
    assert set(asked) == {("m", True), ("j", False)}


# --- detection, fuzzing, intruder --------------------------------------------------------------------------------


def judge_by_word(body: Body) -> str:
    """Fires on the word w2: says so of excerpts, of marked words, and finds the excerpt without it."""
    prompt = prompt_of(body)
    if "What does the latent fire on?" in prompt:
        return '{"description": "w2"}'
    if '{"answer": NUMBER}' in prompt:
        texts = re.findall(r"^\d+\. (.*)$", prompt, re.M)
        return json.dumps({"answer": 1 + [bool(re.search(r" w2\b", t)) for t in texts].index(False)})
    marks = re.search(r"fires on the tokens between (\S+) and (\S+),", prompt)
    out = {}
    for number, text in re.findall(r"^Excerpt (\d+): (.*)$", prompt, re.M):
        wanted = rf"{re.escape(marks[1])} w2({re.escape(marks[2])}|$)" if marks else r" w2\b"
        out[number] = 9 if re.search(wanted, text) else 1
    return json.dumps(out)


def test_detection_fuzzing_and_intruders_by_a_perfect_judge(here: Path, stub: Stub) -> None:
    stub.answer = judge_by_word
    scorers = ("--scorer", "detect,fuzz,intruder", "--control", "none")
    ok(*command(here, *scorers, latents=("--latents", "2,")))
    config, records, _ = results(here)
    scores = records[2]["scores"]
    assert (scores["detect"]["tp"], scores["detect"]["tn"]) == (5, 20)
    assert scores["detect"]["fp"] == scores["detect"]["fn"] == 0
    for name in ("detect", "fuzz"):
        assert scores[name]["balanced_accuracy"] == scores[name]["auc"] == scores[name]["mcc"] == 1
    assert scores["detect"]["trivial_accuracy"] == 0.8
    assert scores["fuzz"]["tp"] == 5
    assert scores["fuzz"]["tn"] == 25, "wrong marks on the firing windows and on the silent ones"
    assert scores["intruder"] == {
        "chance": 0.2,
        "correct": 5,
        "n": 5,
        "n_missing": 0,
        "null_reason": None,
        "value": 1.0,
    }
    assert config["summary"]["detect"]["chance"] == 0.5
    assert config["summary"]["intruder"]["mean"] == 1


def test_one_answer_to_everything_is_worth_what_guessing_is(here: Path, stub: Stub) -> None:
    ok(*command(here, "--scorer", "detect,fuzz,intruder"))
    config = results(here)[0]
    for name in ("detect", "fuzz"):
        assert config["summary"][name]["mean"] == 0.5
        assert config["summary"][name]["control_mean"] == 0.5
    low, high = np.array([-3, 3]) * np.sqrt(0.2 * 0.8 / 35) + 0.2
    assert low < config["summary"]["intruder"]["mean"] < high


def test_probabilities_are_used_where_the_server_gives_them(here: Path, stub: Stub) -> None:
    refused(
        run(*command(here, "--simulate", "logprob")), 1, "gives no log-probabilities of a prompt", "--backend local"
    )
    stub.echo = True
    ok(*command(here, "--simulate", "logprob", "--scorer", "simulate,detect"))
    config, records, windows = results(here)
    assert config["backend"]["capabilities"] == ["prompt_logprobs"]
    # The stub's likelihood of each digit d is proportional to exp(d).
    weights = np.exp(np.arange(10.0))
    want = 10 / 9 * (weights @ np.arange(10)) / weights.sum()
    valid = windows["pred_valid"] == 1
    assert windows["pred"][valid] == pytest.approx(want, rel=1e-5)
    assert all(r["scores"]["simulate"]["null_reason"] == "constant_prediction" for r in records.values())
    refused(run(*command(here, "--backend", "anthropic", "--simulate", "logprob")), 2, "Anthropic", "vLLM")


# --- faults ------------------------------------------------------------------------------------------------------


def test_no_credit_ends_the_run_on_the_first_reply_without_a_score(here: Path, stub: Stub) -> None:
    stub.script = [Fault(429, {"error": {"code": "insufficient_quota", "message": "out"}})] * 50
    refused(run(*command(here, "--concurrency", "1")), 1, "no credit left", "nothing was scored")
    assert len(stub.requests) == 1
    assert not list(here.glob("out.jsonl")) and not list(here.glob("out.windows.st"))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(401, {"error": {"message": f"bad key {KEY}"}}), "OPENAI_API_KEY was refused"),
        (Fault(404, {"error": {"message": "no such model"}}), "no model m there"),
        (Fault(400, {"error": {"message": "context length exceeded"}}), "5 calls failed one after the other"),
        (Fault(500, {"error": {"message": "down"}}), "5 calls failed one after the other"),
    ],
)
def test_a_backend_that_cannot_work_fails_with_one_line(here: Path, stub: Stub, fault: Fault, words: str) -> None:
    stub.script = [fault] * 1000
    result = run(*command(here, "--max-retries", "1"))
    refused(result, 1, words)
    assert KEY not in result.stderr
    assert not (here / "out.jsonl").exists()


def test_nobody_at_the_address_and_no_key_are_named(here: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as gone:
        pass
    refused(run(*command(here, "--base-url", gone.url)), 1, "cannot be reached")
    refused(run(*command(here, "--base-url", "http://example.com/v1")), 2, "in the clear", "--allow-http")
    monkeypatch.delenv("OPENAI_BASE_URL")
    monkeypatch.delenv("OPENAI_API_KEY")
    refused(run(*command(here)), 1, "OPENAI_API_KEY is not set")
    assert not (here / "out.jsonl").exists()


@pytest.mark.parametrize(
    "text",
    ["", "I would rather not.", '{"description": 3}', "<think>hm"],
    ids=["empty", "prose", "number", "reasoning"],
)
def test_a_description_that_cannot_be_read_is_a_failure_and_never_a_description(
    here: Path, stub: Stub, text: str
) -> None:
    def answer(body: Body) -> str:
        prompt = prompt_of(body)
        lost = "What does" in prompt and lost_text in prompt
        return text if lost else ('{"description": "d"}' if "What does" in prompt else "{}")

    windows = container.read_tensors(here / "acts" / ".." / "offline.windows.st", h.WINDOWS).tensors
    first = windows["tokens"][(windows["latent"] == 2) & (windows["role"] == 2)][0]
    lost_text = "".join(STRINGS[t] for t in first.tolist())
    stub.answer = answer
    result = run(*command(here, "--max-missing", "0.9", "--scorer", "detect", "--control", "none"))
    # "{}" has no answer for any window either: with so many allowed to be missing, these are counted alone.
    assert result.exit_code == 1
    _, records = container.read_jsonl(here / "out.jsonl")
    record = next(r for r in records if r["latent"] == 2)
    assert (record["status"], record["reason"], record["description"]) == ("failed", "unparsable", None)
    assert record["scores"] == {}
    assert text == "" or text not in (here / "out.jsonl").read_text()


def test_answers_are_found_in_fences_and_after_reasoning(base: Path, here: Path, stub: Stub) -> None:
    player = Player(base, lambda latent, levels: levels)
    stub.answer = lambda body: f"<think>hm {{}}</think>\n```json\n{player(body)}\n```\nDone."
    ok(*command(here))
    assert results(here)[0]["summary"]["simulate"]["mean"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("bad", ['{"1": {}}', '{"1": {"99": 5}}', '{"1": {"0": 11}}', '{"1": {"0": "high"}}', "[1, 2]"])
def test_a_simulation_that_cannot_be_read_twice_is_missing_and_not_zero(
    base: Path, here: Path, stub: Stub, bad: str
) -> None:
    player = Player(base, lambda latent, levels: levels)
    target = next(t for (j, t), a in player.acts.items() if j == 2 and a.max() > 0)  # explained with; find one scored

    def answer(body: Body) -> str:
        prompt = prompt_of(body)
        return bad if "fires on: latent 2" in prompt and shown in prompt else player(body)

    windows = container.read_tensors(base / "offline.windows.st", h.WINDOWS).tensors
    scored = windows["tokens"][(windows["latent"] == 2) & (windows["role"] == 3)][0]
    shown = f'0:"{STRINGS[int(scored[0])]}" 1:"{STRINGS[int(scored[1])]}" 2:"{STRINGS[int(scored[2])]}"'
    assert target
    stub.answer = answer
    result = ok(*command(here, "--log", here / "log.jsonl", "--control", "none"))
    assert "unparsable" in result.stderr
    config, records, tensors = results(here)
    score = records[2]["scores"]["simulate"]
    assert score["n_missing"] == 5
    assert score["n_windows"] == 20
    assert score["correlation"] == pytest.approx(1, abs=1e-6), "of the windows that were answered"
    mine = slice(*records[2]["windows"])
    assert int(tensors["pred_valid"][mine].sum()) == 20
    assert config["counts"]["missing_windows"] == 5
    repairs = [p for p in stub.prompts if "That could not be used" in p]
    assert len(repairs) == 1
    log = [json.loads(line) for line in (here / "log.jsonl").read_text().splitlines()]
    assert [r["kind"] for r in log if r["event"] == "failed"] == ["unparsable"]


def test_too_many_missing_windows_make_the_score_undefined_and_the_run_fail(base: Path, here: Path, stub: Stub) -> None:
    player = Player(base, lambda latent, levels: levels)
    stub.answer = lambda body: "no" if "fires on: latent 2" in prompt_of(body) else player(body)
    some = ("--scorer", "simulate,detect")
    refused(run(*command(here, *some)), 1, "too many answers are missing (1 missing_share of 7 latents)")
    told = results(here)[1][2]["scores"]["detect"]
    assert not [k for k, v in told.items() if isinstance(v, float) and k != "shuffled"]
    refused(run(*command(here, "--overwrite")), 1, "too many answers are missing (1 missing_share of 7 latents)")
    config, records, _ = results(here)
    assert config["complete"] is False
    assert records[2]["status"] == "failed"
    assert records[2]["scores"]["simulate"]["correlation"] is None
    assert records[2]["scores"]["simulate"]["null_reason"] == "missing_share"
    numbers = [k for k, v in records[2]["scores"]["simulate"].items() if isinstance(v, float) and k != "shuffled"]
    assert not numbers, "nothing that could be taken for a score"
    assert config["summary"]["simulate"]["n_null"] == 1
    before = len(stub.requests)
    refused(run(*command(here)), 1, "too many answers are missing")
    assert len(stub.requests) == before, "kept answers are not asked for again"
    ok(*command(here, "--max-missing", "1", "--overwrite"))
    assert len(stub.requests) == before


def test_answers_cut_off_by_hidden_reasoning_are_failures(here: Path, stub: Stub) -> None:
    stub.script = [Fault(text="", finish="length")] * 100
    refused(run(*command(here)), 1, "too many answers are missing (7 unparsable of 7 latents)", "nothing was written")


# --- kept answers, budgets, dry runs -----------------------------------------------------------------------------


def test_a_second_run_is_up_to_date_and_another_file_needs_no_call(base: Path, here: Path, stub: Stub) -> None:
    stub.answer = Player(base, lambda latent, levels: levels)
    ok(*command(here))
    n, made = len(stub.requests), (here / "out.jsonl").read_bytes()
    assert "up to date" in ok(*command(here)).stderr
    kept = ("--call-cache", here / "out.calls.sqlite")
    ok(*command(here, *kept, "-o", here / "again.jsonl"))
    assert (here / "again.jsonl").read_bytes() == made
    result = ok(*command(here, *kept, "-o", here / "third.jsonl", "--cache-only"))
    assert "0 calls" in result.stderr
    assert len(stub.requests) == n
    other = run(*command(here, *kept, "--cache-only", "--seed", "1", "-o", here / "x.jsonl"))
    refused(other, 1, "not in the call cache")
    refused(run(*command(here, "--model", "other")), 1, "model m there, other here")
    none = here / "none.sqlite"
    refused(run(*command(here, "--cache-only", "--call-cache", none, "-o", here / "y.jsonl")), 1, "no such call cache")
    assert not none.exists()


def test_a_budget_stops_cleanly_and_a_larger_one_goes_on(base: Path, here: Path, stub: Stub) -> None:
    stub.answer = Player(base, lambda latent, levels: levels)
    refused(run(*command(here, "--max-calls", "3")), 1, "stopped at --max-calls 3: 0 of 7 latents scored")
    assert len(stub.requests) == 3
    assert results(here)[0]["counts"]["explained"] == 3
    refused(run(*command(here, "--max-calls", "30")), 1, "stopped at --max-calls 30", "out.jsonl holds what is done")
    assert len(stub.requests) == 33
    config, records, _ = results(here)
    assert config["complete"] is False
    stopped = [r for r in records.values() if r["reason"] == "stopped"]
    assert stopped and all(r["status"] == "failed" and r["scores"] == {} for r in stopped)
    ok(*command(here))
    assert results(here)[0]["complete"] is True
    assert len({json.dumps(b, sort_keys=True) for _, _, b in stub.requests}) == len(stub.requests), "no call twice"
    money = ("--price-in", "1", "--price-out", "1")
    refused(
        run(*command(here, *money, "--max-cost", "1e-9", "--call-cache", here / "new.sqlite", "--overwrite")),
        1,
        "stopped at --max-cost",
    )


def test_a_dry_run_counts_every_call_and_opens_no_socket(
    base: Path, here: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saetool.llm import tokens

    stub.answer = Player(base, lambda latent, levels: np.round(levels))
    stub.tokens = tokens.estimate
    scorers = ("--scorer", "simulate,detect", "--price-in", "2", "--price-out", "4")
    with monkeypatch.context() as blocked:

        def refuse(*_: object) -> None:
            raise AssertionError("a dry run opened a connection")

        blocked.setattr(socket.socket, "connect", refuse)
        plan = json.loads(ok(*command(here, *scorers, "--dry-run", "--json")).stdout)
    assert not list(here.glob("out*"))
    assert plan["cost"] == pytest.approx((2 * plan["prompt_tokens"] + 4 * plan["output_tokens"]) / 1e6)
    ok(*command(here, *scorers, "--log", here / "log.jsonl"))
    assert plan["calls"] == len(stub.requests) == 7 * (1 + 2 * 5 + 2 * 5)
    used = json.loads((here / "log.jsonl").read_text().splitlines()[-1])
    assert used["calls"] == plan["calls"]
    assert plan["prompt_tokens"] == pytest.approx(used["prompt_tokens"], rel=0.05)


def test_no_file_and_no_line_ever_holds_the_key(base: Path, here: Path, stub: Stub) -> None:
    stub.answer = Player(base, lambda latent, levels: levels)
    stub.script = [Fault(500, {"error": {"message": f"{KEY} is busy"}})] * 2
    said = ok(*command(here, "--log", here / "log.jsonl", "--export", "neuronpedia", "--max-retries", "1"))
    said2 = ok(*command(here, "--dry-run"))
    stub.script = [Fault(401, {"error": {"message": f"Incorrect API key provided: {KEY}"}})]
    said3 = run(*command(here, "-o", here / "other.jsonl", "--debug", "--seed", "1"))
    texts = [s.stdout + s.stderr + repr(s.exception) for s in (said, said2, said3)]
    for file in (f for f in here.iterdir() if f.is_file()):
        assert KEY.encode() not in file.read_bytes(), file
    assert not any(KEY in t for t in texts)
    assert all(headers["authorization"] == f"Bearer {KEY}" for _, headers, _ in stub.requests)


def test_a_killed_run_goes_on_without_repeating_a_call(base: Path, here: Path, stub: Stub) -> None:
    stub.answer = Player(base, lambda latent, levels: levels)
    stub.delay = 0.03
    words = [str(a) for a in command(here, "--concurrency", "4")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    first = subprocess.Popen([sys.executable, "-m", "saetool", "autointerp", *words], env=environment)
    while len(stub.requests) < 25:
        assert first.poll() is None
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (here / "out.jsonl").exists()
    ok(*words)
    sent = collections.Counter(json.dumps(body, sort_keys=True) for _, _, body in stub.requests)
    assert max(sent.values()) <= 2
    assert sum(n - 1 for n in sent.values()) <= 4, "only calls that were under way"
    n, made = len(stub.requests), (here / "out.jsonl").read_bytes()
    ok(*command(here, "-o", here / "fresh.jsonl"))
    assert (here / "fresh.jsonl").read_bytes() == made
    assert len(stub.requests) == n + 7 * 11
    assert "up to date" in ok(*words).stderr
    assert len(stub.requests) == n + 7 * 11


def test_an_interruption_ends_with_130_and_keeps_what_is_done(base: Path, here: Path, stub: Stub) -> None:
    stub.answer = Player(base, lambda latent, levels: levels)
    stub.delay = 0.03
    words = [str(a) for a in command(here, "--concurrency", "2")]
    process = subprocess.Popen(
        [sys.executable, "-m", "saetool", "autointerp", *words], stderr=subprocess.PIPE, text=True
    )
    while len(stub.requests) < 40:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "run the same command again" in said
    assert "Traceback" not in said
    config, records, _ = results(here)
    assert config["complete"] is False
    assert {r["status"] for r in records.values()} == {"scored", "failed"}
    n = len(stub.requests)
    ok(*words)
    assert results(here)[0]["complete"] is True
    assert len(stub.requests) == 7 * 11
    assert n < 7 * 11


def test_an_interruption_while_a_server_asks_to_wait_ends_soon(here: Path, stub: Stub) -> None:
    stub.script = [Fault(429, {"error": {"message": "busy"}}, {"Retry-After": "60"})] * 1000
    words = [str(a) for a in command(here)]
    process = subprocess.Popen(
        [sys.executable, "-m", "saetool", "autointerp", *words], stderr=subprocess.PIPE, text=True
    )
    while not stub.requests:
        assert process.poll() is None
        time.sleep(0.005)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=5)
    assert process.returncode == 130
    assert "429 busy; next try in 60 s" in said
    assert "stopping: calls under way are waited for" in said
    assert "run the same command again" in said
    assert "Traceback" not in said


# --- given descriptions, candidates, other inputs ----------------------------------------------------------------


def test_given_descriptions_are_scored_and_nothing_is_explained(base: Path, here: Path, stub: Stub) -> None:
    stub.answer = Player(base, lambda latent, levels: levels)
    lines = [{"latent": 2, "description": "latent 2"}, {"index": "12", "explanation": "latent 12"}]
    (here / "mine.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    ok(*command(here, "--explanations", here / "mine.jsonl", latents=()))
    _, records, _ = results(here)
    assert sorted(records) == [2, 12]
    assert records[12]["explainer"] == "given"
    assert not any("What does" in p for p in stub.prompts)
    assert all(r["scores"]["simulate"]["correlation"] == pytest.approx(1, abs=1e-6) for r in records.values())


def test_tables_written_by_hand_are_scored_offline(here: Path) -> None:
    (here / "mine.jsonl").write_text('{"latent": 2, "description": "\\" w2\\" 10"}\n')
    files = (here / "sae.st", "--acts", here / "acts", *FAST, "-o", here / "out.jsonl")
    ok(*files, "--explanations", here / "mine.jsonl")
    _, records, _ = results(here)
    assert records[2]["scores"]["simulate"]["correlation"] > 0.99
    (here / "mine.jsonl").write_text('{"latent": 2, "description": "the word two"}\n')
    refused(run(*files, "--explanations", here / "mine.jsonl", "--overwrite"), 2, "only tables of tokens can be scored")


def test_our_own_explanations_score_again_as_they_did(base: Path, here: Path) -> None:
    files = (here / "sae.st", "--acts", here / "acts", *FAST, "-o", here / "out.jsonl")
    ok(*files, "--explanations", base / "offline.jsonl")
    _, records, _ = results(here)
    for record in container.read_jsonl(base / "offline.jsonl")[1]:
        again = records[record["latent"]]["scores"]["simulate"]
        assert again["correlation"] == record["scores"]["simulate"]["correlation"]


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("", 1, "holds no description"),
        ("{", 1, "line 1 is not JSON"),
        ("[]", 1, "line 1 is no JSON object"),
        ('{"latent": 99, "description": "x"}', 1, "latent 99 is none of 0 … 21"),
        ('{"latent": 2}', 1, "latent 2 has no description"),
        ('{"latent": 2, "description": "a"}\n{"latent": 2, "description": "b"}', 2, "describes latent 2 twice"),
    ],
)
def test_bad_files_of_descriptions_are_named(here: Path, text: str, code: int, words: str) -> None:
    (here / "mine.jsonl").write_text(text)
    files = (here / "sae.st", "--acts", here / "acts", *FAST, "-o", here / "out.jsonl")
    refused(run(*files, "--explanations", here / "mine.jsonl"), code, words)


def test_the_best_of_several_descriptions_is_kept(base: Path, here: Path, stub: Stub) -> None:
    replies = collections.Counter()

    def answer(body: Body) -> str:
        prompt = prompt_of(body)
        if "What does" in prompt:
            replies[prompt] += 1
            return json.dumps({"description": ["nothing", "w2", "w3"][replies[prompt] - 1]})
        word = re.search(r"fires on: (.*)$", prompt, re.M)[1]
        out = {}
        for number, line in re.findall(r"^Excerpt (\d+): (.*)$", prompt, re.M):
            out[number] = {i: 9 for i, t in re.findall(r'(\d+):" (w\d+)"', line) if t == word}
        return json.dumps(out)

    stub.answer = answer
    options = ("--candidates", "3", "--temperature", "0.7", "--concurrency", "1")
    ok(*command(here, *options, latents=("--latents", "2,")))
    _, records, windows = results(here)
    assert records[2]["description"] == "w2"
    assert records[2]["n"]["select_top"] == 5
    roles = windows["role"]
    documents = [set(windows["document"][(roles >= a) & (roles < a + 3)].tolist()) for a in (0, 3, 6)]
    assert not documents[0] & documents[1] and not documents[1] & documents[2] and not documents[0] & documents[2]
    assert (windows["pred_valid"] == ((roles >= 3) & (roles < 6))).all()


def test_neuronpedia_gets_its_fields(base: Path, here: Path, stub: Stub) -> None:
    stub.answer = Player(base, lambda latent, levels: levels)
    ok(*command(here, "--export", "neuronpedia"))
    lines = [json.loads(line) for line in (here / "out.neuronpedia.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == ["0", "1", "2", "6", "7", "12", "13"]
    one = lines[2]
    assert set(one) >= {
        "modelId", "layer", "index", "description", "typeName", "explanationModelName", "authorId", "notes"
    }  # fmt: skip
    assert one["description"] == "latent 2"
    assert one["explanationModelName"] == "m"
    assert one["layer"] == "blocks.0.hook_resid_post-sae"
    (score,) = one["scores"]
    assert score["value"] == pytest.approx(1, abs=1e-6)
    top = one["activations"][0]
    assert top["values"][top["maxValueTokenIndex"]] == top["maxValue"] == max(top["values"])
    assert len(top["tokens"]) == len(top["values"]) == 16


# --- meta-SAEs ---------------------------------------------------------------------------------------------------


def described(folder: Path) -> None:
    """Gives the parents of ``save_parent_and_meta`` descriptions that say their tokens."""
    header, records = container.read_jsonl(folder / "base.jsonl")
    for record in records:
        record["description"] = " and ".join(f"m{t}" for _, t, _ in record["table"]) + f", no. {record['latent']}"
    writing.write_jsonl(folder / "base.jsonl", header, records)


def overlap(body: Body) -> str:
    """Labels a group by what all its members have; picks the option that shares most words with the parts."""
    prompt = prompt_of(body)
    if "What do they have in common?" in prompt:
        members = [set(re.findall(r"m\d+", line)) for line in re.findall(r"^\d+\. weight.*$", prompt, re.M)]
        return json.dumps({"description": " ".join(sorted(set.intersection(*members)) or ["none"])})
    parts = set(re.findall(r"m\d+", prompt.split("Which latent is it?")[0]))
    options = [set(re.findall(r"m\d+", o)) for o in re.findall(r"^\d+\. (.*)$", prompt, re.M)]
    return json.dumps({"answer": 1 + max(range(len(options)), key=lambda i: len(options[i] & parts))})


def test_meta_latents_are_labelled_and_chosen_among_by_the_model(tmp_path: Path, stub: Stub) -> None:
    save_parent_and_meta(tmp_path)
    described(tmp_path)
    stub.answer = overlap
    asked = (*meta_command(tmp_path), "--backend", "openai", "--model", "m")
    plan = json.loads(ok(*asked, "--dry-run", "--json").stdout)
    assert not (tmp_path / "meta.jsonl").exists()
    ok(*asked)
    assert plan["calls"] == len(stub.requests)
    header, records = container.read_jsonl(tmp_path / "meta.jsonl")
    assert [r["description"] for r in records] == [f"m{i}" for i in range(8)]
    choice = header.config["summary"]["choice"]
    assert choice["n"] == 60
    assert choice["accuracy"] > 0.85
    assert choice["floor_accuracy"] > 0.85
    assert choice["control_wilson95"][0] < 0.3
    assert choice["n_missing"] == 0
    # No label in a question is made from one of its options.
    for prompt in (p for p in stub.prompts if "Which latent is it?" in p):
        assert prompt.count("- weight") == 2
    assert "up to date" in ok(*asked).stderr


def test_a_choice_made_at_random_is_at_chance_and_an_oracles_is_right(tmp_path: Path, stub: Stub) -> None:
    save_parent_and_meta(tmp_path)
    described(tmp_path)
    # Each parent's description is its own: an oracle that is told the weights finds it.
    header, records = container.read_jsonl(tmp_path / "base.jsonl")
    for record in records:
        record["description"] = f"parent {record['latent']}"
    writing.write_jsonl(tmp_path / "base.jsonl", header, records)
    g = np.random.default_rng(0)
    stub.answer = lambda body: (
        json.dumps({"answer": int(g.integers(5)) + 1}) if "Which latent" in prompt_of(body) else '{"description": "x"}'
    )
    asked = (*meta_command(tmp_path), "--backend", "openai", "--model", "m")
    ok(*asked)
    header, _ = container.read_jsonl(tmp_path / "meta.jsonl")
    low, high = np.array([-2.58, 2.58]) * np.sqrt(0.2 * 0.8 / 60) + 0.2
    assert low <= header.config["summary"]["choice"]["accuracy"] <= high
    questions = header.config["questions"]
    right = {tuple(o): r + 1 for o, r in zip(questions["options"], questions["right"], strict=True)}

    def oracle(body: Body) -> str:
        if "Which latent" not in prompt_of(body):
            return '{"description": "x"}'
        options = re.findall(r"^\d+\. parent (\d+)$", prompt_of(body), re.M)
        return json.dumps({"answer": right[tuple(map(int, options))]})

    stub.answer = oracle
    ok(*asked, "--overwrite", "--call-cache", tmp_path / "new.sqlite")
    header, _ = container.read_jsonl(tmp_path / "meta.jsonl")
    assert header.config["summary"]["choice"]["accuracy"] == 1


def test_unanswered_questions_are_counted_and_no_wrong_answers(tmp_path: Path, stub: Stub) -> None:
    save_parent_and_meta(tmp_path)
    described(tmp_path)
    stub.answer = lambda body: "?" if "Which latent" in prompt_of(body) else overlap(body)
    asked = (*meta_command(tmp_path), "--backend", "openai", "--model", "m")
    refused(run(*asked), 1, "too many answers are missing")
    header, _ = container.read_jsonl(tmp_path / "meta.jsonl")
    choice = header.config["summary"]["choice"]
    assert (choice["n"], choice["n_missing"], choice["accuracy"]) == (0, 60, None)


def test_a_service_that_fails_while_labels_are_made_is_one_line(tmp_path: Path, stub: Stub) -> None:
    save_parent_and_meta(tmp_path)
    described(tmp_path)
    stub.script = [Fault(body=b"garbage")] * 1000
    words = [str(a) for a in (*meta_command(tmp_path), "--backend", "openai", "--model", "m", "--max-retries", "0")]
    command = [sys.executable, "-m", "saetool", "autointerp", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "5 calls failed one after the other" in done.stderr
    assert "never retrieved" not in done.stderr and "Traceback" not in done.stderr


# --- options that cannot work ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--backend", "openai"), "needs a model"),
        (("--backend", "grok", "--model", "m"), "--backend grok"),
        (("--explainer", "llm"), "needs a language model"),
        (("--explainer", "magic"), "--explainer magic"),
        (("--scorer", "simulate,magic"), "--scorer magic"),
        (("--scorer", "intruder"), "cannot judge it"),
        (("--scorer", "choice"), "for meta-SAEs"),
        (("--simulate", "guess"), "--simulate guess"),
        (("--negatives", "hard"), "--negatives hard"),
        (("--granularity", "word"), "--granularity word"),
        (("--control", "all"), "--control all"),
        (("--max-missing", "2"), "--max-missing 2"),
        (("--skip-positions", "-1"), "--skip-positions -1"),
        (("--extra-body", "{"), "--extra-body: not JSON"),
        (("--extra-body", "[]"), "a JSON object was expected"),
        (("--max-cost", "1"), "needs prices"),
        (("--concurrency", "0"), "--concurrency 0"),
        (("--timeout", "nan"), "--timeout nan"),
        (("--rpm", "inf"), "--rpm inf"),
        (("--price-in", "nan"), "--price-in nan"),
        (("--temperature", "nan"), "--temperature nan"),
        (("--temperature", "inf"), "--temperature inf"),
        (("--seed", "-1"), "--seed -1"),
        (("--candidates", "3"), "--candidates 3"),
        (("--export", "csv"), "--export csv"),
        (("--export", "neuronpedia", "-o", "-"), "standard output"),
        (("--tokenizer", "gpt2"), "--tokenizer"),
        (("--backend", "openai", "--model", "m", "--base-url", "nowhere"), "no http(s) address"),
    ],
)
def test_model_options_that_cannot_work_are_usage_errors(here: Path, options: tuple[str, ...], words: str) -> None:
    files = (here / "sae.st", "--acts", here / "acts", "-o", here / "x.jsonl")
    refused(run(*files, *options), 2, words)
    assert not list(here.glob("x.*"))


def test_a_local_model_runs_the_whole_path(here: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A random model writes no JSON: its descriptions are given, its predictions are read from probabilities.
    lines = [{"latent": j, "description": f"the word w{j}"} for j in (0, 1)]
    (here / "mine.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    monkeypatch.setattr(local.LocalClient, "__init__", _longer(local.LocalClient.__init__))
    files = (here / "sae.st", "--acts", here / "acts", *FAST, "-o", here / "out.jsonl", "--score-random", "3")
    options = ("--backend", "local", "--model", tiny_llama_dir, "--explanations", here / "mine.jsonl")
    ok(*files, *options, "--scorer", "simulate,detect,fuzz,intruder")
    config, records, windows = results(here)
    assert config["backend"]["kind"] == "local"
    assert config["backend"]["host"] is None
    valid = windows["pred_valid"] == 1
    assert ((windows["pred"][valid] >= 0) & (windows["pred"][valid] <= 10)).all()
    assert windows["pred"][valid].std() > 0
    assert all(r["status"] == "scored" for r in records.values())
    before = (here / "out.jsonl").read_bytes()
    ok(*files, *options, "--scorer", "simulate,detect,fuzz,intruder", "--overwrite", "--call-cache", here / "n.sqlite")
    assert (here / "out.jsonl").read_bytes() == before


def _longer(init: Callable[..., None]) -> Callable[..., None]:
    """Lets the tiny model read more than it says it can (its positions are computed, not learned)."""

    def longer(self: local.LocalClient, *args: object) -> None:
        init(self, *args)
        self._longest = 1 << 20

    return longer
