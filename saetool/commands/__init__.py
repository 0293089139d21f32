"""One file a verb: options → load → one call → write → emit. Torch is imported inside the functions only."""

from collections.abc import Callable

from saetool.commands.autointerp import autointerp
from saetool.commands.cache import cache
from saetool.commands.convert import convert
from saetool.commands.eval import eval_
from saetool.commands.inspect import inspect
from saetool.commands.meta import meta
from saetool.commands.report import report
from saetool.commands.stitch import stitch
from saetool.commands.threshold import threshold
from saetool.commands.train import train

VERBS: dict[str, Callable[..., None]] = {
    "cache": cache,
    "train": train,
    "threshold": threshold,
    "eval": eval_,
    "stitch": stitch,
    "meta": meta,
    "autointerp": autointerp,
    "report": report,
    "convert": convert,
    "inspect": inspect,
}

SEVERAL = {"meta": ("--compare", "--edit")}
"""Options after which several values may follow, up to the next option: shells expand *.st to that."""
