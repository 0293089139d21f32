"""Where ``saetool train`` gets activations: a cache, or a language model that computes them as it goes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from saetool.artifacts import header as h
from saetool.artifacts.cache import TRAIN, Cache
from saetool.config import DTYPES, CacheConfig
from saetool.console import Console
from saetool.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from saetool.engines.cache_request import Prepared
    from saetool.engines.reader import Statistics


class Rows(Protocol):
    """Shuffled training batches, times ``scale``, and statistics of the rows without it."""

    d_in: int
    n_rows: int
    scale: float

    @property
    def statistics(self) -> "Statistics": ...

    def batch(self, step: int, size: int) -> "Tensor": ...


class Source(Protocol):
    """What is known of the activations before any is read."""

    d_in: int
    name: str
    inputs: list[h.Input]
    parents: list[h.Header]
    options: dict[str, Any]
    """Options of the source that change the result; a cache has them in its own header."""

    def n_rows(self) -> int: ...

    def model(self) -> dict[str, Any]:
        """The record of model and hook that the SAE's header carries."""
        ...

    def rows(self, seed: int, device: str) -> Rows: ...


class CacheSource:
    """The train split of a cache."""

    def __init__(self, cache: Cache) -> None:
        self.cache, self.d_in, self.name = cache, cache.d_in, str(cache.path)
        self.inputs, self.parents, self.options = [cache.as_input()], [cache.header], {}

    def n_rows(self) -> int:
        return self.cache.rows(TRAIN)

    def model(self) -> dict[str, Any]:
        return dict(self.cache.header.model)

    def rows(self, seed: int, device: str) -> Rows:
        from saetool.engines.reader import Reader

        return Reader(self.cache, TRAIN, seed=seed, device=device, overwrite=True)


@dataclass(frozen=True)
class Wanted:
    """The options that ask for a live source."""

    model: str | None
    text: Sequence[str]
    dataset: str | None
    hook: str | None
    layer: int | None
    ctx_len: int
    max_norm: float | None

    def any(self) -> bool:
        return any((self.model, self.text, self.dataset, self.hook, self.layer is not None))


class LiveSource:
    """A model's activations on a text, computed block by block. The text's held-out documents are left out."""

    def __init__(self, wanted: Wanted, console: Console) -> None:
        from saetool.engines import cache_request
        from saetool.engines import text as texts
        from saetool.engines.model import find_model

        if wanted.text and wanted.dataset:
            raise ConfigError(f"{wanted.text[0]} and --dataset {wanted.dataset}: one source of text is enough")
        if wanted.hook and wanted.layer is not None:
            raise ConfigError("--hook and --layer say the same thing: give one of them")
        hook = wanted.hook or (None if wanted.layer is None else f"blocks.{wanted.layer}.hook_resid_post")
        if hook is None and wanted.model is not None:
            raise ConfigError("--model needs --hook or --layer", "such as --layer 8, or --hook blocks.8.hook_resid_pre")
        source = find_model(wanted.model)
        if wanted.text:
            text = texts.from_paths(list(wanted.text), None)
        else:
            text = texts.from_dataset(wanted.dataset, None, "train", None) if wanted.dataset else texts.embedded()
        request = cache_request.Request(
            ctx_len=wanted.ctx_len,
            bos=CacheConfig.bos,
            keep_special=CacheConfig.keep_special,
            heldout=CacheConfig.heldout,
            dtype=DTYPES[CacheConfig.dtype],
            storage=DTYPES[CacheConfig.dtype],
            tokens=None,
            max_norm=wanted.max_norm,
        )
        (self.hook,) = cache_request.hook_names([hook or CacheConfig.hook], source)
        plan = request.plan(self.hook, source, text.as_input())
        console.say(f"no cache: {source.id} computes activations of {text.name} while training")
        self.prepared: Prepared = cache_request.prepare(request, source, text, [self.hook])
        self.d_in = self.prepared.widths[self.hook]
        self.name = f"{source.id} on {text.name}"
        self.inputs, self.parents = list(plan.inputs), []
        self.options = {"live": dict(plan.options)}

    def n_rows(self) -> int:
        return self.prepared.counts()[TRAIN]["rows"]

    def model(self) -> dict[str, Any]:
        site = self.prepared.sites[self.hook]
        names = {"hook_name": site.hook_name, "hf_hook_name": site.hf_hook_name, "width": self.d_in}
        return {**self.prepared.source.reference, **names}

    def rows(self, seed: int, device: str) -> Rows:
        from saetool.engines.live import LiveReader
        from saetool.engines.model import load
        from saetool.engines.sites import find_site

        p = self.prepared
        lm = load(p.source, p.config, p.tokenizer, device=device, dtype=p.request.dtype)
        return LiveReader(lm, find_site(lm.model, self.hook), p, seed=seed)
