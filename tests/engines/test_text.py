"""Sources, de-duplication, the split by document, and packing."""

import gzip
import io
import json
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saetool.engines.near_duplicates import NearDuplicates
from saetool.engines.packing import Corpus, ahead, encoded, is_heldout, tokenise
from saetool.engines.text import decode, from_dataset, from_paths
from saetool.errors import ArtifactError, BackendError

SEPARATOR, BOS = 1, 0


def encode(batch: list[str]) -> list[list[int]]:
    """One token a character: its code point plus two."""
    return [[ord(c) + 2 for c in text] for text in batch]


def packed(texts: Iterable[str], **options: object) -> Corpus:
    arguments = {"separator": SEPARATOR, "bos": BOS, "ctx_len": 8, "heldout": 0.1, **options}
    return tokenise(texts, encode, **arguments)  # type: ignore[arg-type]


def read_back(corpus: Corpus) -> dict[int, str]:
    """The text of each document, put together again from the contexts of both splits."""
    texts: dict[int, str] = {}
    for contexts in (corpus.train, corpus.heldout):
        for start, stop in contexts.batches(0, len(contexts), 3):
            ids, documents = contexts.take(start, stop)
            if contexts.bos is not None:
                assert (ids[:, 0] == contexts.bos).all()
                ids, documents = ids[:, 1:], documents[:, 1:]
            for token, document in zip(ids.ravel(), documents.ravel(), strict=True):
                if token != SEPARATOR:
                    texts[int(document)] = texts.get(int(document), "") + chr(token - 2)
    return texts


@given(
    st.lists(st.text("abc", min_size=1, max_size=30), min_size=1, max_size=40, unique=True),
    st.integers(2, 9),
    st.booleans(),
    st.sampled_from([0.0, 0.1, 0.5]),
)
def test_contexts_hold_every_document_once_and_in_one_split(
    texts: list[str], ctx_len: int, bos: bool, heldout: float
) -> None:
    corpus = packed(texts, ctx_len=ctx_len, bos=BOS if bos else None, heldout=heldout)
    assert not set(corpus.train.documents) & set(corpus.heldout.documents)
    found = read_back(corpus)
    if not bos:  # a last context of one token is not kept
        for contexts in (corpus.train, corpus.heldout):
            if len(contexts.ids) % ctx_len == 1 and contexts.ids[-1] != SEPARATOR:
                number = int(contexts.documents[-1])
                found[number] = found.get(number, "") + chr(contexts.ids[-1] - 2)
    assert [found[i] for i in range(len(texts))] == texts


def test_every_context_is_full_but_the_last_of_a_split() -> None:
    corpus = packed(["a" * 20, "b" * 13, "c" * 9], heldout=0.0)
    lengths = [corpus.train.take(i, i + 1)[0].shape[1] for i in range(len(corpus.train))]
    # 20 + 13 + 9 characters and 2 separators, 7 to a context beside BOS: 6 full ones and 2 tokens.
    assert lengths == [8] * 6 + [3]
    assert corpus.train.n_tokens == sum(lengths)


def test_contexts_are_numbered_through_both_splits() -> None:
    corpus = packed([f"document number {i}" for i in range(30)])
    assert corpus.train.first == 0
    assert corpus.heldout.first == len(corpus.train)


def test_documents_equal_but_for_whitespace_are_used_once_and_counted() -> None:
    corpus = packed(["a b", "a  b\n", " ", "c", "", "a\tb "])
    assert corpus.counts == type(corpus.counts)(documents=2, duplicates=2, empty=2)
    assert sorted(read_back(corpus).values()) == ["a b", "c"]


def test_limit_counts_text_and_separators_of_both_splits() -> None:
    texts = [f"{i:05d}" for i in range(60)]
    for limit in (1, 5, 6, 7, 100, 101, 102):
        corpus = packed(texts, limit=limit)
        assert len(corpus.train.ids) + len(corpus.heldout.ids) in (limit, limit - 1)
    whole, part = packed(texts), packed(texts, limit=100)
    assert np.array_equal(part.train.ids[:60], whole.train.ids[:60])  # a shorter run begins like a longer one


def test_limit_reads_no_more_of_a_stream_than_it_needs() -> None:
    read = 0

    def stream() -> Iterable[str]:
        nonlocal read
        for i in range(10_000):
            read += 1
            yield f"document {i}"

    packed(stream(), limit=100)
    assert read <= 64


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("period", [1, 2, 5, 10])
def test_held_out_documents_are_a_share_of_every_kind(share: float, period: int) -> None:
    # Texts often come in turns (five topics, say): holding out must not fall in step with them.
    for offset in range(period):
        mine = range(offset, 2000, period)
        assert sum(is_heldout(i, share) for i in mine) / len(mine) == pytest.approx(share, abs=0.02)


def test_with_few_documents_the_last_is_held_out_and_a_single_one_is_not() -> None:
    assert set(packed(["aaa", "bbb"]).heldout.documents) == {1}
    assert len(packed(["aaa"]).heldout) == 0
    assert len(packed(["aaa", "bbb"], heldout=0.0).heldout) == 0


@pytest.mark.parametrize("texts", [[], ["", " \n"]])
def test_no_text_is_an_error(texts: list[str]) -> None:
    with pytest.raises(ArtifactError, match="empty"):
        packed(texts)


# --- sources ---


def test_files_folders_globs_and_records_give_their_documents_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.txt").write_text("two")
    (tmp_path / "b" / "1.md").write_text("one")
    (tmp_path / "b" / "picture.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "r.jsonl").write_text('{"text": "three", "n": 1}\n\n{"text": "fo\\nur"}\n')
    (tmp_path / "c.csv").write_text('id,text\n1,"five, and\nmore"\n2,six\u2028seven\n')
    read = list(from_paths([str(tmp_path / "b"), str(tmp_path / "r.jsonl"), str(tmp_path / "*.csv")]).open())
    assert read == ["one", "two", "three", "fo\nur", "five, and\nmore", "six\u2028seven"]


def test_parquet_gives_a_document_a_row(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"body": ["one", "two"], "n": [1, 2]}), tmp_path / "t.parquet")
    assert list(from_paths([str(tmp_path / "t.parquet")], "body").open()) == ["one", "two"]
    with pytest.raises(ArtifactError, match='no column "text" \\(has body, n\\)'):
        list(from_paths([str(tmp_path / "t.parquet")]).open())
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(ArtifactError, match="not a readable Parquet"):
        list(from_paths([str(tmp_path / "bad.parquet")]).open())


def test_local_datasets_give_a_document_a_row(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_dict({"body": ["one", "two"]})
    rows.save_to_disk(tmp_path / "saved")
    DatasetDict({"test": rows}).save_to_disk(tmp_path / "splits")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    for name, split in (("saved", "train"), ("splits", "test"), ("data", "train")):
        texts = from_dataset(str(tmp_path / name), None, split, "body")
        assert list(texts.open()) == ["one", "two"]
        assert texts.name == name
    with pytest.raises(BackendError, match="splits: cannot be read"):
        list(from_dataset(str(tmp_path / "splits"), None, "train", "body").open())
    with pytest.raises(ArtifactError, match='no text in the field "text"'):
        list(from_dataset(str(tmp_path / "saved"), None, "train", None).open())


def test_a_streamed_dataset_is_known_by_its_commit_and_not_read_to_be_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    commits = iter(["a" * 40, "b" * 40, "b" * 40])
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: f"/hub/snapshots/{next(commits)}")
    first, second, third = (from_dataset("org/corpus", None, "train", None).as_input() for _ in range(3))
    assert first.sha256 != second.sha256 == third.sha256


def test_the_hash_of_the_text_depends_on_documents_and_order_alone(tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_text("one")
    (tmp_path / "2.txt").write_text("two")
    (tmp_path / "both.jsonl").write_text(json.dumps({"text": "one"}) + "\n" + json.dumps({"text": "two"}) + "\n")
    one, two, both = (str(tmp_path / n) for n in ("1.txt", "2.txt", "both.jsonl"))
    hashes = [from_paths(paths).as_input().sha256 for paths in ([one, two], [both], [two, one], [one])]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_old_western_encoding_is_read_and_binary_refused() -> None:
    assert decode("a £15m signing".encode("cp1252"), "x") == "a £15m signing"
    assert decode("a £15m signing".encode(), "x") == "a £15m signing"
    with pytest.raises(ArtifactError, match="not a text file"):
        decode(gzip.compress(b"text" * 100) + b"\0", "x")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": 1}\n', 'line 1: no text in the field "text" \\(has text\\)'),
        ("a.jsonl", '{"text": "x"}\n{"body": "y"}\n', 'line 2: no text in the field "text" \\(has body\\)'),
        ("a.jsonl", "[1]\n", "line 1: no text"),
        ("a.jsonl", "not json\n", "line 1 is not JSON"),
        ("a.csv", "id\n1\n", 'record 1: no text in the field "text" \\(has id\\)'),
    ],
)
def test_a_record_without_the_field_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ArtifactError, match=message):
        list(from_paths([str(tmp_path / name)]).open())


@pytest.mark.parametrize("pattern", ["missing.txt", "*.none", "empty"])
def test_a_source_without_text_is_named(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=pattern.replace("*", "\\*")):
        from_paths([str(tmp_path / pattern)])


def zstandard(data: bytes) -> bytes:
    import pyarrow

    return pyarrow.Codec("zstd").compress(data, asbytes=True)


@pytest.mark.parametrize(("suffix", "squeeze"), [("gz", gzip.compress), ("zst", zstandard)])
def test_compressed_sources_give_the_same_documents(tmp_path: Path, suffix: str, squeeze: Callable) -> None:
    plain = {
        "a.txt": b"one",
        "b.jsonl": b'{"text": "two"}\n{"text": "three\\u2028 four"}\n',
        "c.csv": b'id,text\r\n1,"five, and\r\nmore"\r\n',
        "d.md": b"a \xa315m signing",
    }
    for folder, change in (("plain", bytes), ("squeezed", squeeze)):
        (tmp_path / folder).mkdir()
        for name, content in plain.items():
            (tmp_path / folder / (name if change is bytes else f"{name}.{suffix}")).write_bytes(change(content))
    # Several frames, one after the other, are one stream: how large dumps are written.
    double = squeeze(b'{"text": "six"}\n') + squeeze(b'{"text": "seven"}\n')
    (tmp_path / "squeezed" / f"e.jsonl.{suffix}").write_bytes(double)
    expected = list(from_paths([str(tmp_path / "plain")]).open())
    assert len(expected) == 5
    assert list(from_paths([str(tmp_path / "squeezed")]).open()) == [*expected, "six", "seven"]


@pytest.mark.parametrize(("suffix", "squeeze"), [("gz", gzip.compress), ("zst", zstandard)])
def test_a_compressed_file_that_is_cut_off_or_none_is_named(tmp_path: Path, suffix: str, squeeze: Callable) -> None:
    whole = squeeze(b"".join(json.dumps({"text": f"{i} {i * i}"}).encode() + b"\n" for i in range(5000)))
    for name, content in (("cut", whole[: len(whole) // 2]), ("none", b"this is plain text")):
        file = tmp_path / f"{name}.jsonl.{suffix}"
        file.write_bytes(content)
        with pytest.raises(ArtifactError, match=f"{name}.jsonl.{suffix}: (not readable as|line)"):
            list(from_paths([str(file)]).open())


@pytest.mark.parametrize("squeeze", [bytes, gzip.compress, zstandard])
def test_standard_input_may_be_compressed(monkeypatch: pytest.MonkeyPatch, squeeze: Callable) -> None:
    data = squeeze(b'{"text": "one"}\n{"text": "two"}\n')
    monkeypatch.setattr("sys.stdin", type("Input", (), {"buffer": io.BytesIO(data)}))
    texts = from_paths(["-"], "text")
    assert list(texts.open()) == list(texts.open()) == ["one", "two"]


# --- near-duplicates ---


def sentence(i: int) -> str:
    return " ".join(f"w{(i * 7919 + j * j * 31) % 997}" for j in range(200))


def edited(text: str, words: int) -> str:
    """``text`` with ``words`` of its words replaced, far apart."""
    parts = text.split()
    for at in range(words):
        parts[(2 * at + 1) * len(parts) // (2 * words)] = f"new{at}"
    return " ".join(parts)


def test_near_duplicates_are_found_and_different_texts_are_not() -> None:
    near = NearDuplicates()
    texts = [sentence(i) for i in range(200)]
    assert [near.add(t) for t in texts] == [None] * 200
    assert [near.add(edited(t, 1)) for t in texts] == list(range(200))  # shares 191 of 201 runs of five words
    assert all(near.add(edited(t, 40)) is None for t in texts)  # shares none
    assert near.add("Short.") is None and near.add("short") is not None


def test_near_duplicates_agree_with_the_exact_share_of_runs() -> None:
    def runs(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    found = {True: 0, False: 0}
    for i in range(300):
        text = sentence(i)
        other = edited(text, i % 24)
        share = len(runs(text) & runs(other)) / len(runs(text) | runs(other))
        near = NearDuplicates()
        near.add(text)
        hit = near.add(other) is not None
        if share > 0.9 or share < 0.5:
            assert hit == (share > 0.9), share
            found[hit] += 1
    assert min(found.values()) > 30


def test_near_duplicates_are_on_one_side_of_the_split() -> None:
    originals = [sentence(i) for i in range(150)]
    copies = [edited(t, 1) for t in originals]
    texts = [*originals, *copies]
    corpus = packed(texts, heldout=0.2)
    assert corpus.counts.near_duplicates == 150
    held = set(corpus.heldout.documents.tolist())
    assert held and all((i in held) == (i + 150 in held) for i in range(150))
    # Without the rule, many pairs would be apart.
    assert sum(is_heldout(i, 0.2) != is_heldout(i + 150, 0.2) for i in range(150)) > 20


def test_the_document_held_out_for_want_of_others_has_no_near_duplicate() -> None:
    a, b = sentence(0), sentence(1)
    assert set(packed([a, b, edited(b, 1)]).heldout.documents) == {0}
    assert len(packed([a, edited(a, 1)]).heldout) == 0


# --- reading ahead ---


def test_documents_read_ahead_are_the_same_and_no_more_than_asked_for() -> None:
    read = 0

    def stream() -> Iterable[str]:
        nonlocal read
        for i in range(100_000):
            read += 1
            yield f"document {i}"

    plain = encoded((f"document {i}" for i in range(300)), encode)
    for one, other in zip(plain, ahead(encoded((f"document {i}" for i in range(300)), encode), 7), strict=True):
        assert np.array_equal(one.ids, other.ids) and (one.index, one.duplicates) == (other.index, other.duplicates)
    corpus = Corpus(ahead(encoded(stream(), encode), 64), separator=SEPARATOR, bos=BOS, ctx_len=8, heldout=0.1)
    assert corpus.grow(corpus.train, 10) and not corpus.complete
    assert read < 1000


def test_what_goes_wrong_while_reading_ahead_is_raised_and_the_thread_ends() -> None:
    def broken() -> Iterable[str]:
        yield "one"
        raise ArtifactError("torn")

    with pytest.raises(ArtifactError, match="torn"):
        list(ahead(encoded(broken(), encode)))
    documents = ahead(encoded((str(i) for i in range(100_000)), encode), 2)
    next(documents)
    documents.close()
    assert not [t for t in threading.enumerate() if t.name == "tokeniser"]


def test_a_growing_corpus_has_the_same_contexts_as_one_read_at_once() -> None:
    texts = [f"document number {i} {'x' * (i % 13)}" for i in range(200)]
    whole = packed(texts)
    corpus = Corpus(encoded(texts, encode), separator=SEPARATOR, bos=BOS, ctx_len=8, heldout=0.1)
    at = 0
    while corpus.grow(corpus.train, at + 3):
        assert np.array_equal(corpus.train.take(at, at + 3)[0], whole.train.take(at, at + 3)[0])
        at += 3
    assert corpus.complete and at <= corpus.train.n_full < at + 3
    assert np.array_equal(corpus.heldout.ids, whole.heldout.ids)
