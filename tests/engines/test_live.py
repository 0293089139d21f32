"""The live source: the rows of a cache without the cache, each once an epoch, in an order that is a pure function."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_documents

from saetool.artifacts.cache import TRAIN, Cache, open_cache
from saetool.artifacts.cache_writer import CacheWriter
from saetool.engines import cache as engine
from saetool.engines import cache_request
from saetool.engines.live import LiveReader
from saetool.engines.model import find_model, load, load_config, load_tokenizer
from saetool.engines.sites import find_site
from saetool.engines.text import Texts

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def setting(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., tuple[Callable[..., LiveReader], Cache]]:
    """For some options: how to make a live reader, and the cache of the same."""

    def build(**options: Any) -> tuple[Callable[..., LiveReader], Cache]:
        given = {"ctx_len": 16, "bos": True, "keep_special": False, "heldout": 0.2, "dtype": "float32"}
        request = cache_request.Request(**{**given, "storage": "float32", "tokens": None, **options})
        source = find_model(str(tiny_model_dir))
        texts = Texts("tests", lambda: iter(tiny_documents()))
        config, tokenizer = load_config(source), load_tokenizer(source)
        lm = load(source, config, tokenizer, device="cpu", dtype=request.dtype)
        site = find_site(lm.model, HOOK)
        prepared = cache_request.prepare(request, source, texts, [HOOK])
        writer = CacheWriter(tmp_path / "acts", request.plan(HOOK, source, texts.as_input()), storage=request.storage)
        job = engine.Job(HOOK, site, writer, per_shard=16)
        (job.limit,) = engine.norm_limits(lm, prepared, [job], 10_000)  # of the whole split, as in the live reader
        for _ in engine.write(lm, prepared, [job], 4):
            pass
        counts = prepared.counts()
        splits = {name: {**c, "rows": writer.rows(name)} for name, c in counts.items()}
        plan = writer.plan
        writer.finish(plan.header(config=prepared.manifest(HOOK, 64), dtype="float32"), splits, ["x"] * 400)
        return lambda **more: LiveReader(lm, site, prepared, **more), open_cache(tmp_path / "acts")

    return build


def cached(cache: Cache) -> dict[tuple[int, int], torch.Tensor]:
    rows = torch.cat([part["acts"].float() for part in cache.iter_split(TRAIN)])
    places = zip(
        cache.row_tensor(TRAIN, "contexts").tolist(), cache.row_tensor(TRAIN, "positions").tolist(), strict=True
    )
    return dict(zip(places, rows, strict=True))


def epoch(reader: LiveReader, number: int) -> list[tuple[tuple[int, int], torch.Tensor]]:
    """Place and row, in the order of visit."""
    n = reader.n_rows
    start, size = number * n, 50
    rows = torch.cat([reader.batch(step, size) for step in range(start // size, -(-(start + n) // size))])
    places = torch.cat([reader.places(step, size) for step in range(start // size, -(-(start + n) // size))])
    first = start % size
    return [((c, p), row) for (c, p), row in zip(places.tolist(), rows, strict=True)][first : first + n]


@pytest.mark.parametrize(
    "options",
    [{}, {"keep_special": True}, {"bos": False}, {"center": True}, {"storage": "bfloat16"}, {"storage": "int8"}],
    ids=str,
)
def test_each_epoch_is_the_caches_train_rows_once(setting: Callable, options: dict[str, Any]) -> None:
    make, cache = setting(**options)
    reader, expected = make(seed=1, block_contexts=20), cached(cache)
    assert (reader.n_rows, reader.d_in) == (cache.rows(TRAIN), cache.d_in)
    orders = []
    for number in range(2):
        visited = epoch(reader, number)
        assert sorted(place for place, _ in visited) == sorted(expected)
        step = 2 / 127 if options.get("storage") == "int8" else 2e-2 if options.get("storage") else 0
        for place, row in visited:  # batches are of other contexts, so the last bits may differ
            room = 1e-4 + step * float(expected[place].abs().max())
            torch.testing.assert_close(row, expected[place], rtol=0, atol=room)
        orders.append([place for place, _ in visited])
    assert orders[0] != orders[1]


def test_any_step_can_be_asked_for_first(setting: Callable) -> None:
    make, _ = setting()
    one, other = make(seed=3, block_contexts=16), make(seed=3, block_contexts=16)
    batches = [one.batch(step, 70) for step in range(30)]
    for step in (29, 3, 17):
        assert torch.equal(other.batch(step, 70), batches[step])
    assert not torch.equal(make(seed=4, block_contexts=16).batch(0, 70), batches[0])


def test_a_resumed_run_computes_one_block_only(setting: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    make, _ = setting()
    reader = make(block_contexts=16, batch_tokens=16 * 16)
    calls = []
    read = engine.read_batch
    monkeypatch.setattr("saetool.engines.live.read_batch", lambda *a, **k: calls.append(len(a[4])) or read(*a, **k))
    reader._held = None
    reader.batch(9, 70)
    assert sum(calls) in (16, 32)  # a batch may lie over two


def test_rows_above_the_norm_limit_are_left_out_and_their_places_taken(setting: Callable) -> None:
    make, cache = setting(max_norm=1.1)
    reader, expected = make(block_contexts=20), cached(cache)
    visited = epoch(reader, 0)
    assert 0 < len(expected) < reader.n_rows == len(visited)
    assert cache_limit(cache) <= reader.limit * 1.0001
    places = [place for place, _ in visited]
    assert set(places) == set(expected)
    assert all(float(row.norm()) <= reader.limit * 1.0001 for _, row in visited)


def cache_limit(cache: Cache) -> float:
    """The largest norm is just below the limit; the limit itself is only bounded by it."""
    return float(torch.stack(list(cached(cache).values())).norm(dim=1).max())


def test_statistics_of_a_small_text_are_exact_and_scale_does_not_change_them(setting: Callable) -> None:
    make, cache = setting()
    found = make(scale=5.0).statistics
    torch.testing.assert_close(found.mean, cache.moments()["mean"], rtol=1e-4, atol=1e-4)
    assert found.mean_sq_norm == pytest.approx(cache.statistics["mean_sq_norm"], rel=1e-4)
    torch.testing.assert_close(found.geometric_median, cache.moments()["geometric_median"], rtol=1e-2, atol=1e-2)
    assert torch.equal(make(scale=5.0).batch(0, 10), make().batch(0, 10) * 5)


def test_neighbouring_rows_come_from_different_contexts(setting: Callable) -> None:
    make, _ = setting()
    places = make(block_contexts=40).places(0, 400)
    assert (places[1:, 0] == places[:-1, 0]).double().mean() < 0.1
