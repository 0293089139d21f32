"""The child's side of `bench_train.py`: one trainer in its own process and interpreter, asked for steps line by line.

The parent sends the setting as one JSON line and gets the versions back; then `{"steps": n}` or `{"save": path}`, each
answered by one JSON line on the file descriptor named as first argument: standard output belongs to the libraries. End
of input ends the process.

This file runs in the peers' interpreters: it needs torch, numpy and safetensors, and knows nothing of saetool.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every subject is told. ``None``: the subject's own default."""

    arch: str
    d_in: int
    latents: int
    k: int
    batch: int
    steps: int
    """Length of the run, for schedules."""
    lr: float | None
    warmup: int
    """Steps of linear rise of the learning rate."""
    decay: int
    """Steps, at the end, of linear fall to 0."""
    dead_after: int | None
    """Tokens without firing after which a latent is dead."""
    seed: int
    device: str
    threads: int
    rows: str
    """A ``.npy`` file of inputs, float32 [n, d_in]."""
    order: str | None
    """A ``.npy`` file of row numbers, ``batch`` for each step; None: consecutive rows, again and again."""


class Subject(Protocol):
    """One trainer with its SAE."""

    def step(self, x: Tensor) -> None:
        """One whole training step: forward, backward, optimizer, bookkeeping."""

    def weights(self) -> dict[str, Tensor]:
        """W_enc [d_in, F], b_enc, W_dec [F, d_in], b_dec: z = act((x − b_dec) W_enc + b_enc), x̂ = z W_dec + b_dec."""


def serve(make: Callable[[Setting], Subject], packages: tuple[str, ...]) -> None:
    """Build the subject and answer requests until the parent closes the pipe."""
    answers = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    setting = Setting(**json.loads(sys.stdin.readline()))
    torch.set_num_threads(setting.threads)
    torch.manual_seed(setting.seed)
    batches = _Batches(setting)
    base = _resident("VmRSS")
    subject = make(setting)
    versions = {name: version(name) for name in (*packages, "torch")}
    answers.write(json.dumps({"versions": versions, "threads": torch.get_num_threads()}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        if "save" in request:
            tensors = {name: t.detach().float().cpu().contiguous() for name, t in subject.weights().items()}
            save_file(tensors, request["save"])
            answer = {"saved": request["save"]}
        else:
            seconds = _timed(subject, batches, request["steps"], setting.device)
            answer = {"seconds": seconds, "peak": _peak(setting.device, base)}
        answers.write(json.dumps(answer) + "\n")


def _timed(subject: Subject, batches: "_Batches", n: int, device: str) -> list[float]:
    """Wall seconds of each of ``n`` steps; fetching the batch is not in them."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again at the present size
    seconds = []
    for _ in range(n):
        x = batches.next()
        _synchronize(device)
        start = time.perf_counter()
        subject.step(x)
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak(device: str, base: int | None) -> int | None:
    """Bytes at the highest point since the last ``_timed``, beyond the interpreter, its libraries and the data."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    high = _resident("VmHWM")
    return None if high is None or base is None else high - base


def _resident(field: str) -> int | None:
    """``VmRSS`` or ``VmHWM`` of this process in bytes; None where /proc does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(field))


class _Batches:
    """The batches every subject sees, in the same order."""

    def __init__(self, setting: Setting) -> None:
        self._rows = np.load(setting.rows, mmap_mode="r")
        self._order = None if setting.order is None else np.load(setting.order, mmap_mode="r")
        self._size, self._device, self._step = setting.batch, setting.device, 0

    def next(self) -> Tensor:
        start = self._step * self._size
        self._step += 1
        if self._order is None:
            start %= len(self._rows) - self._size + 1
            rows = self._rows[start : start + self._size]
        else:
            rows = self._rows[self._order[start : start + self._size]]
        return torch.from_numpy(np.array(rows)).to(self._device)
