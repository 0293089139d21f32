"""A tiny random model of this machine as a backend."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from place_by_place import place_by_place

from saetool.engines import prompts
from saetool.engines.model import load_model
from saetool.errors import BackendError
from saetool.llm.client import ASSISTANT, SYSTEM, USER, CallFailed, Message, Request
from saetool.llm.local import LocalClient


@pytest.fixture(scope="module", params=["tiny_model_dir", "tiny_llama_dir"])
def client(request: pytest.FixtureRequest) -> LocalClient:
    folder: Path = request.getfixturevalue(request.param)
    lm = load_model(str(folder), device="cpu", dtype="float32")
    return LocalClient(lm.model, lm.tokenizer, lm.reference["id"], lm.reference["revision"])


def complete(client: LocalClient, request: Request):
    return asyncio.run(client.complete(request))


def short(given: str, places: list[int]) -> Request:
    return Request((Message(USER, "x"),), given=given, places=tuple(places), values=prompts.DIGITS)


def test_all_at_once_equals_a_pass_for_every_place(client: LocalClient) -> None:
    shown = prompts.Excerpt((" The", ' ca"t', "\n", " sat", " on", "\t"), (0,) * 6)
    request = prompts.simulate_all_at_once("cats", shown)
    request = Request((Message(USER, "cats"),), given=request.given, places=request.places, values=request.values)
    together, alone = complete(client, request), place_by_place(client, request)
    np.testing.assert_allclose(together.logprobs, alone, atol=1e-4)
    values = np.exp(alone) / np.exp(alone).sum(axis=1, keepdims=True) @ np.arange(10) * 10 / 9
    np.testing.assert_allclose(prompts.expected(together), values, atol=1e-4)
    assert ((prompts.expected(together) >= 0) & (prompts.expected(together) <= 10)).all()


def test_the_place_after_the_text_is_the_next_token(client: LocalClient) -> None:
    ahead = complete(client, short('{"answer": "', [12]))
    inside = complete(client, short('{"answer": "7 and so on', [12]))
    np.testing.assert_allclose(ahead.logprobs, inside.logprobs, atol=1e-5)


def test_generation_is_the_same_each_time_at_temperature_0_and_by_sample_above(client: LocalClient) -> None:
    def text(temperature: float, sample: int) -> str:
        request = Request((Message(SYSTEM, "a"), Message(USER, "b")), 12, temperature, sample)
        return complete(client, request).text

    assert text(0, 0) == text(0, 0)
    assert text(1.0, 1) == text(1.0, 1)
    assert len({text(1.0, i) for i in range(4)}) > 1
    state = torch.random.get_rng_state()
    text(1.0, 3)
    assert torch.equal(torch.random.get_rng_state(), state), "nobody else's random numbers are touched"


def test_an_answer_begins_as_it_was_begun(client: LocalClient) -> None:
    request = Request((Message(USER, "b"),), max_output_tokens=4, start='{"description": "')
    reply = complete(client, request)
    assert reply.text.startswith('{"description": "')
    assert reply.output_tokens <= 4
    plain = complete(client, Request((Message(USER, "b"),), 30, start="{", end=""))
    letter = next(c for c in plain.text[3:] if c.isascii() and c.isalnum())
    ended = complete(client, Request((Message(USER, "b"),), 30, start="{", end=letter + "}"))
    assert ended.text == "{" + plain.text[1:].partition(letter)[0] + letter + "}"
    assert ended.output_tokens < 30


def test_what_is_too_long_or_has_no_place_fails_as_a_call(client: LocalClient) -> None:
    with pytest.raises(CallFailed, match="tokens, and it reads 128"):
        complete(client, Request((Message(USER, "word " * 400),)))
    with pytest.raises(CallFailed, match="no token begins"):
        complete(client, short("the mat", [5]))


def test_values_that_are_no_tokens_are_refused(client: LocalClient) -> None:
    with pytest.raises(BackendError, match="no token of its own"):
        client.value_ids(("1", "1234567"))


def test_a_chat_template_is_used_where_there_is_one(client: LocalClient) -> None:
    messages = (Message(SYSTEM, "S"), Message(USER, "U"))
    assert client.prompt(messages, "A") == "S\n\nUser: U\n\nAssistant: A"
    client._tokenizer.chat_template = "{% for m in messages %}[{{m.role}}]{{m.content}}{% endfor %}[assistant]"
    try:
        assert client.prompt(messages, "A") == "[system]S[user]U[assistant]A"
    finally:
        client._tokenizer.chat_template = None


def test_a_template_that_takes_no_system_message_gets_it_with_the_question(client: LocalClient) -> None:
    strict = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}"
        "{% endif %}[{{m.role}}]{{m.content}}{% endfor %}[model]"
    )
    messages = (Message(SYSTEM, "S"), Message(USER, "U"), Message(ASSISTANT, "?"), Message(USER, "again"))
    client._tokenizer.chat_template = strict
    try:
        assert client.prompt(messages, "A") == "[user]S\n\nU[assistant]?[user]again[model]A"
        with pytest.raises(BackendError, match="refuses a conversation"):
            client.prompt((*messages, Message(USER, "twice")), "A")
    finally:
        client._tokenizer.chat_template = None


def test_given_texts_say_which_token_each_value_is_of() -> None:
    shown = prompts.Excerpt(('a"', "\n", " b"), (0, 0, 0))
    request = prompts.simulate_all_at_once("x", shown)
    for place, token in zip(request.places, shown.tokens, strict=True):
        line = request.given[:place].rsplit("\n", 1)[-1]
        assert json.loads(f'"{line[:-1]}"') == token
        assert request.given[place:].startswith("unknown\n")
