"""One file a verb: options → load → one call → write → emit. Torch is imported inside the functions only."""

from collections.abc import Callable

from saetool.commands.inspect import inspect

VERBS: dict[str, Callable[..., None]] = {
    "inspect": inspect,
}
