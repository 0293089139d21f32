"""What a command says: data on standard output, words and progress bars on standard error."""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from saetool.artifacts.header import Header, finite


class Interruption:
    """Ctrl-C or SIGTERM while work is under way: ``requested`` turns true, and the work stops at its next safe point.

    A second signal interrupts at once. Use as a context manager; the old handlers come back at its end. ``said`` is
    written to standard error at the first signal.
    """

    def __init__(self, said: str = "") -> None:
        self.requested = False
        self._said = said
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if self._said:
            os.write(2, f"{self._said}\n".encode())  # print is not made to be called within itself


class Advance(Protocol):
    """Moves a progress bar on by ``n``; ``note`` is shown beside it (a loss, a rate)."""

    def __call__(self, n: int = 1, note: str = "") -> None: ...


class Console:
    """Standard error for people (nothing with ``quiet``), standard output for data (a record with ``as_json``)."""

    def __init__(self, *, quiet: bool = False, as_json: bool = False) -> None:
        self.quiet = quiet
        self.as_json = as_json

    def say(self, text: str) -> None:
        """One plain line on standard error."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """A small table on standard error: drawn on a terminal, tab-separated lines elsewhere."""
        if self.quiet:
            return
        if not sys.stderr.isatty():
            self.say(title)
            for row in [columns, *rows]:
                self.say("\t".join(row))
            return
        from rich.console import Console as RichConsole
        from rich.table import Table

        drawn = Table(title=title, title_justify="left")
        for i, column in enumerate(columns):
            drawn.add_column(column, justify="left" if i == 0 else "right")
        for row in rows:
            drawn.add_row(*row)
        RichConsole(stderr=True).print(drawn)

    @contextmanager
    def progress(self, label: str, total: int | None, unit: str = "it", done: int = 0) -> Iterator[Advance]:
        """A progress bar with rate and time left; without a terminal, a plain line now and then.

        ``done`` of ``total`` are finished already (a resumed run). ``total`` is None where it is not known.
        """
        if self.quiet:
            yield lambda n=1, note="": None
        elif not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
            yield _plain_progress(self, label, total, unit, done)
        else:
            yield from _drawn_progress(label, total, unit, done)

    def emit(self, header: Header, path: Path, sha256: str, metrics: Mapping[str, Any], *, fresh: bool = True) -> None:
        """The command's data: the path written, or with ``as_json`` one record {kind, path, sha256, key, metrics}."""
        if str(path) == "-":
            return
        if not fresh:
            self.say(f"{path}: up to date")
        if self.as_json:
            kind = header.schema.partition("/")[2].partition("@")[0]
            record = {
                "kind": kind,
                "path": str(path),
                "sha256": sha256,
                "key": header.key,
                "metrics": dict(metrics),
            }
            print(json.dumps(finite(record), sort_keys=True, ensure_ascii=False, allow_nan=False), flush=True)
        else:
            print(path, flush=True)

    def plan(self, steps: Mapping[str, Any]) -> None:
        """What ``--dry-run`` would have done: lines on standard output, or one record with ``as_json``."""
        if self.as_json:
            print(json.dumps(finite(dict(steps)), sort_keys=True, ensure_ascii=False, default=str), flush=True)
            return
        for name, value in steps.items():
            print(f"{name}: {value}", flush=True)


def _plain_progress(console: Console, label: str, total: int | None, unit: str, done: int) -> Advance:
    import time

    start = last = time.monotonic()
    count = done

    def advance(n: int = 1, note: str = "") -> None:
        nonlocal count, last
        count += n
        now = time.monotonic()
        if now - last >= 20 or (total is not None and count >= total > count - n):
            rate = (count - done) / max(now - start, 1e-9)
            end, of = f" in {now - start:.0f} s", "" if total is None else f"/{total:,}"
            if total is not None and count < total:
                end = f", {(total - count) / max(rate, 1e-9):.0f} s left"
            console.say(f"{label}: {count:,}{of} {unit}, {rate:,.0f} {unit}/s{end}{' ' + note if note else ''}")
            last = now

    return advance


def _drawn_progress(label: str, total: int | None, unit: str, done: int) -> Iterator[Advance]:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
    from rich.table import Column
    from rich.text import Text

    class State(ProgressColumn):
        """Done, of how many, rate, time left."""

        def render(self, task: Any) -> Text:
            text = f"{task.completed:,.0f}" + (f"/{task.total:,.0f}" if task.total is not None else "")
            if task.speed:
                text += f" · {task.speed:,.0f} {unit}/s"
            if task.speed and task.total is not None:
                seconds = int((task.total - task.completed) / task.speed)
                text += f" · {seconds // 60}:{seconds % 60:02} left"
            return Text(text, no_wrap=True)

    one_line = Column(no_wrap=True, overflow="ellipsis")
    with Progress(
        TextColumn("{task.description}", table_column=one_line),
        BarColumn(bar_width=16),
        State(table_column=Column(no_wrap=True, ratio=None)),
        TextColumn("{task.fields[note]}", table_column=one_line),
        console=RichConsole(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task(label, total=total, completed=done, note="")

        def advance(n: int = 1, note: str = "") -> None:
            if note:
                bar.update(task, advance=n, note=note)
            else:
                bar.update(task, advance=n)

        yield advance
