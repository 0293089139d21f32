"""What log-probabilities inside a given text are, the slow way."""

import torch

from saetool.llm.client import Request
from saetool.llm.local import LocalClient


def place_by_place(client: LocalClient, request: Request) -> list[list[float]]:
    """The log-probabilities that ``request`` asks for, each from a pass of its own."""
    alone = []
    for place in request.places:
        # The text up to this place and nothing behind it, through the model itself.
        text = client.prompt(request.messages, request.given[:place])
        ids = torch.tensor([client._tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.inference_mode():
            logits = client._lm(ids).logits[0, -1]
        alone.append(logits.float().log_softmax(-1)[client.value_ids(request.values)].tolist())
    return alone
