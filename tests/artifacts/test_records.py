"""Records in two files: the lists come back as they were, and what does not belong together is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import random_sae, save_sae
from hypothesis import given, settings
from hypothesis import strategies as st

from saetool.artifacts import header as h
from saetool.artifacts import records, writing
from saetool.errors import ArtifactError

PLAN = h.Plan("stitch", h.STITCH, {"theta": 0.7})


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "INLINE", 20)
    monkeypatch.setattr(records, "LONG", 6)


def payload() -> dict[str, Any]:
    nan = float("nan")
    return {
        "theta": 0.7,
        "pairs": [
            {
                "nearest": [3, None, 2**53 + 1, 0, -1, 5],
                "mse": [0.1, nan, float("inf"), -0.0, 1e-300, 2.0, None],
                "edges": [[1, 2, 0.5], [3, 4, 0.25], [5, 6, 1 / 3]],
                "sizes": [[1, 1], [2, None], [3, 4]],
                "ragged": [[1], [2, 3], [4, 5, 6], [7], [8], [9]],
                "mixed": [1, 0.5, 2, 3, 4, 5, 6],
                "names": ["a", "b", "c", "d", "e", "f"],
                "flags": [True, False, True, True, True, True],
                "few": [1.5, 2.5],
                "nothing": [],
            }
        ],
    }


def written(path: Path, what: dict[str, Any]) -> str:
    return records.write(path, PLAN, PLAN.header(), what)


def test_what_is_read_is_what_one_file_would_hold(tmp_path: Path) -> None:
    written(tmp_path / "two.json", payload())
    writing.write_json(tmp_path / "one.json", PLAN.header(), payload())
    assert records.beside(tmp_path / "two.json").is_file()
    one, two = (records.read(tmp_path / f"{name}.json") for name in ("one", "two"))
    assert json.dumps(two[1]) == json.dumps(one[1])
    assert two[0] == one[0]
    rest = json.loads((tmp_path / "two.json").read_bytes())
    assert rest["pairs"][0]["mse"] == {"array": "pairs.0.mse"}
    assert rest["pairs"][0]["edges"] == {"array": "pairs.0.edges", "columns": 3}
    for name in ("ragged", "mixed", "names", "flags", "few", "nothing"):
        assert rest["pairs"][0][name] == payload()["pairs"][0][name]


@settings(max_examples=30, deadline=None)
@given(
    st.recursive(
        st.lists(st.floats() | st.none())
        | st.lists(st.integers(-(2**63), 2**63 - 1) | st.none())
        | st.lists(st.tuples(st.integers(0, 99), st.floats(0, 1)).map(list), min_size=3),
        lambda inner: st.dictionaries(st.text("ab.", min_size=1), inner, max_size=3) | st.lists(inner, max_size=3),
        max_leaves=6,
    )
)
def test_any_record_comes_back(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    folder = tmp_path_factory.mktemp("any")
    what = {"value": value, "long": [0.5] * 21}
    written(folder / "r.json", what)
    assert records.read(folder / "r.json")[1] == h.finite(what)


def test_a_short_record_is_one_file_and_the_same_bytes_as_ever(tmp_path: Path) -> None:
    what = {"mse": [0.5] * 20}
    writing.write_json(tmp_path / "plain.json", PLAN.header(), what)
    written(tmp_path / "r.json", what)
    assert (tmp_path / "r.json").read_bytes() == (tmp_path / "plain.json").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"plain.json", "r.json"}


def test_standard_output_gets_all_of_it(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    written(Path("-"), payload())
    found = json.loads(capfdbinary.readouterr().out)
    assert found["pairs"] == h.finite(payload())["pairs"]


def test_the_same_record_gives_the_same_bytes(tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        written(tmp_path / name / "r.json", payload())
        made.append([(tmp_path / name / file).read_bytes() for file in ("r.json", "r.arrays.st")])
    assert made[0] == made[1]


def test_a_short_record_takes_away_what_lay_beside_a_long_one(tmp_path: Path) -> None:
    written(tmp_path / "r.json", payload())
    written(tmp_path / "r.json", {"mse": [0.5]})
    assert {p.name for p in tmp_path.iterdir()} == {"r.json"}
    (tmp_path / "r.arrays.st").write_text("somebody's notes")
    written(tmp_path / "r.json", {"mse": [0.5]})
    assert (tmp_path / "r.arrays.st").read_text() == "somebody's notes"


def test_up_to_date_means_both_files(tmp_path: Path) -> None:
    path, other = tmp_path / "r.json", tmp_path / "r.arrays.st"
    assert not records.up_to_date(path, PLAN, overwrite=False)
    written(path, payload())
    assert records.up_to_date(path, PLAN, overwrite=False)
    assert not records.up_to_date(path, PLAN, overwrite=True)
    whole = other.read_bytes()
    other.unlink()
    assert not records.up_to_date(path, PLAN, overwrite=False)
    other.write_bytes(whole[:-8] + bytes(8))
    assert not records.up_to_date(path, PLAN, overwrite=False)
    other.write_text("somebody's notes")
    with pytest.raises(ArtifactError, match="will not be replaced"):
        records.up_to_date(path, PLAN, overwrite=False)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    path, other = tmp_path / "r.json", tmp_path / "r.arrays.st"
    written(path, payload())
    whole, record = other.read_bytes(), path.read_text()
    other.unlink()
    with pytest.raises(ArtifactError, match=r"r\.json: its long lists are in r\.arrays\.st, which is not beside it"):
        records.read(path)
    other.write_bytes(whole[:-8] + bytes(8))
    with pytest.raises(ArtifactError, match=r"r\.json: its long lists were in another r\.arrays\.st"):
        records.read(path)
    other.write_bytes(whole)
    for wrong in (
        ('"pairs.0.mse"', '"pairs.0.other"'),
        ('"columns": 3', '"columns": 4'),
        ('"columns": 3', '"columns": []'),
    ):
        assert wrong[0] in record
        path.write_text(record.replace(*wrong))
        with pytest.raises(ArtifactError, match=r"r\.json: its long lists do not fit r\.arrays\.st"):
            records.read(path)
    sae = h.sha256_file(save_sae(other, random_sae()))
    path.write_text(record.replace(h.sha256_bytes(whole), sae))
    with pytest.raises(ArtifactError, match=r"r\.json: r\.arrays\.st: is an SAE"):
        records.read(path)
    path.write_text(record.replace('"sha256": "', '"sha": "'))
    with pytest.raises(ArtifactError, match="is damaged"):
        records.read(path)


def test_a_record_does_not_reach_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    written(tmp_path / "r.json", payload())
    text = (tmp_path / "r.json").read_text().replace('"r.arrays.st"', '"../r.arrays.st"')
    (tmp_path / "inner" / "r.json").write_text(text)
    with pytest.raises(ArtifactError, match="not beside it"):
        records.read(tmp_path / "inner" / "r.json")
