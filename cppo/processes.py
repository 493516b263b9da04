"""The processes of a run: each on a device of its own, joined over the backend's collectives.

This is the one place that places and wraps models, for every backend alike: nothing else asks how
many processes there are, or what they compute on. `torchrun` starts them; one is started by hand.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cppo.device import Backend, claim_device

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Processes:
    """This process among those of its run.

    Joins them where several were launched and it is not to stay `alone`; scales the loss where
    float16 is computed in.
    Raises ValueError where the environment is no launcher's, where PyTorch does not know the
    backend's collectives, and where processes are on devices of several types.
    """

    def __init__(
        self,
        backend: Backend,
        precision: torch.dtype,
        *,
        timeout_seconds: float = 7200.0,
        alone: bool = False,
    ) -> None:
        self.rank, self.world = (0, 1) if alone else _launched()
        self.device = claim_device(backend.device)
        self._scaler = torch.amp.GradScaler(backend.device, enabled=precision is torch.float16)
        self._joined = self.world > 1 and not dist.is_initialized()
        if self._joined:
            _join(backend, timedelta(seconds=timeout_seconds))
            self._agree_on_devices()

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.rank == 0

    def close(self) -> None:
        if self._joined:
            dist.destroy_process_group()

    def _agree_on_devices(self) -> None:
        kinds = self.gather([self.device.type])
        if len(set(kinds)) > 1:
            found = ", ".join(f"{rank} on {kind}" for rank, kind in enumerate(kinds))
            raise ValueError(
                f"processes are on different devices (process {found}): start no more on a machine "
                "than it has devices, and name the backend instead of --backend auto"
            )

    # --- what processes tell each other ----------------------------------------------------------

    def gather(self, values: list[Any]) -> list[Any]:
        """The lists of all processes, joined in order of rank."""
        if self.world == 1:
            return values
        lists: list[list[Any]] = [[] for _ in range(self.world)]
        dist.all_gather_object(lists, values)
        return [value for each in lists for value in each]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors, on this process's device."""
        total = tensor.to(self.device, copy=True)
        if self.world > 1:
            dist.all_reduce(total)
        return total

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process does what is within before the others do: they find it done."""
        if not self.main:
            self.gather([])
        yield
        if self.main:
            self.gather([])

    # --- a model in several processes ------------------------------------------------------------

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module, its gradients averaged over processes where there are several."""
        if self.world == 1:
            return module
        return DistributedDataParallel(module, broadcast_buffers=False)

    def no_sync(self, module: nn.Module) -> AbstractContextManager[None]:
        """Gradients are summed up here and not averaged yet."""
        if isinstance(module, DistributedDataParallel):
            return module.no_sync()
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def clip(
        self, optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], max_norm: float
    ) -> Tensor:
        """Clips the gradients to a norm; returns what their norm was."""
        self._scaler.unscale_(optimizer)
        return nn.utils.clip_grad_norm_(list(parameters), max_norm)

    def step(self, optimizer: torch.optim.Optimizer, *, finite: bool) -> None:
        """Steps where gradients are finite in all processes; else lowers float16's loss scale."""
        if finite:
            self._scaler.step(optimizer)
        self._scaler.update()

    @property
    def loss_scale(self) -> float:
        """What float16 multiplies the loss by; 1 in other precisions."""
        return float(self._scaler.get_scale())

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of this: the loss scale."""
        return dict(self._scaler.state_dict())

    def restore(self, state: dict[str, Any]) -> None:
        if state:
            self._scaler.load_state_dict(state)


def _launched() -> tuple[int, int]:
    """Rank and number of processes, as the launcher says."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return 0, 1
    if missing := [name for name in LAUNCHER if name not in os.environ]:
        raise ValueError(
            f"WORLD_SIZE is {world}, but {' and '.join(missing)} is not set: each process would "
            f"train by itself. Start with torchrun --nproc-per-node {world}, or unset WORLD_SIZE"
        )
    return int(os.environ["RANK"]), world


def _join(backend: Backend, timeout: timedelta) -> None:
    """Objects travel between CPUs, tensors between the devices they are on."""
    name = backend.collectives
    if name not in dist.Backend.backend_list or not dist.is_backend_available(name):
        raise ValueError(
            f"processes on {backend.device!r} are joined by {name!r}, which this PyTorch "
            f"({torch.__version__}) does not know: install a build that has it, or start one "
            "process alone"
        )
    by_device = {"cpu": "gloo", backend.device: name}
    dist.init_process_group(
        ",".join(f"{device}:{library}" for device, library in by_device.items()), timeout=timeout
    )
