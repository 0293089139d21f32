"""Files: atomic, strict, deterministic."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from conftest import random_sae, save_sae
from safetensors.torch import save_file

from saetool.artifacts import container, writing
from saetool.artifacts import header as h
from saetool.artifacts import sae as sae_files
from saetool.errors import ArtifactError

PLAN = h.Plan("train", h.SAE, {"k": 3, "lr": 0.5})


def test_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    a, b = save_sae(tmp_path / "a.st", random_sae()), tmp_path / "b.st"
    loaded = sae_files.load(a)
    sae_files.save(b, loaded.sae, loaded.header)
    assert a.read_bytes() == b.read_bytes()


def test_a_round_trip_keeps_every_tensor_and_the_header(tmp_path: Path) -> None:
    sae = random_sae()
    loaded = sae_files.load(save_sae(tmp_path / "a.st", sae))
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
        assert torch.equal(getattr(loaded.sae, name), getattr(sae, name))
    assert loaded.header.history[-1]["verb"] == "train"
    assert loaded.sha256 == h.sha256_file(tmp_path / "a.st")


def test_there_is_one_metadata_key_with_canonical_json(tmp_path: Path) -> None:
    raw = save_sae(tmp_path / "a.st", random_sae()).read_bytes()
    table = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert set(table["__metadata__"]) == {"saetool"}
    text = table["__metadata__"]["saetool"]
    assert text == h.canonical(json.loads(text))


def test_the_mode_follows_the_umask_and_an_existing_file_keeps_its_own(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        writing.write_bytes(tmp_path / "new", b"1")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    os.chmod(tmp_path / "new", 0o604)
    writing.write_bytes(tmp_path / "new", b"2")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o604


def test_a_symlink_survives_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    writing.write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_a_fifo_and_a_folder_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for target in (tmp_path / "fifo", tmp_path):
        with pytest.raises(ArtifactError):
            writing.write_bytes(target, b"x")
    with pytest.raises(ArtifactError, match="does not exist"):
        writing.write_bytes(tmp_path / "no" / "file", b"x")
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)


def test_a_failure_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError), writing.atomic_file(target) as file:
        file.write(b"half")
        raise RuntimeError
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_list_of_numbers_is_one_line_of_json(tmp_path: Path) -> None:
    payload = {
        "a": [1, 2.5, -3e-7, float("nan")],
        "b": [[1, 2], [3, 4]],
        "c": ["[\n1,\n2\n]", "x"],
        "d": [],
        "e": [[1, [2]]],
    }
    writing.write_json(tmp_path / "x.json", PLAN.header(), payload)
    text = (tmp_path / "x.json").read_text()
    assert '"a": [1, 2.5, -3e-07, null],' in text and "\n    [1, 2],\n" in text
    assert container.read_json(tmp_path / "x.json")[1] == {**payload, "a": [1, 2.5, -3e-7, None]}


def test_json_has_no_nan(tmp_path: Path) -> None:
    writing.write_json(tmp_path / "x.json", PLAN.header(), {"value": float("nan"), "list": [float("inf"), 1.0]})
    _, payload = container.read_json(tmp_path / "x.json")
    assert payload == {"value": None, "list": [None, 1.0]}


def test_a_line_separator_in_a_record_is_text_not_a_new_line(tmp_path: Path) -> None:
    record = {"description": "a\u2028b\x85c"}
    writing.write_jsonl(tmp_path / "x.jsonl", PLAN.header(), [record])
    assert container.read_jsonl(tmp_path / "x.jsonl")[1] == [record]


@pytest.mark.parametrize("keep", [4, 20, -1])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    path = save_sae(tmp_path / "a.st", random_sae())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"a\.st: (cut off|not a safetensors)"):
        sae_files.load(path)


@pytest.mark.parametrize("out", ["x.st", "-"])
def test_a_tensor_in_parts_is_written_as_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes], out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    values = torch.arange(60, dtype=torch.float32).reshape(10, 3, 2)
    flags = torch.arange(10) % 2 == 0
    edges = [(0, 4), (4, 4), (4, 10)]

    def stacked(whole: torch.Tensor, dtype: str, end: int = 10) -> writing.Stacked:
        parts = lambda: (whole.numpy()[a : min(b, end)].astype("float64") for a, b in edges)  # noqa: E731
        return writing.Stacked(dtype, tuple(whole.shape), parts)

    writing.write_tensors(Path("whole.st"), {"v": values, "f": flags.to(torch.uint8)}, PLAN.header())
    writing.write_tensors(Path(out), {"v": stacked(values, "float32"), "f": stacked(flags, "uint8")}, PLAN.header())
    written = capfdbinary.readouterr().out if out == "-" else Path(out).read_bytes()
    assert written == Path("whole.st").read_bytes()
    with pytest.raises(AssertionError):
        writing.write_tensors(Path("short.st"), {"v": stacked(values, "float32", end=9)}, PLAN.header())
    assert not Path("short.st").exists()


def test_foreign_safetensors_are_named(tmp_path: Path) -> None:
    save_file({"encoder.weight": torch.zeros(2, 2)}, tmp_path / "foreign.st")
    with pytest.raises(ArtifactError, match=r"without a saetool header .tensors: encoder.weight"):
        sae_files.load(tmp_path / "foreign.st")


def test_a_wrong_kind_a_missing_tensor_and_a_newer_schema_are_named(tmp_path: Path) -> None:
    other = tmp_path / "x.st"
    writing.write_tensors(other, {"a": torch.zeros(1)}, h.Plan("cache", h.SHARD, {}).header())
    with pytest.raises(ArtifactError, match=r"is one shard of an activation cache .* where an SAE was expected"):
        sae_files.load(other)
    writing.write_tensors(other, {"W_enc": torch.zeros(2, 3)}, PLAN.header())
    with pytest.raises(ArtifactError, match="lacks the tensor b_enc, W_dec, b_dec"):
        sae_files.load(other)
    writing.write_tensors(other, {}, h.Plan("train", "saetool/sae@99", {}).header())
    with pytest.raises(ArtifactError, match="sae@99"):
        sae_files.load(other)


def test_a_mis_shaped_or_nan_tensor_is_named(tmp_path: Path) -> None:
    sae = random_sae()
    sae.b_enc[0] = float("nan")
    with pytest.raises(ArtifactError, match="b_enc holds NaN"):
        sae_files.load(save_sae(tmp_path / "a.st", sae))
    tensors = {"W_enc": torch.zeros(2, 3), "b_enc": torch.zeros(4), "W_dec": torch.zeros(3, 2), "b_dec": torch.zeros(2)}
    writing.write_tensors(tmp_path / "b.st", tensors, PLAN.header(config={"arch": "relu"}))
    with pytest.raises(ArtifactError, match=r"b_enc has shape \(4,\), \(3,\) expected"):
        sae_files.load(tmp_path / "b.st")


def test_unknown_header_fields_are_kept(tmp_path: Path) -> None:
    header = h.parse({**PLAN.header().to_json(), "license": "CC0"}, "x")
    assert header.to_json()["license"] == "CC0"


def test_the_key_depends_on_options_inputs_and_verb_and_on_nothing_else() -> None:
    source = h.Input("acts", "a", "1" * 64, h.CACHE)
    base = h.Plan("train", h.SAE, {"k": 3}, [source])
    assert base.key == h.Plan("train", h.SAE, {"k": 3}, [h.Input("acts", "b", "1" * 64, h.CACHE)]).key
    others = [
        h.Plan("train", h.SAE, {"k": 4}, [source]),
        h.Plan("meta", h.SAE, {"k": 3}, [source]),
        h.Plan("train", h.SAE, {"k": 3}, [h.Input("acts", "a", "2" * 64, h.CACHE)]),
        h.Plan("train", h.CHECKPOINT, {"k": 3}, [source]),
    ]
    assert len({base.key, *(o.key for o in others)}) == 5


def test_history_is_carried_from_file_to_file() -> None:
    first = h.Plan("cache", h.CACHE, {}).header()
    second = h.Plan("train", h.SAE, {}, (), [first]).header()
    third = h.Plan("stitch", h.STITCH, {}, (), [second, second, first]).header()
    assert [e["verb"] for e in third.history] == ["cache", "train", "stitch"]


def test_existing_outputs_follow_the_key_rule(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert not writing.up_to_date(path, PLAN, overwrite=False)
    writing.write_json(path, PLAN.header(), {})
    os.utime(path, (1, 1))
    assert writing.up_to_date(path, PLAN, overwrite=False)
    assert path.stat().st_mtime > 1e9, "make needs a new time"
    other = h.Plan("train", h.SAE, {"k": 4, "lr": 0.5})
    with pytest.raises(ArtifactError, match="k 3 there, 4 here"):
        writing.up_to_date(path, other, overwrite=False)
    assert not writing.up_to_date(path, other, overwrite=True)
    path.write_text("something of the user's")
    with pytest.raises(ArtifactError, match="will not be replaced"):
        writing.up_to_date(path, PLAN, overwrite=False)
