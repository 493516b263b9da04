"""What the machine is: the facts that a report is worthless without."""

from __future__ import annotations

import hashlib
import os
import platform
from importlib.metadata import distributions, version
from pathlib import Path

import torch

import cppo
from cppo.device import Backend, claim_device

PACKAGES = ("torch", "transformers", "triton", "flash", "peft", "numpy", "pytorch")  # and relatives
VARIABLES = ("_VISIBLE_DEVICES", "_ALLOC_CONF", "_NUM_THREADS", "_WORKSPACE_CONFIG")


def describe(backend: Backend) -> dict[str, str]:
    """Facts by name, for people; the same on each machine, as far as it has them."""
    device = claim_device(backend.device)
    facts = {
        "cppo": version("cppo"),
        "code": _code(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": f"{_processor()}, {os.cpu_count()} logical cores",
        "device": _device(device, backend),
        "threads": str(torch.get_num_threads()),
        "attention in groups": _in_groups(backend),
    }
    if properties := _properties(device):
        facts["device properties"] = properties
    builds = {name: build for name, build in vars(torch.version).items() if _is_build(name, build)}
    facts["PyTorch is built for"] = ", ".join(f"{n} {b}" for n, b in builds.items()) or "the CPU"
    facts |= {
        found.name: found.version
        for found in sorted(distributions(), key=lambda each: each.name.lower())
        if found.name.lower().startswith(PACKAGES)
    }
    facts |= {n: os.environ[n] for n in sorted(os.environ) if n.endswith(VARIABLES)}
    return facts


def _code() -> str:
    """A digest of the library's source, backends aside: where it differs, other code ran."""
    digest, root = hashlib.blake2b(digest_size=6), Path(cppo.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _is_build(name: str, build: object) -> bool:
    return isinstance(build, str) and not name.startswith("_") and "version" not in name


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _device(device: torch.device, backend: Backend) -> str:
    """Its name, number and memory."""
    if device.type == "cpu":
        return "cpu"
    count = torch.accelerator.device_count()
    name = getattr(torch.get_device_module(device), "get_device_name", lambda index: device.type)
    free = backend.memory.headroom_bytes() / 2**30
    return f"{count} x {name(device.index)}, {free:.0f} GiB free"


def _in_groups(backend: Backend) -> str:
    part = backend.partial_attention
    precision = ", ".join(str(d).removeprefix("torch.") for d in part.precision) if part else ""
    return f"in parts in {precision}, else under a mask" if precision else "under a mask"


def _properties(device: torch.device) -> str:
    """What the device's module tells of it, driver and architecture included, in its words."""
    module = torch.get_device_module(device)
    known = device.type != "cpu" and hasattr(module, "get_device_properties")
    return str(module.get_device_properties(device.index)) if known else ""
