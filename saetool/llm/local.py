"""A causal language model of this machine as a backend; it also gives log-probabilities inside a given text.

Simulation all at once (Bills et al. 2023): the answer's text is given with a placeholder where each value would stand.
A causal model's prediction at a place depends on what precedes it alone, so one pass over the text gives the
distribution at every place that a pass over the text up to that place would give.
"""

import asyncio
import inspect
from typing import Any

import torch
from jinja2 import TemplateError

from saetool.errors import BackendError
from saetool.llm.client import PROMPT_LOGPROBS, SYSTEM, CallFailed, Message, Reply, Request
from saetool.llm.wire import plain

BEGUN = 80
"""Most tokens of an answer whose beginning is given: it is the answer itself, without any reasoning before it."""


class LocalClient:
    """``model`` and ``tokenizer`` of `transformers`, loaded; ``name`` and ``revision`` are what records say."""

    def __init__(self, model: Any, tokenizer: Any, name: str, revision: str) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise BackendError(
                f"{name}: its tokenizer does not say where tokens begin", "use one with a tokenizer.json"
            )
        self._lm, self._tokenizer, self._name, self._revision = model, tokenizer, name, revision
        text_config = model.config.get_text_config()
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        """Whether the model can leave out the other places' logits, a fifth of the work."""
        self._longest = int(getattr(text_config, "max_position_embeddings", 0) or 1 << 30)

    @property
    def kind(self) -> str:
        return "local"

    @property
    def model(self) -> str:
        return self._name

    @property
    def host(self) -> None:
        return None

    @property
    def options(self) -> dict[str, Any]:
        return {"revision": self._revision}

    async def probe(self) -> frozenset[str]:
        return frozenset({PROMPT_LOGPROBS})

    async def close(self) -> None:
        """Nothing is open."""

    async def complete(self, request: Request) -> Reply:
        await asyncio.sleep(0)  # lets an interruption be seen between two calls
        with torch.inference_mode():
            return self._at_places(request) if request.places else self._generate(request)

    def prompt(self, messages: tuple[Message, ...], answer: str) -> str:
        """The model's input: its chat template, or plain paragraphs if it has none, and how the answer begins."""
        if getattr(self._tokenizer, "chat_template", None) is None:
            return plain(Request(messages, given=answer))
        try:
            return self._chat(messages) + answer
        except TemplateError:  # many models take no system message: it goes before the first question
            system = [m.content for m in messages if m.role == SYSTEM]
            first, *others = (m for m in messages if m.role != SYSTEM)
            try:
                return self._chat((Message(first.role, "\n\n".join([*system, first.content])), *others)) + answer
            except TemplateError as error:
                raise BackendError(f"{self._name}: its chat template refuses a conversation ({error})") from None

    def _chat(self, messages: tuple[Message, ...]) -> str:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        return self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def _ids(self, text: str, room: int) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """Token ids [1, n] of ``text``, and which characters each is."""
        # A chat template writes its own first token.
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        if len(ids) + room > self._longest:
            raise CallFailed(f"{self._name}: {len(ids) + room} tokens, and it reads {self._longest}")
        return torch.tensor([ids], device=self._lm.device), offsets

    def _generate(self, request: Request) -> Reply:
        limit = min(request.max_output_tokens, BEGUN) if request.start else request.max_output_tokens
        ids, _ = self._ids(self.prompt(request.messages, request.start), limit)
        options: dict[str, Any] = {"do_sample": request.temperature > 0}
        if request.temperature > 0:
            options |= {"temperature": request.temperature, "top_p": 1.0, "top_k": 0}
        if request.end:
            options |= {"stop_strings": [request.end[0]], "tokenizer": self._tokenizer}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(request.sample)
            out = self._lm.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=limit,
                pad_token_id=self._tokenizer.eos_token_id,
                **options,
            )
        new = out[0, ids.shape[1] :]
        text = self._tokenizer.decode(new, skip_special_tokens=True)
        finish = "length" if len(new) == limit else "stop"
        if request.end and request.end[0] in text:
            text, finish = text.partition(request.end[0])[0] + request.end, "stop"
        return Reply(request.start + text, finish, ids.shape[1], len(new))

    def value_ids(self, values: tuple[str, ...]) -> list[int]:
        """The token with which each value begins. Raises ``BackendError`` if two begin alike."""
        # After a quotation mark, where values stand: some tokenizers put a space before a text's first word.
        alone = self._tokenizer('"', add_special_tokens=False)["input_ids"]
        found = [self._tokenizer(f'"{v}', add_special_tokens=False)["input_ids"] for v in values]
        first = [ids[-1] for ids in found]
        if len(set(first)) != len(values) or any(ids[:-1] != alone for ids in found):
            raise BackendError(
                f"{self._name}: its tokenizer has no token of its own for each of {', '.join(values)}",
                "use --simulate json",
            )
        return first

    def _at_places(self, request: Request) -> Reply:
        text = self.prompt(request.messages, request.given)
        offset = len(text) - len(request.given)
        ids, offsets = self._ids(text, 0)
        starts = {begin: i for i, (begin, end) in reversed(list(enumerate(offsets))) if end > begin}
        before = []
        for place in request.places:
            at = offset + place
            # Beyond the end: the token that would come next.
            i = len(offsets) if at == len(text) else starts.get(at, 0)
            if i == 0:
                raise CallFailed(f"{self._name}: no token begins where a value was asked for")
            before.append(i - 1)
        wanted = self.value_ids(request.values)
        mask, keep = torch.ones_like(ids), torch.tensor(before, device=ids.device)
        if self._keeps:
            logits = self._lm(ids, attention_mask=mask, logits_to_keep=keep).logits[0]
        else:
            logits = self._lm(ids, attention_mask=mask).logits[0, keep]
        rows = logits.float().log_softmax(-1)[:, wanted]
        if not torch.isfinite(rows).all():
            raise CallFailed(f"{self._name}: gave probabilities that are no numbers")
        return Reply("", "stop", ids.shape[1], 0, tuple(tuple(row) for row in rows.tolist()))
