"""The subjects of `bench_train.py`: which there are, and each in its own process."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DRIVERS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class Row:
    """One subject of a table."""

    name: str
    driver: str
    arch: str
    """As the driver understands it; the evaluator reads the first word of ``selection``."""
    selection: str = ""
    home: str = ""
    """Environment below --peers; empty: this interpreter."""
    environment: Mapping[str, str] = field(default_factory=dict)


MODES: dict[str, dict[str, str]] = {"": {}}
"""saetool's rows: name of a mode → environment variables of its process."""

SAETOOL = tuple(
    Row(f"saetool {arch} {mode}".strip(), "run_saetool.py", arch, arch, environment=variables)
    for mode, variables in MODES.items()
    for arch in ("batchtopk", "topk")
)
SAE_LENS = tuple(Row(f"sae-lens {arch}", "run_sae_lens.py", arch, arch, "sae-lens") for arch in ("batchtopk", "topk"))
DICTIONARY_LEARNING = Row(
    "dictionary-learning batchtopk", "run_dictionary_learning.py", "batchtopk", "batchtopk", "dictionary-learning"
)
SIGNUM, ADAM = (
    Row(f"eai-sparsify topk, {optimizer}", "run_sparsify.py", optimizer, "topk", "eai-sparsify")
    for optimizer in ("signum", "adam")
)
FLOORS = tuple(Row(f"x @ W_enc {dtype}", "run_gemm.py", dtype) for dtype in ("float32", "bfloat16"))
SPEED = (*FLOORS, *SAE_LENS, DICTIONARY_LEARNING, SIGNUM, ADAM, *SAETOOL)
QUALITY = (*SAE_LENS, DICTIONARY_LEARNING, ADAM, *SAETOOL)


class Child:
    """A subject in its process. Use as a context manager: leaving it ends the process."""

    def __init__(self, row: Row, setting: Mapping[str, Any], peers: Path | None) -> None:
        self.row = row
        self._setting = setting
        self._peers = peers
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "Child":
        row = self.row
        environment = {**os.environ, "OMP_NUM_THREADS": str(self._setting["threads"]), **row.environment}
        if self._setting["device"] == "cpu":
            environment["SPARSIFY_DISABLE_TRITON"] = "1"  # chosen at import: with triton it runs on no CPU
        if row.home:
            environment.pop("PYTHONPATH", None)
        # Answers have a pipe of their own: libraries print to standard output, some while they are imported.
        reading, writing = os.pipe()
        self._answers = self._open.enter_context(os.fdopen(reading))
        self._log = self._open.enter_context(tempfile.TemporaryFile(mode="w+"))
        self._process = self._open.enter_context(
            subprocess.Popen(
                [interpreter(row, self._peers), str(DRIVERS / row.driver), str(writing)],
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=self._log,
                text=True,
                env=environment,
                pass_fds=[writing],
            )
        )
        os.close(writing)
        self._send({**self._setting, "arch": row.arch})
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()  # ends its input and waits for it

    def about(self) -> dict[str, Any]:
        """Its versions; waits until it is ready. The first thing to ask, and once."""
        return self._receive()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send ``request``, wait for the answer."""
        self._send(request)
        return self._receive()

    def _send(self, request: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: _receive says so
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        """The next answer. Ends the benchmark with the child's last words if it died."""
        answer = self._answers.readline()
        if not answer:
            self._process.wait()
            self._log.seek(0)
            raise SystemExit(f"{self.row.name} failed:\n{''.join(self._log.readlines()[-15:])}")
        return json.loads(answer)


def interpreter(row: Row, peers: Path | None) -> str:
    return sys.executable if not row.home or peers is None else str(peers / row.home / "bin" / "python")


def available(rows: Sequence[Row], peers: Path | None, only: str | None) -> list[Row]:
    """The rows whose environment exists and whose name contains one of ``only``'s comma-separated parts."""
    chosen = []
    for row in rows:
        if only is not None and not any(part in row.name for part in only.split(",")):
            continue
        if row.home and (peers is None or not Path(interpreter(row, peers)).exists()):
            print(f"{row.name}: no environment {row.home}; see peers.sh", file=sys.stderr)
            continue
        chosen.append(row)
    return chosen
