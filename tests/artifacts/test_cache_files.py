"""Caches of the first schema are read as they were, and a safetensors file is the one that safetensors writes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import sparse_data
from safetensors.torch import save

from saetool.artifacts import container, writing
from saetool.artifacts import header as h
from saetool.artifacts.cache import HELDOUT, TRAIN, open_cache
from saetool.engines.reader import Reader
from saetool.errors import ArtifactError

OLD = Path(__file__).parents[1] / "golden" / "cache-1"


def test_a_cache_of_schema_1_is_read_with_what_it_lacked_computed() -> None:
    cache = open_cache(OLD)
    assert json.loads((OLD / "manifest.json").read_text())["saetool"]["schema"] == "saetool/cache@1"
    assert (cache.header.schema, cache.storage, cache.has_tokens) == (h.CACHE, "float32", True)
    acts = sparse_data(48, d=4)
    held = torch.arange(48) // 4 % 5 == 4
    for split, mine in ((TRAIN, ~held), (HELDOUT, held)):
        torch.testing.assert_close(torch.cat([part["acts"] for part in cache.iter_split(split)]), acts[mine])
    moments = cache.moments()
    torch.testing.assert_close(moments["mean"], acts[~held].double().mean(0))
    assert (moments["geometric_median"] - moments["mean"]).norm() < acts.std()
    assert Reader(cache, TRAIN).batch(0, 8).shape == (8, 4)
    assert [problem for _, problem in cache.verify()] == [None] * len(cache.shards)
    assert cache.profile == {}


def test_a_storage_that_is_not_known_asks_for_an_update(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path / "acts")
    manifest = tmp_path / "acts" / "manifest.json"
    data = json.loads(manifest.read_text())
    data["saetool"]["config"]["storage"] = "int4"
    manifest.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="stored as int4"):
        open_cache(tmp_path / "acts")


def test_a_sample_is_evenly_spaced_rows() -> None:
    cache = open_cache(OLD)
    rows = torch.cat([part["acts"] for part in cache.iter_split(TRAIN)])
    assert torch.equal(cache.sample(TRAIN, 1000), rows)
    assert torch.equal(cache.sample(TRAIN, 4), rows[[5, 15, 25, 35]])


def test_tensor_files_are_byte_for_byte_those_of_safetensors(tmp_path: Path) -> None:
    types = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16]
    types += [torch.int8, torch.uint8, torch.bool]
    tensors = {f"t{7 * i % 10}": torch.arange(5 + i).to(dtype) for i, dtype in enumerate(types)}
    tensors |= {
        "empty": torch.zeros(0, 4),
        "number": torch.tensor(3.0),
        "turned": torch.randn(3, 4).T,
        "ä": torch.ones(2),
    }
    header = h.Plan("train", h.SAE, {"name": 'ä "quoted"'}).header()
    writing.write_tensors(tmp_path / "x.st", tensors, header)
    plain = {name: t.contiguous() for name, t in tensors.items()}
    assert (tmp_path / "x.st").read_bytes() == save(plain, {container.METADATA_KEY: h.canonical(header.to_json())})
    loaded = container.read_tensors(tmp_path / "x.st", h.SAE)
    assert all(torch.equal(loaded.tensors[name], t) for name, t in tensors.items())
    assert loaded.sha256 == h.sha256_file(tmp_path / "x.st")
