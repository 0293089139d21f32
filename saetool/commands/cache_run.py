"""The work of ``saetool cache``: what is there already, loading, the pass itself, the records at its end."""

import dataclasses
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saetool.artifacts import cache as cache_files
from saetool.artifacts import header as h
from saetool.artifacts import writing
from saetool.artifacts.cache_writer import CacheWriter, check_output, interrupted_layout, partial_folder
from saetool.config import CacheConfig
from saetool.console import Console, Interruption
from saetool.errors import ArtifactError, BackendError, ConfigError
from saetool.options import resolve_device

if TYPE_CHECKING:
    from saetool.engines import cache as engine
    from saetool.engines import cache_request
    from saetool.engines import tensors as matrices
    from saetool.engines.model import LanguageModel
    from saetool.engines.processes import Processes
    from saetool.engines.text import Texts

HEAD_START = 2.0
"""Seconds of tokenising before the first forward pass: short texts are then known whole."""


@dataclass(frozen=True)
class Running:
    """How the command runs, whatever it makes."""

    console: Console
    device: str
    overwrite: bool
    resume: bool
    dry_run: bool
    log: Path | None


@dataclass(frozen=True)
class Output:
    """One cache that is wanted."""

    hook: str
    path: Path
    plan: h.Plan


# --- text ------------------------------------------------------------------------------------------------------


def text(
    request: "cache_request.Request",
    hooks: list[str],
    model: str | None,
    find_texts: "Callable[[], Texts]",
    pattern: str,
    running: Running,
) -> None:
    """Make the caches of ``hooks`` that are not there yet."""
    from saetool.engines import cache_request
    from saetool.engines.model import find_model
    from saetool.engines.processes import join

    processes, device = join(resolve_device(running.device))
    if not processes.leads:
        running = dataclasses.replace(running, console=Console(quiet=True))
    console = running.console
    source = find_model(model)
    if model is None:
        console.say(f"no --model given: {source.id}, the embedded one")
    texts = find_texts()
    if texts.embedded:
        console.say(f"no text given: {texts.name}, the embedded corpus")
    names = cache_request.hook_names(hooks, source)
    about = texts.as_input()
    outputs = [Output(n, Path(pattern.replace("{hook}", n)), request.plan(n, source, about)) for n in names]
    wanted = []
    for output in outputs:
        check_output(output.path)
        if not writing.up_to_date(output.path, output.plan, overwrite=running.overwrite):
            wanted.append(output)
    processes.wait()  # before any of them is made
    if wanted:
        prepared = cache_request.prepare(request, source, texts, [output.hook for output in wanted])
        with closing(prepared.corpus):
            run = _Pass(prepared, wanted, device, running, processes)
            if running.dry_run:
                console.plan(run.describe())
                return
            run.go()
    if processes.leads:
        for output in outputs:
            _emit(console, output.path, fresh=output in wanted)
    processes.leave()


def _emit(console: Console, path: Path, *, fresh: bool) -> None:
    found = cache_files.open_cache(path)
    console.emit(found.header, path, found.sha256, {**_by_split(found.splits), **found.statistics}, fresh=fresh)


def _by_split(splits: dict[str, dict[str, int]]) -> dict[str, int]:
    return {f"{name}_{split}": n for split, counts in splits.items() for name, n in counts.items()}


class _Pass:
    """One pass over the text, for one or more caches."""

    def __init__(
        self,
        prepared: "cache_request.Prepared",
        outputs: list[Output],
        device: str,
        running: Running,
        processes: "Processes",
    ) -> None:
        self.prepared, self.outputs, self.device, self.running, self.processes = (
            prepared,
            outputs,
            device,
            running,
            processes,
        )
        self.console = running.console

    def _load(self) -> "LanguageModel":
        from saetool.engines.model import load

        p = self.prepared
        return load(p.source, p.config, p.tokenizer, device=self.device, dtype=p.request.dtype)

    def _batch_size(self, lm: "LanguageModel") -> int:
        """Tokens per forward pass: as asked for, as unfinished work has it, or from memory."""
        import torch

        from saetool.engines.memory import batch_tokens

        request = self.prepared.request
        begun = [interrupted_layout(o.path, o.plan) for o in self.outputs] if self.running.resume else []
        earlier = next((int(layout) for layout in begun if layout), None)
        size = request.batch_size or earlier
        if size is None:
            size = batch_tokens(self.prepared.config, request.ctx_len, getattr(torch, request.dtype), lm.device)
        return self.processes.agree(size)

    def describe(self) -> dict[str, Any]:
        """What would be done, how large it would be and how long it would take."""
        from saetool.engines import cache as engine
        from saetool.engines.sites import find_site

        p = self.prepared
        counts = p.counts()
        lm = self._load()
        size = self._batch_size(lm)
        per_batch = max(size // p.request.ctx_len, 1)
        rate = engine.probe(lm, p, [find_site(lm.model, o.hook) for o in self.outputs], per_batch)
        total = sum(c["tokens"] for c in counts.values())
        rows = sum(c["rows"] for c in counts.values())
        sites = [f"{site.hook_name} = {site.hf_hook_name}, width {p.widths[hook]}" for hook, site in p.sites.items()]
        shards = 0
        for output in self.outputs:
            step = engine.contexts_per_shard(p, output.hook, per_batch, CacheConfig.shard_bytes)
            shards += sum(-(-c["contexts"] // step) for c in counts.values())
        return {
            "output": ", ".join(str(o.path) for o in self.outputs),
            "model": f"{p.source.id} ({p.source.revision})",
            "site": "; ".join(sites),
            "text": p.text,
            **dataclasses.asdict(p.corpus.counts),
            **_by_split(counts),
            "storage": p.request.storage,
            "batch_size": size,
            "shards": shards,
            "bytes": rows * sum(p.row_bytes(o.hook) for o in self.outputs),
            "tokens_per_second": round(rate, 1),
            "minutes": round(total / rate / 60, 2),
        }

    def go(self) -> None:
        """Load the weights, fill the shards that are missing, write the manifests."""
        from saetool.engines import cache as engine
        from saetool.engines.sites import find_site

        p, processes = self.prepared, self.processes
        lm = self._load()
        size = self._batch_size(lm)
        per_batch = max(size // p.request.ctx_len, 1)
        complete = p.corpus.read_on(HEAD_START)
        self._check_space()
        with ExitStack() as stack:
            jobs = []
            if not processes.leads:
                processes.wait()  # the leader makes the folders
            for output in self.outputs:
                writer = CacheWriter(
                    output.path,
                    output.plan,
                    resume=self.running.resume,
                    storage=p.request.storage,
                    layout=str(size),
                    leader=processes.leads,
                )
                stack.callback(writer.close)
                per_shard = engine.contexts_per_shard(p, output.hook, per_batch, CacheConfig.shard_bytes)
                jobs.append(engine.Job(output.hook, find_site(lm.model, output.hook), writer, per_shard))
            if processes.leads:
                processes.wait()
            limits = processes.agree(engine.norm_limits(lm, p, jobs, per_batch))
            for job, limit in zip(jobs, limits, strict=True):
                job.limit = limit
            total = p.corpus.n_tokens if complete else p.request.tokens
            left = engine.remaining(p, jobs, per_batch, processes) if complete else None
            self._work(lm, jobs, per_batch, total, left)
            processes.wait()
            if processes.leads:
                self._finish(lm, jobs, size)
            processes.wait()

    def _work(
        self, lm: "LanguageModel", jobs: "list[engine.Job]", per_batch: int, total: int | None, left: int | None
    ) -> None:
        import torch

        from saetool.engines import cache as engine

        console, processes = self.console, self.processes
        done = 0 if left is None or total is None or processes.size > 1 else total - left
        where = " and ".join(job.site.hf_hook_name for job in jobs)
        shared = f", {processes.size} processes" if processes.size > 1 else ""
        console.say(
            (f"{total:,} tokens" if total is not None else "tokens")
            + f" through {where} on {self.device}{shared}"
            + (f", {done:,} done" if done else "")
        )
        if self.prepared.request.bos and self.prepared.bos_id is None:
            console.say("the tokenizer has no BOS token: contexts begin with text")
        started, read = time.monotonic(), 0
        work = engine.write(lm, self.prepared, jobs, per_batch, processes)
        bar = left if processes.size > 1 else total
        try:
            with closing(work), Interruption() as stop, console.progress("cache", bar, "tokens", done) as advance:
                for n in work:
                    read += n
                    advance(n)
                    if stop.requested:
                        console.say("stopped; the same command goes on from the last whole shard")
                        raise KeyboardInterrupt
        except torch.OutOfMemoryError:
            raise BackendError(
                f"out of memory on {self.device} with {per_batch * self.prepared.request.ctx_len} tokens a pass",
                f"--batch-size {max(per_batch // 2, 1) * self.prepared.request.ctx_len}",
            ) from None
        _write_log(self.running.log, self.outputs, read, time.monotonic() - started, self.device)

    def _finish(self, lm: "LanguageModel", jobs: "list[engine.Job]", size: int) -> None:
        from saetool.engines.model import vocabulary

        p = self.prepared
        counts, strings = p.counts(), vocabulary(lm.tokenizer)
        if not counts[cache_files.HELDOUT]["rows"] and p.request.heldout:
            n = p.corpus.counts.documents
            self.console.say(f"warning: nothing is held out ({n} document{'s' * (n > 1)}): give more documents")
        for output, job in zip(self.outputs, jobs, strict=True):
            job.writer.refresh()
            model = {
                **lm.reference,
                "hook_name": job.site.hook_name,
                "hf_hook_name": job.site.hf_hook_name,
                "width": p.widths[output.hook],
            }
            config = {
                **p.manifest(output.hook, size),
                **_kept_by_norm(p.request.max_norm, job.limit, counts, job.writer),
            }
            header = output.plan.header(config=config, model=model, dtype=p.request.dtype)
            job.writer.finish(header, _stored(counts, job.writer), strings, job.offset)

    def _check_space(self) -> None:
        """Raise where the disk is too small for what is known to come."""
        if self.prepared.corpus.complete and self.processes.leads:
            rows = sum(c["rows"] for c in self.prepared.counts().values())
            for output in self.outputs:
                check_space(output.path, rows * self.prepared.row_bytes(output.hook))


def _stored(splits: dict[str, dict[str, int]], writer: CacheWriter) -> dict[str, dict[str, int]]:
    """``splits`` with the rows that were written: some may have been dropped by their norm."""
    return {name: {**counts, "rows": writer.rows(name)} for name, counts in splits.items()}


def _kept_by_norm(
    max_norm: float | None, limit: float | None, splits: dict[str, dict[str, int]], writer: CacheWriter
) -> dict[str, object]:
    """What the manifest says of rows dropped by their norm."""
    if limit is None:
        return {}
    dropped = sum(counts["rows"] - writer.rows(name) for name, counts in splits.items())
    return {"max_norm": max_norm, "norm_limit": limit, "rows_dropped_by_norm": dropped}


def check_space(out: Path, needed: int) -> None:
    """Raise ``ArtifactError`` if ``needed`` bytes do not fit beside ``out``; unfinished work there counts as room."""
    partial = partial_folder(out)
    there = sum(f.stat().st_size for f in partial.iterdir()) if partial.is_dir() else 0
    free = shutil.disk_usage(Path(os.path.realpath(out)).parent).free
    if needed > free + there:
        raise ArtifactError(
            f"{out}: needs {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free there",
            "use fewer --tokens, a smaller --store, or another output with -o",
        )


def _write_log(log: Path | None, outputs: list[Output], tokens: int, seconds: float, device: str) -> None:
    if log is None:
        return
    import torch

    record = {
        "verb": "cache",
        "out": [str(output.path) for output in outputs],
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    try:
        with open(log, "a") as file:
            file.write(h.canonical(record) + "\n")
    except OSError as error:
        raise ArtifactError(f"--log {log}: cannot be written ({error.strerror})") from None


# --- tensors ---------------------------------------------------------------------------------------------------


def tensors(paths: list[str], request: "matrices.Request", out: Path, running: Running) -> None:
    """Make a cache of matrices that are there already."""
    from saetool.engines import tensors as engine

    if "{hook}" in str(out):
        raise ConfigError(f"-o {out}: tensors have no hook")
    check_output(out)
    console = running.console
    source = engine.open_source(paths, request)
    plan = source.plan()
    if writing.up_to_date(out, plan, overwrite=running.overwrite):
        _emit(console, out, fresh=False)
        return
    split = engine.Split.of(source)
    counts = split.counts(source)
    per_shard = max(CacheConfig.shard_bytes // (source.d_in * max(cache_files.STORAGE[source.storage], 2)), 1)
    if running.dry_run:
        about = {"output": str(out), "source": source.name, "width": source.d_in, "storage": source.storage}
        console.plan({**about, **_by_split(counts), "bytes": source.n_rows * source.row_bytes})
        return
    check_space(out, source.n_rows * source.row_bytes)
    writer = CacheWriter(out, plan, resume=running.resume, storage=source.storage)
    with closing(writer):
        limit = engine.norm_limit(source)
        work = engine.write(source, split, writer, per_shard, limit)
        with closing(work), Interruption() as stop, console.progress("cache", source.n_rows, "rows") as advance:
            for n in work:
                advance(n)
                if stop.requested:
                    console.say("stopped; the same command goes on from the last whole shard")
                    raise KeyboardInterrupt
        config = {
            "source": engine.SCHEMA,
            "d_in": source.d_in,
            "files": [item.name for item in source.inputs],
            "ids": source.ids is not None,
            "center": request.center,
            "heldout": request.heldout,
            **_kept_by_norm(request.max_norm, limit, counts, writer),
        }
        model = {"id": None, "hook_name": source.name, "hf_hook_name": source.name, "width": source.d_in}
        header = plan.header(config=config, model=model, dtype="float32")
        writer.finish(header, _stored(counts, writer), None)
    _emit(console, out, fresh=True)
