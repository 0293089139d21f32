"""The program as a whole: streams, exit codes, start-up, existing outputs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import random_sae, save_sae, write_cache
from typer.testing import CliRunner

from saetool.artifacts import header as h
from saetool.artifacts import writing
from saetool.cli import app
from saetool.commands import VERBS

runner = CliRunner()
TRAIN = ["train", "acts", "--k", "3", "--latents", "24", "--tokens", "2000", "--batch-size", "64", "--device", "cpu"]


def saetool(*args: str, cwd: Path, **kwargs: object) -> subprocess.CompletedProcess[str]:
    """The real program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "saetool", *args], cwd=cwd, capture_output=True, text=True, timeout=120, **kwargs
    )


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom saetool.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        f"for v in {list(VERBS)!r}: assert CliRunner().invoke(app, [v, '--help']).exit_code == 0, v\n"
        "bad = {'torch', 'transformers', 'scipy', 'numpy', 'datasets', 'jinja2', 'httpx2'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_has_help_with_an_example_and_the_common_options(verb: str) -> None:
    result = runner.invoke(app, [verb, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert f"Example: saetool {verb}" in " ".join(result.stdout.split())
    common = {"--debug"} if verb == "inspect" else {"--debug", "--quiet", "--json", "--dry-run", "--overwrite", "--out"}
    assert all(option in result.stdout for option in common)


def test_version_and_no_arguments() -> None:
    from saetool import __version__

    assert runner.invoke(app, ["--version"]).stdout == f"saetool {__version__}\n"
    assert "Commands" in runner.invoke(app, []).output


def test_usage_errors_exit_with_2(tmp_path: Path) -> None:
    assert runner.invoke(app, ["train", "--no-such-option"]).exit_code == 2
    assert runner.invoke(app, ["no-such-verb"]).exit_code == 2


def test_train_as_typed_without_a_cache_says_how_to_make_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, ["train", "--arch", "batchtopk", "--k", "32"])
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "saetool train: acts: no such cache",
        "hint: caches are made by: saetool cache -o acts",
    ]
    assert result.stdout == ""


def test_data_goes_to_stdout_and_words_to_stderr(tmp_path: Path) -> None:
    write_cache(tmp_path / "acts")
    done = saetool(*TRAIN, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "sae.st\n")
    assert "training 1 SAE" in done.stderr
    again = saetool(*TRAIN, cwd=tmp_path)
    assert (again.returncode, again.stdout) == (0, "sae.st\n")
    assert "up to date" in again.stderr
    record = json.loads(saetool(*TRAIN, "--json", "--quiet", cwd=tmp_path).stdout)
    assert set(record) == {"kind", "path", "sha256", "key", "metrics"}
    quiet = saetool(*TRAIN, "--quiet", cwd=tmp_path)
    assert quiet.stderr == ""


def test_another_request_is_refused_until_overwrite(tmp_path: Path) -> None:
    write_cache(tmp_path / "acts")
    assert saetool(*TRAIN, cwd=tmp_path).returncode == 0
    before = (tmp_path / "sae.st").read_bytes()
    refused = saetool(*TRAIN, "--lr", "0.01", cwd=tmp_path)
    assert refused.returncode == 1
    assert refused.stderr.startswith("saetool train: sae.st: exists and is not what was asked for (lr ")
    assert (tmp_path / "sae.st").read_bytes() == before
    assert saetool(*TRAIN, "--lr", "0.01", "--overwrite", cwd=tmp_path).returncode == 0
    assert (tmp_path / "sae.st").read_bytes() != before


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("what", [("inspect", "a.st"), ("stitch", "a.st", "a.st"), ("train", "--help"), ("--version",)])
def test_standard_output_is_whole_or_the_command_fails(tmp_path: Path, what: tuple[str, ...], unbuffered: str) -> None:
    """A reader that left, a full disk, a closed one; unbuffered, Python itself writes what fits and says nothing."""
    save_sae(tmp_path / "a.st", random_sae())
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "saetool", *what]
    read, write = os.pipe()
    os.close(read)
    gone = subprocess.run(command, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, env=environment)
    os.close(write)
    assert gone.returncode == 141
    assert b"Traceback" not in gone.stderr and b"cannot be written" not in gone.stderr
    for out in ("> /dev/full", ">&-"):
        shell = ["bash", "-c", f'exec "$@" {out}', "-", *command]
        failed = subprocess.run(shell, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment)
        assert failed.returncode == 1
        assert "standard output: cannot be written (" in failed.stderr and "Traceback" not in failed.stderr


def test_all_of_a_long_record_goes_through_a_pipe_that_is_read_slowly(tmp_path: Path) -> None:
    save_sae(tmp_path / "a.st", random_sae(2000))
    command = [sys.executable, "-m", "saetool", "stitch", "a.st", "a.st", "--theta", "0.7", "--no-match", "--quiet"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        time.sleep(0.2)
        record = json.loads(first + process.stdout.read())
    assert process.returncode == 0
    assert len(json.dumps(record)) > 2**17, "more than a pipe holds"


def test_debug_shows_the_traceback_and_its_absence_does_not(tmp_path: Path) -> None:
    plain = saetool("inspect", "missing.st", cwd=tmp_path)
    assert (plain.returncode, plain.stderr) == (1, "saetool inspect: missing.st: no such file\n")
    assert "Traceback" in saetool("inspect", "missing.st", "--debug", cwd=tmp_path).stderr


def test_inspect_shows_header_history_and_shapes_of_each_kind(tmp_path: Path) -> None:
    save_sae(tmp_path / "a.st", random_sae())
    write_cache(tmp_path / "acts")
    text = runner.invoke(app, ["inspect", str(tmp_path / "a.st")]).stdout
    assert "an SAE (saetool/sae@1" in text
    assert "tensor   W_enc F32 [16, 24]" in text
    assert "history  1. train" in text
    assert "an activation cache" in runner.invoke(app, ["inspect", str(tmp_path / "acts")]).stdout
    record = json.loads(runner.invoke(app, ["inspect", str(tmp_path / "a.st"), "--json"]).stdout)
    assert record["tensors"]["W_dec"] == ["F32", [24, 16]]


def test_inspect_says_of_what_is_piped_in_what_it_says_of_the_file(tmp_path: Path) -> None:
    save_sae(tmp_path / "a.st", random_sae())
    save_sae(tmp_path / "b.st", random_sae(seed=1))
    record = runner.invoke(app, ["stitch", str(tmp_path / "a.st"), str(tmp_path / "b.st"), "--theta", "0.7"]).stdout
    (tmp_path / "s.json").write_text(record)
    plan = h.Plan("autointerp", h.EXPLANATIONS, {})
    writing.write_jsonl(tmp_path / "e.jsonl", plan.header(config={}), [{"latent": 1}])
    for name in ("a.st", "s.json", "e.jsonl"):
        piped = runner.invoke(app, ["inspect", "-"], input=(tmp_path / name).read_bytes())
        shown = runner.invoke(app, ["inspect", str(tmp_path / name)])
        assert piped.exit_code == 0, piped.stderr
        assert piped.stdout == shown.stdout.replace(str(tmp_path / name), "standard input")
    for data, said in ((b"{}", "without a saetool header"), (b"\xff\xfe", "not a text file"), (b"", "not JSON")):
        refused = runner.invoke(app, ["inspect", "-"], input=data)
        assert refused.exit_code == 1
        assert refused.stderr.startswith("saetool inspect: standard input: ") and said in refused.stderr


def test_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cache(tmp_path / "acts")
    save_sae(tmp_path / "a.st", random_sae())
    monkeypatch.chdir(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    for args in (TRAIN, ["eval", "a.st"], ["meta", "a.st", "--latents", "4"]):
        result = runner.invoke(app, [*args, "--dry-run"])
        assert result.exit_code == 0, result.output
        assert result.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_option_defaults_are_the_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts are strings on the command line (8M): they must say what the dataclass says."""
    import inspect

    from saetool import config
    from saetool.options import parse_count

    classes = {
        "cache": config.CacheConfig,
        "train": config.TrainConfig,
        "threshold": config.ThresholdConfig,
        "eval": config.EvalConfig,
        "stitch": config.StitchConfig,
        "meta": config.MetaConfig,
        "autointerp": config.AutointerpConfig,
        "report": config.ReportConfig,
    }
    compared = 0
    for verb, cls in classes.items():
        for name, parameter in inspect.signature(VERBS[verb]).parameters.items():
            if name in cls.__dataclass_fields__ and name != "out":
                wanted, given = getattr(cls, name), parameter.default
                if given is None or verb == "cache":
                    continue  # derived, or decided by what else is given
                if isinstance(given, str) and isinstance(wanted, int):
                    given = parse_count(given, name)
                assert str(given) == str(wanted), (verb, name)
                compared += 1
    assert compared > 40
