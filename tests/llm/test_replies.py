import contextlib
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saetool.engines import prompts
from saetool.llm import replies, tokens
from saetool.llm.client import USER, Message, Reply, Request
from saetool.llm.replies import Unreadable


def reply(text: str, finish: str = "stop") -> Reply:
    return Reply(text, finish, 1, 1)


@pytest.mark.parametrize(
    "text",
    [
        '{"description": "fruit"}',
        '```json\n{"description": "fruit"}\n```',
        '<think>{"description": "no"} hm</think>\nHere it is: {"description": "fruit"} Good?',
        'Set {a} aside. {"description": "fruit"}',
        '{"description": "  fruit\\n"}',
    ],
)
def test_a_description_is_found_wherever_it_stands(text: str) -> None:
    assert replies.description(reply(text), 200) == "fruit"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        ("<think>so long", "empty"),
        ("fruit", "no JSON object"),
        ('{"description": ["fruit"]}', "no text"),
        ('{"description": " \\u202e "}', "was empty"),
        ('{"label": "fruit"}', "no text"),
        ('{"description": "a", "description": "b"}', "twice"),
    ],
)
def test_what_is_no_description_is_refused_with_a_reason(text: str, why: str) -> None:
    with pytest.raises(Unreadable, match=why):
        replies.description(reply(text), 200)


def test_an_answer_lost_to_reasoning_says_so() -> None:
    with pytest.raises(Unreadable, match="limit on output tokens"):
        replies.description(reply("<think>so long", "length"), 200)


def test_a_long_description_that_is_cut_off_is_kept_as_far_as_any_would_be() -> None:
    begun = '{"description": "' + "many words " * 20
    assert replies.description(reply(begun, "length"), 200).startswith("many words")
    for text, finish in ((begun, "stop"), (begun[:100], "length")):
        with pytest.raises(Unreadable):
            replies.description(reply(text, finish), 200)


@given(st.text(max_size=300), st.integers(1, 200))
def test_descriptions_are_one_line_without_hidden_characters(text: str, most: int) -> None:
    cleaned = replies.clean(text, most)
    assert len(cleaned) <= most
    assert cleaned == cleaned.strip()
    assert not any(c in cleaned for c in "\n\r\t\x00\u2028\u202e\u200b\ufeff")


@given(st.dictionaries(st.text(max_size=5), st.integers()), st.text(alphabet="ab \n", max_size=20))
def test_any_object_is_read_from_any_surroundings(value: dict[str, int], around: str) -> None:
    assert replies.first_object(f"{around}{json.dumps(value)}{around}") == value


def test_longer_prompts_are_estimated_to_have_more_tokens() -> None:
    def asked(text: str) -> Request:
        return Request((Message(USER, text),))

    assert tokens.estimate("") == 0
    assert tokens.estimate("The cat sat.") == 4
    assert tokens.prompt_tokens(asked("one two")) < tokens.prompt_tokens(asked("one two three"))


JSONISH = st.text(alphabet='{}[]":,0123456789 aeidnsw\\\n', max_size=60)


@given(JSONISH | st.text(max_size=60), st.sampled_from(["stop", "length"]))
@settings(max_examples=300, deadline=None)
def test_whatever_a_model_says_is_read_or_refused(text: str, finish: str) -> None:
    """A traceback in the midst of a run is neither."""
    shown = [prompts.Excerpt((" a", " b"), (0, 0))] * 2
    described = text.replace("1", '"description":').replace("2", '"answer":')
    for said in (text, described, f'{{"1": {text}, "2": {{}}}}', f'{{"answer": {text}}}'):
        for read in (prompts.read_strengths(shown), prompts.read_certainties(2), prompts.read_answer(5)):
            with contextlib.suppress(Unreadable):
                read(reply(said, finish))
        with contextlib.suppress(Unreadable):
            assert prompts.read_description(reply(said, finish))


@pytest.mark.parametrize(
    "text",
    ['{"1":' * 100_000, '{"1": {"' + "0" * 5000 + '": 1}, "2": {}}', '{"answer": "' + "1" * 5000 + '"}'],
    ids=["nested", "long place", "long answer"],
)
def test_a_model_that_repeats_itself_without_end_is_refused(text: str) -> None:
    shown = [prompts.Excerpt((" a", " b"), (0, 0))] * 2
    for read in (prompts.read_strengths(shown), prompts.read_answer(5)):
        with pytest.raises(Unreadable):
            read(reply(text))


def test_probabilities_that_are_not_known_are_no_answer() -> None:
    known = Reply("", "stop", 1, 1, ((-1.0, -2.0, -3.0),) * 2)
    assert prompts.read_answer(3)(known) == 0
    unknown = Reply("", "stop", 1, 1, ((-1.0,) * 10, (-math.inf,) * 10))
    for read in (prompts.expected, prompts.read_answer(10)):
        with pytest.raises(Unreadable):
            read(Reply("", "stop", 1, 1, unknown.logprobs[::-1]))
