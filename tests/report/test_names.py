"""SAEs of one name in two folders are told apart on the page, wherever they are mentioned."""

from pathlib import Path
from typing import Any

from saetool.artifacts import header as h
from saetool.report.collect import Artifact
from saetool.report.names import told_apart


def artifact(
    label: str, schema: str, sha256: str, payload: Any = None, inputs: tuple[tuple[str, str], ...] = ()
) -> Artifact:
    found = [h.Input("sae", name, sha, h.SAE) for name, sha in inputs]
    return Artifact(Path(label), label, sha256, h.Plan("x", schema, {}, found).header(), payload)


def run(folder: str, small: str, large: str) -> list[Artifact]:
    pair = {
        "small": "small.st",
        "large": "large.st",
        "small_sha256": small,
        "large_sha256": large,
        "edges": [[0, 1, 0.5]],
    }
    inputs = (("small.st", small), ("large.st", large))
    evaluated = {"saes": [{"name": "small.st", "sha256": small}]}
    pool = [{"name": "large.st", "sha256": large}, {"name": "small.st", "sha256": small}]
    compared = {"compare": {"pool": pool, "comparable": "small.st"}}
    return [
        artifact(f"{folder}small.st", h.SAE, small),
        artifact(f"{folder}large.st", h.SAE, large),
        artifact(f"{folder}stitch.json", h.STITCH, f"stitch {small}", {"pairs": [pair]}, inputs),
        artifact(f"{folder}eval.json", h.EVAL, f"eval {small}", evaluated, inputs),
        artifact(f"{folder}meta.json", h.META, f"meta {small}", compared, inputs),
        artifact(f"{folder}train.jsonl", h.TRAIN_LOG, f"log {small}", [{"sae": "small.st"}, {"sae": "gone.st"}]),
    ]


def test_names_of_one_run_stay() -> None:
    one = run("", "1", "2")
    assert told_apart(one) == tuple(one)


def test_every_mention_in_a_run_gets_its_folder() -> None:
    found = told_apart([*run("all/l1/", "1", "2"), *run("all/topk/", "3", "2")])
    assert [a.name for a in found if a.schema == h.SAE] == ["l1/small.st", "large.st", "topk/small.st", "large.st"]
    pairs = [a.payload["pairs"][0] for a in found if a.schema == h.STITCH]
    assert [p["small"] for p in pairs] == ["l1/small.st", "topk/small.st"]
    assert [p["large"] for p in pairs] == ["large.st", "large.st"]  # the same SAE, copied
    assert pairs[0]["edges"] == [[0, 1, 0.5]]
    assert [a.payload["saes"][0]["name"] for a in found if a.schema == h.EVAL] == ["l1/small.st", "topk/small.st"]
    metas = [a.payload["compare"]["comparable"] for a in found if a.schema == h.META]
    assert metas == ["l1/small.st", "topk/small.st"]
    logs = [[r["sae"] for r in a.payload] for a in found if a.schema == h.TRAIN_LOG]
    assert logs == [["l1/small.st", "gone.st"], ["topk/small.st", "gone.st"]]
    assert [i["name"] for a in found if a.schema == h.STITCH for i in a.header.inputs][:2] == [
        "l1/small.st",
        "large.st",
    ]


def test_records_without_their_saes_are_told_apart_by_their_own_folders() -> None:
    both = [a for a in [*run("a/", "1", "2"), *run("b/", "3", "4")] if a.schema == h.STITCH]
    assert [p.payload["pairs"][0]["large"] for p in told_apart(both)] == ["a/large.st", "b/large.st"]
    stale = [a for a in [*run("a/", "1", "2"), *run("a/", "3", "4")] if a.schema == h.STITCH]
    assert told_apart(stale) == tuple(stale)  # made again: no folder tells them apart


def test_a_meta_sae_compared_with_nothing_keeps_that() -> None:
    """Its record has an empty pool, and nothing comparable."""
    both = [*run("a/", "1", "2"), *run("b/", "3", "4")]
    for compare in ({"pool": [], "comparable": None}, {"pool": None}, {}, None):
        for one in both:
            if one.schema == h.META:
                one.payload["compare"] = compare
        found = told_apart(both)
        assert [a.name for a in found if a.schema == h.SAE] == ["a/small.st", "a/large.st", "b/small.st", "b/large.st"]
        assert not any((a.payload["compare"] or {}).get("comparable") for a in found if a.schema == h.META)
