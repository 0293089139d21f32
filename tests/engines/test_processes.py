"""Several processes: they part for good."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PARTING = """
import os

import torch

from saetool.engines import processes

before = set(os.listdir("/proc/self/task"))
group, device = processes.join("cpu", tensors=True)
its = set(os.listdir("/proc/self/task")) - before
weights = torch.nn.Parameter(torch.ones(3))
optimizer = torch.optim.Adam([weights])  # imports much, and some of it would hold the group
weights.grad = torch.ones(3)
optimizer.step()
group.sum_([weights.grad])
assert weights.grad.tolist() == [2.0] * 3
group.leave()
if group.leads:
    print(len(its), len(its & set(os.listdir("/proc/self/task"))))
"""

FAILING = """
import torch

from saetool.engines import processes

group, device = processes.join("cpu")
for i in range(300):
    group.any(False, device)  # the tensor is the thread's, in the end
raise SystemExit(130)
"""


def together(script: Path, text: str) -> subprocess.CompletedProcess[str]:
    """``text`` as a script of two processes."""
    script.write_text(text)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at the system's list of threads")
def test_no_thread_of_the_group_outlives_it(tmp_path: Path) -> None:
    """One that does aborts the process at its end, now and then, after all work is done and written."""
    result = together(tmp_path / "parting.py", PARTING)
    assert result.returncode == 0, result.stderr
    threads, left = map(int, result.stdout.split())
    assert threads > 0 and left == 0


def test_who_fails_says_so_and_does_not_abort(tmp_path: Path) -> None:
    result = together(tmp_path / "failing.py", FAILING)
    assert "exitcode  : 130" in result.stderr
    assert "terminate called" not in result.stderr and "SIGABRT" not in result.stderr
