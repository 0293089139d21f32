"""Other people's files as weapons: each is refused with one line, nothing is run, nothing large is allocated."""

import io
import json
import os
import pickle
import resource
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from typer.testing import CliRunner

from saetool.artifacts import sae as sae_files
from saetool.artifacts.foreign import files
from saetool.cli import app
from saetool.errors import ArtifactError, ConfigError

D, F = 6, 10


def weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    w_dec = torch.nn.functional.normalize(torch.randn(F, D, generator=g), dim=1)
    tensors = {"W_enc": w_dec.T.contiguous(), "b_enc": torch.zeros(F), "W_dec": w_dec, "b_dec": torch.zeros(D)}
    return {name: t.to(dtype) for name, t in tensors.items()}


def saelens(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: object) -> Path:
    folder.mkdir(parents=True)
    said = {"architecture": "standard", "d_in": D, "d_sae": F, "apply_b_dec_to_input": True,
            "metadata": {"hook_name": "blocks.0.hook_resid_post"}, **config}  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(said))
    save_file(weights() if tensors is None else tensors, folder / "sae_weights.safetensors")
    return folder


def gemma(folder: Path, **arrays: object) -> Path:
    folder.mkdir(parents=True)
    plain = {name: t.numpy() for name, t in weights().items()} | {"threshold": np.full(F, 0.1, np.float32)}
    np.savez(folder / "params.npz", **{**plain, **arrays})
    return folder


def refused(path: Path, *words: str) -> ArtifactError | ConfigError:
    with pytest.raises((ArtifactError, ConfigError)) as caught:
        sae_files.load(path)
    assert "\n" not in caught.value.message
    for word in words:
        assert word in caught.value.message, caught.value.message
    return caught.value


class Bomb:
    """Unpickles to a call that leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return os.system, (f"touch {self.mark}",)


def test_a_pickle_with_code_is_refused_and_nothing_of_it_runs(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for name, content in (("zip.pt", {"W_enc": Bomb(mark)}), ("odd.pt", Bomb(mark))):
        torch.save(content, tmp_path / name)
        refused(tmp_path / name, "code", "nothing of it was run")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"W_enc": Bomb(mark)}))
    refused(tmp_path / "bare.pt", "zip format")
    assert not mark.exists()
    pickle.loads((tmp_path / "bare.pt").read_bytes())  # the control: read the usual way it does run
    assert mark.exists()


def test_the_command_says_so_in_one_line_with_exit_code_1(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({"W_enc": Bomb(mark)}, tmp_path / "sae.pt")
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "sae.pt"), "-o", str(tmp_path / "out.st")])
    assert result.exit_code == 1 and not mark.exists() and not (tmp_path / "out.st").exists()
    assert [line for line in result.stderr.splitlines() if not line.startswith("hint:")] == [
        f"saetool convert: {tmp_path / 'sae.pt'}: needs code to be run, and only tensors and plain values are read; "
        "nothing of it was run"
    ]


def test_pickled_objects_in_an_npz_are_refused_unread(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    folder = gemma(tmp_path / "g", W_enc=np.array([Bomb(mark)], dtype=object))
    refused(folder, "pickled objects", "nothing of it was run")
    assert not mark.exists()


def test_zip_bombs_are_refused_before_they_unpack(tmp_path: Path) -> None:
    zeros = io.BytesIO()
    np.save(zeros, np.zeros((4_000, 4_000), np.float32))  # 64 MB of zeros, 64 kB packed
    (tmp_path / "g").mkdir()
    with zipfile.ZipFile(tmp_path / "g" / "params.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", zeros.getvalue())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(tmp_path / "g", "unpacks to")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32_000  # kB
    torch.save(weights(), tmp_path / "honest.pt")
    with (
        zipfile.ZipFile(tmp_path / "honest.pt") as honest,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in honest.infolist():
            packed.writestr(entry.filename, honest.read(entry))
    refused(tmp_path / "packed.pt", "compressed entries")


def lying_zip(path: Path, claimed: int) -> None:
    """A PyTorch file whose central directory claims ``claimed`` bytes for every storage."""
    torch.save(weights(), path)
    data = bytearray(path.read_bytes())
    at = data.find(b"PK\x01\x02")
    while at >= 0:
        name = data[at + 46 : at + 46 + struct.unpack_from("<H", data, at + 28)[0]]
        if b"/data/" in name:
            struct.pack_into("<II", data, at + 20, claimed, claimed)
        at = data.find(b"PK\x01\x02", at + 4)
    path.write_bytes(bytes(data))


def test_sizes_that_the_file_cannot_hold_are_refused(tmp_path: Path) -> None:
    lying_zip(tmp_path / "a.pt", 3_000_000_000)
    refused(tmp_path / "a.pt", "claim")
    wide = torch.zeros(1).expand(100_000, 100_000)  # 40 GB by its shape, 4 bytes by its storage
    torch.save({**weights(), "W_enc": wide}, tmp_path / "b.pt")
    refused(tmp_path / "b.pt", "claim", "bytes in a file of")
    header = {"W_enc": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 16]}}
    text = json.dumps(header).encode()
    saelens(tmp_path / "s")
    (tmp_path / "s" / "sae_weights.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    refused(tmp_path / "s", "declared as", "16 bytes")
    (tmp_path / "s" / "sae_weights.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{")
    refused(tmp_path / "s", "not a safetensors file")
    (tmp_path / "n").mkdir()
    with zipfile.ZipFile(tmp_path / "n" / "params.npz", "w") as archive:
        out = io.BytesIO()
        np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": (10**9, 10**6)})
        archive.writestr("W_enc.npy", out.getvalue() + bytes(8))
    refused(tmp_path / "n", "declared as")


def test_wrong_types_are_named(tmp_path: Path) -> None:
    whole = {**weights(), "W_enc": weights()["W_enc"].to(torch.int64)}
    refused(saelens(tmp_path / "a", whole), "W_enc is I64")
    refused(saelens(tmp_path / "b", {**weights(), "b_enc": torch.zeros(F, dtype=torch.int32)}), "b_enc is int32")
    torch.save({**weights(), "W_dec": weights()["W_dec"].to(torch.complex64)}, tmp_path / "c.pt")
    refused(tmp_path / "c.pt", "W_dec is complex64")
    refused(gemma(tmp_path / "d", W_dec=np.array(["text"] * 3)), "floating point was expected")
    torch.save([1, 2, 3], tmp_path / "e.pt")
    refused(tmp_path / "e.pt", "holds a list")
    torch.save({**weights(), "W_dec": torch.zeros(F, D).to_sparse()}, tmp_path / "f.pt")
    refused(tmp_path / "f.pt", "sparse tensors")


def test_half_types_are_read(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        folder = saelens(tmp_path / str(dtype), weights(dtype))
        assert sae_files.load(folder).sae.W_enc.dtype == torch.float32


def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    secret = tmp_path / "secret.safetensors"
    save_file(weights(), secret)
    for name in ("../secret.safetensors", str(secret), "a/b.safetensors", "..", "..\\secret.safetensors"):
        folder = tmp_path / f"s{abs(hash(name))}"
        saelens(folder)
        (folder / "sae_weights.safetensors").unlink()
        index = {"weight_map": {"W_enc": name}}
        (folder / "sae_weights.safetensors.index.json").write_text(json.dumps(index))
        refused(folder, "not a file beside it")


def test_an_honest_index_is_read(tmp_path: Path) -> None:
    folder = saelens(tmp_path / "s")
    (folder / "sae_weights.safetensors").unlink()
    table = {}
    for i, (name, tensor) in enumerate(weights().items()):
        save_file({name: tensor}, folder / f"part-{i}.safetensors")
        table[name] = f"part-{i}.safetensors"
    (folder / "sae_weights.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    assert torch.equal(sae_files.load(folder).sae.W_dec, weights()["W_dec"])
    before = sae_files.load(folder).sha256
    save_file({"b_dec": torch.ones(D)}, folder / "part-3.safetensors")
    assert sae_files.load(folder).sha256 != before


def test_names_in_an_npz_lead_nowhere(tmp_path: Path) -> None:
    folder = gemma(tmp_path / "deep" / "g")
    with zipfile.ZipFile(folder / "params.npz", "a") as archive:
        out = io.BytesIO()
        np.save(out, np.zeros(3, np.float32))
        archive.writestr("../../escaped.npy", out.getvalue())
    sae_files.load(folder)
    assert [p.name for p in tmp_path.rglob("*")] == ["deep", "g", "params.npz"]


def test_pipes_and_devices_are_not_opened(tmp_path: Path) -> None:
    folder = saelens(tmp_path / "s")
    (folder / "cfg.json").unlink()
    os.mkfifo(folder / "cfg.json")
    with pytest.raises(ArtifactError):  # a folder without its configuration
        sae_files.load(folder)
    with pytest.raises(ArtifactError, match="not a regular file"):
        files.read_json(folder / "cfg.json")


def test_damaged_files_say_what_is_wrong(tmp_path: Path) -> None:
    folder = saelens(tmp_path / "s")
    for content, word in (
        (b"", "not JSON"), (b"[1]", "no object"), (b"{" * 100_000, "not JSON"), (b"\xff\xfe", "not JSON"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "not JSON"), (b" " * 10_000_001, "too large"),
    ):  # fmt: skip
        (folder / "cfg.json").write_bytes(content)
        refused(folder, word)
    saelens(tmp_path / "cut")
    file = tmp_path / "cut" / "sae_weights.safetensors"
    file.write_bytes(save(weights())[:-7])
    refused(tmp_path / "cut", "cut off")
    torch.save(weights(), tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:900])
    refused(tmp_path / "x.pt", "zip format")
    (tmp_path / "y.npz").write_bytes(b"PK\x03\x04 nothing")
    refused(tmp_path / "y.npz", "not a readable .npz")


def test_unusable_numbers_are_refused(tmp_path: Path) -> None:
    bad = weights()
    bad["W_dec"][3, 2] = float("nan")
    refused(saelens(tmp_path / "nan", bad), "NaN or infinity")
    refused(saelens(tmp_path / "k", architecture="topk", k=F + 1), "k = 11 with 10 latents")
    refused(saelens(tmp_path / "k2", architecture="topk", k="8; rm -rf"), "makes no sense")
    refused(saelens(tmp_path / "arch", architecture=["x"]), "unknown")
    shaped = {**weights(), "W_dec": torch.zeros(F, D, 2)}
    refused(saelens(tmp_path / "shape", shaped), "W_dec has shape (10, 6, 2)")
    missing = {name: t for name, t in weights().items() if name != "W_dec"}
    refused(saelens(tmp_path / "missing", missing), "lacks W_dec")


def test_every_latent_silent_proves_nothing(tmp_path: Path) -> None:
    dead = weights() | {"threshold": torch.full((F,), 1e30)}
    refused(saelens(tmp_path / "dead", dead, architecture="jumprelu"), "no latent fires on the probe")


def test_an_ordered_dict_is_a_state_dict(tmp_path: Path) -> None:
    torch.save(OrderedDict(weights()), tmp_path / "o.pt")
    tensors, values = files.read_torch(tmp_path / "o.pt")
    assert set(tensors) == set(weights()) and values == {}
