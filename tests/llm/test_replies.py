import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
