"""What joins processes: sums, lists and gradients over them, and what cannot be joined."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import BACKEND
from torch import nn

from cppo.device import choose
from cppo.processes import LAUNCHER, Processes

pytestmark = pytest.mark.device

# Each of two processes: what it is told, by whom first, and the gradient of its half of a batch.
# A process that finds no device of its own and would go on with the CPU's.
ASTRAY = """
import os, sys, torch
from pathlib import Path
from dataclasses import replace
import cppo.processes
from cppo.device import choose

backend = choose("cpu")
if os.environ["RANK"] == "1":
    backend = replace(backend, device="meta")
    cppo.processes.claim_device = torch.device
try:
    cppo.processes.Processes(backend, torch.float32)
except ValueError as error:
    (Path(sys.argv[1]) / os.environ["RANK"]).write_text(str(error))
"""

JOINED = """
import os, sys, time
from pathlib import Path
import torch
from cppo.device import choose
from cppo.processes import Processes

folder = Path(sys.argv[1])
processes = Processes(choose(os.environ["CPPO_TEST_BACKEND"]), torch.float32, timeout_seconds=5)
assert processes.world == 2
assert processes.main == (processes.rank == 0)
assert processes.gather([processes.rank] * (1 + processes.rank)) == [0, 1, 1]
assert processes.sum(torch.tensor([1.0, processes.rank])).tolist() == [2.0, 1.0]

with processes.main_first():
    if processes.main:
        time.sleep(1)
        (folder / "made").touch()
    assert (folder / "made").exists()

torch.manual_seed(0)
module = torch.nn.Linear(3, 1).to(processes.device)
batch = torch.randn(4, 3).to(processes.device)
module(batch).square().mean().backward()
whole = module.weight.grad.clone()
module.zero_grad()
wrapped = processes.wrap(module)
first, second = batch[processes.rank :: 2]
with processes.no_sync(wrapped):
    processes.backward(wrapped(first[None]).square().mean() / 2)
processes.backward(wrapped(second[None]).square().mean() / 2)
torch.testing.assert_close(module.weight.grad, whole)

if processes.rank == 1:
    time.sleep(60)  # longer than the other waits
try:
    processes.gather([0])
except RuntimeError:
    (folder / "missed").touch()
os._exit(1)
"""


def launch(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Two processes of a script."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, str(script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.usefixtures("two_devices")
def test_two_processes_share_what_they_know_and_miss_each_other(tmp_path: Path) -> None:
    script = tmp_path / "joined.py"
    script.write_text(JOINED)
    ended = launch(script, str(tmp_path))
    assert (tmp_path / "missed").exists(), ended.stderr[-3000:]


def test_processes_on_devices_of_several_types_are_refused(tmp_path: Path) -> None:
    script = tmp_path / "astray.py"
    script.write_text(ASTRAY)
    ended = launch(script, str(tmp_path))
    for rank in "01":
        assert (tmp_path / rank).exists(), ended.stderr[-3000:]
        said = (tmp_path / rank).read_text()
        assert said.startswith("processes are on different devices (process 0 on cpu, 1 on meta)")


def test_one_process_needs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    processes = Processes(choose(os.environ[BACKEND]), torch.float32)
    assert (processes.rank, processes.world, processes.main) == (0, 1, True)
    assert processes.device.type == choose(os.environ[BACKEND]).device
    assert processes.gather([1, 2]) == [1, 2]
    assert processes.sum(torch.tensor([3.0])).tolist() == [3.0]
    assert processes.loss_scale == 1
    module = nn.Linear(2, 2)
    assert processes.wrap(module) is module
    with processes.main_first(), processes.no_sync(module):
        pass
    assert not torch.distributed.is_initialized()
    processes.close()


def test_processes_that_were_not_launched_as_such_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="WORLD_SIZE is 4, but RANK and LOCAL_RANK") as error:
        Processes(choose("cpu"), torch.float32)
    assert "torchrun --nproc-per-node 4" in str(error.value)


@pytest.mark.parametrize("collectives", ["sccl", "mpi"])
def test_collectives_that_this_pytorch_does_not_know_are_refused(
    monkeypatch: pytest.MonkeyPatch, collectives: str
) -> None:
    values = ("0", "2", "0", "127.0.0.1", "29999")
    for name, value in zip(LAUNCHER, values, strict=True):
        monkeypatch.setenv(name, value)
    backend = replace(choose("cpu"), collectives=collectives)
    with pytest.raises(ValueError, match=f"joined by '{collectives}', which this PyTorch"):
        Processes(backend, torch.float32)


def test_an_overflow_in_float16_lowers_the_loss_scale_and_leaves_the_weights() -> None:
    processes = Processes(choose(os.environ[BACKEND]), torch.float16)
    weight = torch.ones(2, device=processes.device, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scale = processes.loss_scale
    assert scale > 1

    def step(factor: float) -> float:
        optimizer.zero_grad()
        processes.backward((weight * factor).sum())
        norm = processes.clip(optimizer, [weight], max_norm=1e9)
        processes.step(optimizer, finite=bool(norm.isfinite()))
        return float(norm)

    assert step(3e38) == float("inf")
    assert weight.tolist() == [1.0, 1.0]
    assert processes.loss_scale == scale / 2
    resumed = Processes(choose(os.environ[BACKEND]), torch.float16)
    resumed.restore(processes.state())
    assert resumed.loss_scale == scale / 2
    assert step(0.25) == pytest.approx(0.25 * 2**0.5)
    assert weight.tolist() == [0.75, 0.75]
    assert processes.loss_scale == scale / 2
