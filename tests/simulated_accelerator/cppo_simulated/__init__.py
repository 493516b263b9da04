"""A simulated accelerator for cppo: `--backend simulated`.

PyTorch's spare device type under a name of its own, with memory that is counted, generators,
autocast and collectives. Its tensors are no CPU tensors to PyTorch, though `device.cpp` computes
on the CPU. Nothing here is known to cppo but through `probe()`.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from functools import cache
from types import ModuleType

import torch
import torch.distributed as dist

from cppo.attention import usable
from cppo.device import Backend, accelerator_memory
from cppo_simulated import _device

NAME = "simulated"
COLLECTIVES = "simulated_collectives"


def probe() -> Backend:
    """The simulated backend; there is always a device."""
    _register()
    return Backend(
        device=NAME,
        attention=usable(("sdpa", "eager"), NAME, torch.float32),
        precision=(torch.float32, torch.bfloat16),
        collectives=COLLECTIVES,
        memory=accelerator_memory(NAME),
    )


@cache
def _register() -> None:
    """Tells PyTorch of the device; once a process, as PyTorch allows."""
    _device.register_hooks()
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend()
    dist.Backend.register_backend(COLLECTIVES, _join, devices=[NAME])


def _module() -> ModuleType:
    """What PyTorch looks up as `torch.simulated`."""
    module = ModuleType(f"torch.{NAME}")
    module.is_available = lambda: True
    module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.current_device = _device.current_device
    module.device_count = _device.device_count
    module.set_device = lambda device: _device.set_device(torch.device(NAME, device).index)
    module.manual_seed_all = lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module.get_device_name = lambda device=None: "simulated device (computes on the CPU)"
    sys.modules[module.__name__] = module
    return module


def _join(store: dist.Store, rank: int, size: int, timeout: timedelta) -> object:
    return _device.collectives(dist.ProcessGroupGloo(store, rank, size, timeout), rank, size)
