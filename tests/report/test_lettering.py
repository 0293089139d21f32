"""Text in drawings is cut to the room there is, and says that it was."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saetool.report import lettering


@given(st.text(max_size=60), st.floats(20, 300), st.booleans())
def test_text_that_fits_is_kept_and_other_text_is_cut_with_an_ellipsis(text: str, room: float, middle: bool) -> None:
    whole, cut = lettering.visible(text), lettering.fitted(text, room, middle=middle)
    if lettering.text_width(whole) <= room:
        assert cut == whole
        return
    head, _, tail = cut.partition("…") if "…" not in whole else (cut, "", "")
    assert "…" in cut and lettering.text_width(cut) <= room + 1e-6
    if "…" not in whole:
        assert whole.startswith(head) and whole.endswith(tail) and (middle or not tail)


def test_a_name_cut_in_its_middle_keeps_both_ends() -> None:
    cut = lettering.fitted("batchtopk/sae-288-seed1, where they fire", 200, middle=True)
    assert cut.startswith("batchtopk/") and cut.endswith("they fire") and len(cut) < 40


@pytest.mark.parametrize(("narrow", "wide"), [("il.,'", "mWM@Q"), ("abcde", "漢字漢字漢"), ("abcde", "ABCDE")])
def test_wider_letters_take_more_room(narrow: str, wide: str) -> None:
    assert lettering.text_width(narrow) < lettering.text_width(wide)


def test_combining_marks_take_none() -> None:
    assert lettering.text_width("e\u0301") == lettering.text_width("e")
