"""The reader: every row once an epoch, in an order that depends on seed and step alone, whatever the size."""

from pathlib import Path

import pytest
import torch
from conftest import D, write_cache

from saetool.artifacts import header as h
from saetool.artifacts.cache import TRAIN, Cache, open_cache
from saetool.artifacts.cache_writer import CacheWriter
from saetool.engines import reader as reader_module
from saetool.engines.order import Order
from saetool.engines.reader import Reader, select_rows


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return write_cache(tmp_path / "acts")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks of 32 rows (one document of the tests' cache), eight to a mixing buffer: as a cache beyond memory."""
    monkeypatch.setattr(reader_module, "BLOCK", 32)
    return 32 * 8 * D


def stored(cache: Cache) -> torch.Tensor:
    return torch.cat([part["acts"].float() for part in cache.iter_split(TRAIN)])


def numbers(cache: Cache, batch: torch.Tensor) -> list[int]:
    """Which rows of the split a batch holds (they are all different)."""
    return torch.cdist(batch, stored(cache), compute_mode="donot_use_mm_for_euclid_dist").argmin(1).tolist()


@pytest.mark.parametrize(
    ("n", "block", "mixed"), [(100, 8, 3), (96, 8, 3), (97, 8, 4), (5, 8, 2), (64, 8, 1), (50, 7, None)]
)
def test_each_epoch_is_every_row_once_in_a_new_order(n: int, block: int, mixed: int | None) -> None:
    order = Order(n, seed=3, block=block, n_mixed=mixed)
    stream = torch.cat([order.rows(step, 7) for step in range(-(-3 * n // 7))])[: 3 * n].view(3, n)
    for epoch in stream:
        assert sorted(epoch.tolist()) == list(range(n))
    assert not torch.equal(stream[0], stream[1]) and not torch.equal(stream[1], stream[2])
    other = Order(n, seed=4, block=block, n_mixed=mixed).rows(0, n)
    assert not torch.equal(stream[0], other)


def test_the_stream_does_not_depend_on_how_it_is_cut_or_where_it_begins() -> None:
    whole = Order(1000, seed=1, block=16, n_mixed=4).rows(0, 2500)
    for size in (1, 7, 100, 1250):
        steps = range(2500 // size)
        cut = torch.cat([Order(1000, seed=1, block=16, n_mixed=4).rows(step, size) for step in steps])
        assert torch.equal(cut, whole[: len(cut)])
    backwards = Order(1000, seed=1, block=16, n_mixed=4)
    assert torch.equal(torch.cat([backwards.rows(step, 500) for step in (4, 3, 2, 1, 0)][::-1]), whole)


def test_buffers_mix_no_more_than_they_hold_and_name_their_blocks() -> None:
    order = Order(100, seed=0, block=8, n_mixed=3)
    seen, buffer = [], (0, 0)
    while buffer[0] == 0:
        blocks = order.blocks(buffer)
        assert sum(b - a for a, b in blocks) == len(order.mixing(buffer)) <= 24
        seen += [row for a, b in blocks for row in range(a, b)]
        buffer = order.following(buffer)
    assert sorted(seen) == list(range(100)) and buffer == (1, 0)


@pytest.mark.parametrize("limited", [False, True])
def test_batches_are_the_rows_in_that_order(cache: Cache, limited: bool, small: int) -> None:
    options = {"buffer_numbers": small} if limited else {}
    reader = Reader(cache, TRAIN, seed=2, **options)
    order = Order(reader.n_rows, 2, block=32, n_mixed=8 if limited else None)
    for step in range(12):  # past the end of the first epoch
        assert torch.equal(reader.batch(step, 100), stored(cache)[order.rows(step, 100)])


def test_a_reader_that_begins_later_gives_the_same_batches(cache: Cache, small: int) -> None:
    one, other = (Reader(cache, TRAIN, seed=2, buffer_numbers=small) for _ in range(2))
    batches = [one.batch(step, 60) for step in range(40)]
    for step in (33, 5, 39, 0):
        assert torch.equal(other.batch(step, 60), batches[step])


def test_neighbouring_rows_come_from_different_documents(cache: Cache, small: int) -> None:
    documents = cache.row_tensor(TRAIN, "documents")
    same_in_cache = (documents[1:] == documents[:-1]).double().mean()
    assert same_in_cache > 0.9
    order = Order(len(documents), 0, block=32, n_mixed=8)
    for epoch in range(3):
        mine = documents[order.rows(epoch, len(documents))]
        same = (mine[1:] == mine[:-1]).double().mean()
        assert same < 2 / 8  # a buffer holds eight documents: one in eight by chance
    whole = documents[Order(len(documents), 0).rows(0, len(documents))]
    assert (whole[1:] == whole[:-1]).double().mean() < 2 / 32


def test_only_two_buffers_are_in_memory(cache: Cache, small: int) -> None:
    reader = Reader(cache, TRAIN, buffer_numbers=small)
    for step in range(30):
        reader.batch(step, 50)
        held = [buffer.rows["acts"] for buffer in reader._buffers.values()]
        assert len(held) == 2 and all(len(acts) <= 256 for acts in held)
        assert not reader._spare


def test_the_next_buffer_is_whole_when_this_one_is_used_up(cache: Cache, small: int) -> None:
    reader = Reader(cache, TRAIN, buffer_numbers=small)
    order = Order(reader.n_rows, 0, block=32, n_mixed=8)
    for step in range(30):
        reader.batch(step, 50)
        (number, _, end), *_ = order.spans(step * 50, 50)[::-1]
        current, following = reader._buffers[number], reader._buffers[order.following(number)]
        assert current.filled == current.n
        assert end / current.n <= following.filled / following.n <= end / current.n + 33 / following.n


def test_a_batch_may_be_written_over_the_one_before(cache: Cache, small: int) -> None:
    fresh, reused = (Reader(cache, TRAIN, buffer_numbers=small, overwrite=o) for o in (False, True))
    kept = [fresh.batch(step, 60) for step in range(20)]
    for step, expected in enumerate(kept):
        batch = reused.batch(step, 60)
        assert torch.equal(batch, expected)
    assert reused.batch(0, 60).data_ptr() == batch.data_ptr()
    assert len({b.data_ptr() for b in kept}) == 20


def test_scale_and_type(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "acts", dtype=torch.bfloat16)
    plain, scaled = Reader(cache, TRAIN).batch(0, 50), Reader(cache, TRAIN, scale=3.0).batch(0, 50)
    assert plain.dtype == torch.float32
    assert torch.equal(plain * 3, scaled)


def test_sequential_is_stored_order(cache: Cache) -> None:
    reader = Reader(cache, TRAIN)
    assert torch.equal(torch.cat(list(reader.sequential(100))), stored(cache))
    assert torch.equal(torch.cat(list(reader.sequential(100, 250))), stored(cache)[:250])
    assert [len(x) for x in reader.sequential(100, 250)] == [100, 100, 50]


def test_eight_bit_rows_are_read_as_they_were_quantised(cache: Cache, tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "small", _plan(), storage="int8")
    for shard in cache.shards:
        tensors = {**cache.shard_tensors(shard), "input_ids": torch.zeros(1, 32, dtype=torch.int32)}
        writer.add(shard.split, tensors)
    writer.finish(_plan().header(config=cache.header.config, dtype="float32"), cache.splits, cache.vocabulary)
    eight = open_cache(tmp_path / "small")
    assert eight.storage == "int8" and eight.stored(eight.shards[0])["acts"].dtype == torch.int8
    exact, near = Reader(cache, TRAIN, seed=1), Reader(eight, TRAIN, seed=1)
    for step in range(8):
        x, y = exact.batch(step, 100), near.batch(step, 100)
        # Half a level of the row's largest element at most.
        assert ((x - y).abs() <= x.abs().amax(1, keepdim=True) / 254 * 1.001).all()
        assert not torch.equal(x, y)
    assert torch.equal(torch.cat(list(near.sequential(77))), torch.cat([p["acts"] for p in eight.iter_split(TRAIN)]))


def _plan() -> h.Plan:
    return h.Plan("cache", h.CACHE, {"made_for": "tests"})


def test_rows_can_be_left_out_when_reading(cache: Cache, small: int) -> None:
    norms = stored(cache).norm(dim=1)
    keep = select_rows(cache, TRAIN, max_norm=1.2)
    assert torch.equal(keep, norms <= 1.2 * norms.median()) and 0 < keep.sum() < len(keep)
    reader = Reader(cache, TRAIN, seed=1, keep=keep, buffer_numbers=small)
    assert reader.n_rows == int(keep.sum())
    rows = torch.cat([reader.batch(step, 100) for step in range(-(-reader.n_rows // 100))])[: reader.n_rows]
    assert sorted(numbers(cache, rows)) == keep.nonzero().squeeze(1).tolist()
    assert torch.equal(torch.cat(list(reader.sequential(64))), stored(cache)[keep])


def test_special_rows_can_be_left_out_when_reading(cache: Cache) -> None:
    keep = select_rows(cache, TRAIN, special=False)
    assert torch.equal(keep, cache.row_tensor(TRAIN, "positions") != 0)
    cache.header.config["dropped_ids"] = [3, 5]
    tokens = cache.row_tensor(TRAIN, "tokens")
    keep = select_rows(cache, TRAIN, special=False)
    assert torch.equal(keep, (cache.row_tensor(TRAIN, "positions") != 0) & (tokens != 3) & (tokens != 5))


def test_statistics_are_those_of_the_cache(cache: Cache) -> None:
    found, rows = Reader(cache, TRAIN).statistics, stored(cache).double()
    torch.testing.assert_close(found.mean, rows.mean(0))
    assert found.mean_sq_norm == pytest.approx(float(rows.square().sum(1).mean()))

    def distance(point: torch.Tensor) -> float:
        return float((rows - point).norm(dim=1).sum())

    best = distance(found.geometric_median)
    for direction in torch.eye(D, dtype=torch.float64):
        assert best < distance(found.geometric_median + 0.05 * direction)
        assert best < distance(found.geometric_median - 0.05 * direction)
