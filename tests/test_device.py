"""The contract every installed backend must meet, and the rules by which one is chosen.

The contract runs against whatever is installed: on a machine with an accelerator, against it.
What no machine at hand can show is shown with fakes, and those say so in their names.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, PackageNotFoundError, distributions
from pathlib import Path
from typing import Any

import cppo_cpu
import cppo_cuda
import cppo_npu
import cppo_rocm
import cppo_xpu
import pytest
import torch
import torch.distributed as dist

from cppo import cli, device
from cppo.device import Backend, Candidate, Memory, Unavailable
from cppo.processes import LAUNCHER
from cppo.statistics import chunked_token_statistics

ROOT = Path(__file__).parents[1]
BLOCK_BYTES = 200_000_000
ACTIONS = re.compile(r"\b(install|uninstall|check|source|use --backend)\b")

# ---------------------------------------------------------------- the contract

pytestmark = pytest.mark.device
INSTALLED = device.survey()


@pytest.fixture(
    params=[row.backend for row in INSTALLED if row.backend is not None],
    ids=[row.name for row in INSTALLED if row.backend is not None],
)
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


@pytest.mark.parametrize("row", INSTALLED, ids=lambda row: row.name)
def test_a_probe_gives_a_backend_or_says_what_to_do(row: Candidate) -> None:
    if row.backend is None:
        assert isinstance(row.error, Unavailable), row.reason
        assert ACTIONS.search(row.reason), f"names nothing a person can do: {row.reason}"


def test_the_cpu_is_always_usable() -> None:
    assert "cpu" in [row.name for row in INSTALLED if row.backend is not None]


def test_tensors_live_on_the_device(backend: Backend) -> None:
    tensor = torch.arange(4.0, device=backend.device)
    assert tensor.device.type == backend.device
    assert tensor.sum().item() == 6.0


def test_attention_names_are_known_to_transformers_and_end_in_the_safest(backend: Backend) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    assert backend.attention[-1] == "eager"
    assert len(set(backend.attention)) == len(backend.attention)
    assert set(backend.attention[:-1]) <= set(ALL_ATTENTION_FUNCTIONS.valid_keys())


def test_every_precision_multiplies_and_differentiates_to_its_own_rounding(
    backend: Backend,
) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(2, 16, 16, dtype=torch.float64)
    for dtype in backend.precision:
        # The product of the rounded inputs, in float64, is the truth for this precision.
        low_left, low_right = (m.to(backend.device, dtype).requires_grad_() for m in (left, right))
        product = low_left @ low_right
        product.float().sum().backward()
        exact_left, exact_right = (m.to(dtype).double().requires_grad_() for m in (left, right))
        exact = exact_left @ exact_right
        exact.sum().backward()
        tolerance = 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(product.double().cpu(), exact, atol=tolerance, rtol=tolerance)
        assert low_left.grad is not None
        torch.testing.assert_close(
            low_left.grad.double().cpu(), exact_left.grad, atol=tolerance, rtol=tolerance
        )


def test_float32_is_always_offered_and_float16_is_never_the_default(backend: Backend) -> None:
    assert torch.float32 in backend.precision
    assert backend.precision[0] is not torch.float16
    assert len(set(backend.precision)) == len(backend.precision)


def test_collectives_reduce_on_the_device(backend: Backend) -> None:
    dist.init_process_group(backend.collectives, store=dist.HashStore(), rank=0, world_size=1)
    try:
        tensor = torch.tensor([2.0, 3.0], device=backend.device)
        dist.all_reduce(tensor)
        assert tensor.tolist() == [2.0, 3.0]
    finally:
        dist.destroy_process_group()


def test_peak_memory_rises_with_an_allocation_and_falls_after_a_reset(backend: Backend) -> None:
    if backend.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system offers no way to reset a process's peak memory")
    memory = backend.memory
    torch.zeros(1, device=backend.device)
    memory.release()  # what earlier tests left: the release below frees the block alone
    memory.reset_peak()
    before_bytes = memory.peak_bytes()
    block = torch.ones(BLOCK_BYTES, dtype=torch.uint8, device=backend.device)
    held_bytes = memory.peak_bytes()
    assert held_bytes - before_bytes == pytest.approx(BLOCK_BYTES, rel=0.05)
    del block
    # The kernel counts resident pages a little behind, so a peak may waver by some of them.
    assert memory.peak_bytes() == pytest.approx(held_bytes, rel=0.01)
    memory.release()
    memory.reset_peak()
    assert held_bytes - memory.peak_bytes() == pytest.approx(BLOCK_BYTES, rel=0.05)


def test_there_is_headroom_for_what_can_be_allocated(backend: Backend) -> None:
    assert backend.memory.headroom_bytes() > BLOCK_BYTES
    torch.ones(BLOCK_BYTES, dtype=torch.uint8, device=backend.device)


def test_token_statistics_match_float64(backend: Backend) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 8), torch.randn(11, 8)
    targets = torch.tensor([0, 10, 3, 3, 7])
    truth = torch.log_softmax(hidden.double() @ weight.double().T / 0.7, dim=1)
    logprobs, entropy = backend.token_statistics(
        *(tensor.to(backend.device) for tensor in (hidden, weight, targets)), temperature=0.7
    )
    expected = truth[torch.arange(5), targets]
    torch.testing.assert_close(logprobs.double().cpu(), expected, atol=1e-5, rtol=1e-5)
    expected = -(truth.exp() * truth).sum(1)
    torch.testing.assert_close(entropy.double().cpu(), expected, atol=1e-5, rtol=1e-5)


def test_token_statistics_match_float64_from_every_precision_gradients_included(
    backend: Backend,
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(150, 72, generator=generator)
    weight = torch.randn(1100, 72, generator=generator) / 72**0.5
    targets = torch.randint(1100, (150,), generator=generator)
    upstream = torch.randn(2, 150, generator=generator)

    def differentiate(function: Callable[..., Any], where: str, *inputs: torch.Tensor) -> list[Any]:
        leaves = [tensor.to(where).requires_grad_() for tensor in inputs]
        results = function(*leaves, targets.to(where), temperature=0.7)
        weights = [row.to(where, results[0].dtype) for row in upstream]
        gradients = torch.autograd.grad(results, leaves, weights)
        return [tensor.detach().double().cpu() for tensor in (*results, *gradients)]

    # Gradients are rounded to their inputs' type; log-probabilities and entropies are not.
    limits = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}
    for dtype in backend.precision:
        inputs = [tensor.to(dtype) for tensor in (hidden, weight)]
        found = differentiate(backend.token_statistics, backend.device, *inputs)
        wide = [tensor.double() for tensor in inputs]
        truth = differentiate(chunked_token_statistics, "cpu", *wide)
        for a, b, limit in zip(found, truth, (1e-5, 1e-5, *[limits[dtype]] * 2), strict=True):
            assert (a - b).norm() <= limit * b.norm(), dtype


# ---------------------------------------------------------------- the choice, with fake packages

WORKING = """
import torch
from cppo.device import Backend, Memory

def probe():
    memory = Memory(
        peak_bytes=lambda: 0,
        reset_peak=lambda: None,
        release=lambda: None,
        headroom_bytes=lambda: 0,
    )
    return Backend(
        device="{device}",
        attention=("eager",),
        precision=(torch.float32,),
        collectives="gloo",
        memory=memory,
    )
"""
ABSENT = """
from cppo.device import Unavailable

def probe():
    raise Unavailable("no card is plugged in: check the slot")
"""
BROKEN = "raise ImportError('libcard.so: cannot open shared object file')"

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Writes a distribution with one backend entry point to a folder on the import path."""
    monkeypatch.syspath_prepend(tmp_path)
    modules = []

    def write(name: str, source: str, package: str | None = None) -> None:
        package = package or f"fake-{name}"
        module = package.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(source)
        metadata = tmp_path / f"{module}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Name: {package}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[{device.GROUP}]\n{name} = {module}\n")
        modules.append(module)

    yield write
    for module in modules:
        sys.modules.pop(module, None)


@pytest.fixture
def install_fake(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """As `install`, and nothing else is found: the outcome does not hang on this machine."""

    def found() -> list[EntryPoint]:
        entries = [
            entry
            for distribution in distributions(path=[str(tmp_path)])
            for entry in distribution.entry_points
        ]
        return sorted(entries, key=lambda entry: (entry.name, entry.value))

    monkeypatch.setattr(device, "installed", found)
    return install


def test_an_outside_package_adds_hardware_through_its_entry_point(install: Install) -> None:
    install("card", WORKING.format(device="meta"), package="outside-card")
    rows = {row.name: row for row in device.survey()}
    assert rows["card"].backend is not None
    assert rows["card"].origin == "outside-card 1.0 (outside_card)"
    assert rows["cpu"].origin.startswith("cppo ")
    assert device.choose("card").device == "meta"


def test_auto_takes_the_cpu_where_there_is_no_accelerator(
    install_fake: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install_fake("cpu", WORKING.format(device="cpu"))
    install_fake("card", ABSENT)
    with caplog.at_level(logging.INFO):
        assert device.choose("auto").device == "cpu"
    assert "no accelerator is usable here (cppo backends says why)" in caplog.text


def test_auto_takes_the_one_accelerator(
    install_fake: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install_fake("cpu", WORKING.format(device="cpu"))
    install_fake("card", WORKING.format(device="meta"))
    with caplog.at_level(logging.INFO):
        assert device.choose("auto").device == "meta"
    assert "backend card from fake-card 1.0 (fake_card): the only accelerator" in caplog.text


def test_auto_asks_for_a_name_where_there_are_several_accelerators(install_fake: Install) -> None:
    install_fake("cpu", WORKING.format(device="cpu"))
    install_fake("card", WORKING.format(device="meta"))
    install_fake("tile", WORKING.format(device="meta"))
    with pytest.raises(ValueError, match="several") as error:
        device.choose("auto")
    assert "--backend card or --backend tile" in str(error.value)


def test_auto_passes_over_a_broken_plugin_and_says_so(
    install_fake: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install_fake("cpu", WORKING.format(device="cpu"))
    install_fake("card", BROKEN)
    assert device.choose("auto").device == "cpu"
    [warning] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "fake-card 1.0 (fake_card) failed with ImportError: libcard.so" in warning.getMessage()


def test_auto_fails_with_every_reason_where_nothing_can_run(install_fake: Install) -> None:
    install_fake("card", ABSENT)
    with pytest.raises(ValueError, match=r"card: no card is plugged in: check the slot"):
        device.choose("auto")


def test_a_name_takes_that_backend_and_probes_no_other(
    install_fake: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install_fake("cpu", WORKING.format(device="cpu"))
    install_fake("card", WORKING.format(device="meta"))
    install_fake("tile", BROKEN)
    with caplog.at_level(logging.INFO):
        assert device.choose("cpu").device == "cpu"
    assert "asked for by name" in caplog.text
    assert "fake_tile" not in sys.modules
    assert "fake_card" not in sys.modules


def test_a_named_backend_that_cannot_run_fails_with_its_reason(install_fake: Install) -> None:
    install_fake("cpu", WORKING.format(device="cpu"))
    install_fake("card", ABSENT)
    with pytest.raises(ValueError, match="'card' cannot run here: no card is plugged in") as error:
        device.choose("card")
    assert isinstance(error.value.__cause__, Unavailable)


def test_a_named_backend_that_breaks_fails_with_its_error_and_its_package(
    install_fake: Install,
) -> None:
    install_fake("card", BROKEN)
    with pytest.raises(ValueError, match=r"fake-card 1\.0 .* ImportError: libcard\.so") as error:
        device.choose("card")
    assert isinstance(error.value.__cause__, ImportError)


def test_an_unknown_name_lists_the_known_ones_and_the_nearest(install_fake: Install) -> None:
    install_fake("cpu", WORKING.format(device="cpu"))
    install_fake("card", BROKEN)
    with pytest.raises(ValueError, match="not known") as error:
        device.choose("crad")
    assert "auto or one of card, cpu (did you mean 'card'?)" in str(error.value)
    with pytest.raises(ValueError, match="not known") as error:
        device.choose("qqqqqq")
    assert "did you mean" not in str(error.value)


def test_an_unknown_name_where_nothing_is_installed_says_so(install_fake: Install) -> None:
    with pytest.raises(ValueError, match="no backend is installed"):
        device.choose("card")


def test_the_survey_lists_every_plugin_with_its_reason(install_fake: Install) -> None:
    install_fake("cpu", WORKING.format(device="cpu"))
    install_fake("absent", ABSENT)
    install_fake("broken", BROKEN)
    install_fake("empty", "")
    install_fake("wrong", "def probe():\n    return 'a card'")
    rows = {row.name: row for row in device.survey()}
    assert list(rows) == ["absent", "broken", "cpu", "empty", "wrong"]
    assert [name for name, row in rows.items() if row.backend is not None] == ["cpu"]
    assert rows["cpu"].reason == ""
    assert rows["cpu"].origin == "fake-cpu 1.0 (fake_cpu)"
    assert rows["absent"].reason == "no card is plugged in: check the slot"
    assert "fake-broken 1.0" in rows["broken"].reason
    assert "ImportError: libcard.so" in rows["broken"].reason
    assert "AttributeError" in rows["empty"].reason
    assert "TypeError: probe() returned 'a card'" in rows["wrong"].reason


@pytest.mark.parametrize("name", ["card", "auto"])
def test_two_plugins_with_one_name_are_an_error_that_names_both(
    install_fake: Install, name: str
) -> None:
    install_fake("cpu", WORKING.format(device="cpu"))
    install_fake("card", WORKING.format(device="meta"), package="first-card")
    install_fake("card", WORKING.format(device="meta"), package="second-card")
    with pytest.raises(ValueError, match="several installed backends are named 'card'") as error:
        device.choose(name)
    assert "first-card 1.0 (first_card) and second-card 1.0 (second_card)" in str(error.value)
    assert device.choose("cpu").device == "cpu"
    rows = device.survey()
    assert [(row.name, row.backend is None) for row in rows] == [
        ("card", True),
        ("card", True),
        ("cpu", False),
    ]
    assert all("first-card" in row.reason and "second-card" in row.reason for row in rows[:2])


# ---------------------------------------------------------------- precision and attention

FAKE_MEMORY = Memory(
    peak_bytes=lambda: 0,
    reset_peak=lambda: None,
    release=lambda: None,
    headroom_bytes=lambda: 0,
)
FAKE_CARD = Backend(
    device="meta",
    attention=("flash_attention_2", "sdpa", "eager"),
    precision=(torch.bfloat16, torch.float32),
    collectives="gloo",
    memory=FAKE_MEMORY,
)


def test_auto_precision_is_the_best_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert device.resolve_precision(FAKE_CARD, "auto") is torch.bfloat16
    assert "precision bfloat16: best of bfloat16, float32 on meta" in caplog.text


def test_a_named_precision_is_taken_as_it_is() -> None:
    assert device.resolve_precision(FAKE_CARD, "float32") is torch.float32


def test_a_precision_the_backend_lacks_is_an_error_with_the_allowed_ones() -> None:
    with pytest.raises(ValueError, match="'float16' is not available on meta") as error:
        device.resolve_precision(FAKE_CARD, "float16")
    assert "give auto or bfloat16 or float32" in str(error.value)


@pytest.mark.parametrize("name", ["bf16", "fp32", "half", "torch.float32"])
def test_precisions_go_by_their_full_names(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{re.escape(name)}' is not known") as error:
        device.resolve_precision(FAKE_CARD, name)
    assert "float32 or bfloat16 or float16 (full names only)" in str(error.value)


def test_auto_attention_is_the_best_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert device.resolve_attention(FAKE_CARD, "auto") == "flash_attention_2"
    assert "attention flash_attention_2: best of flash_attention_2, sdpa, eager" in caplog.text


def test_an_attention_the_backend_lacks_is_an_error_with_the_allowed_ones() -> None:
    with pytest.raises(ValueError, match="'flex' is not available on meta") as error:
        device.resolve_attention(FAKE_CARD, "flex")
    assert "give auto or flash_attention_2 or sdpa or eager" in str(error.value)


def test_flash_attention_is_offered_in_sixteen_bits_only() -> None:
    flash = "flash_attention_2"
    assert device.resolve_attention(FAKE_CARD, "auto", precision=torch.float32) == "sdpa"
    assert device.resolve_attention(FAKE_CARD, "auto", precision=torch.bfloat16) == flash
    with pytest.raises(ValueError, match=r"not available on meta in torch\.float32"):
        device.resolve_attention(FAKE_CARD, flash, precision=torch.float32)


# ---------------------------------------------------------------- probes, on fake machines


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """This process's environment, without what a backend sets; what a test leaves is undone."""
    ours = re.compile("PYTORCH.*ALLOC_CONF|CUBLAS_WORKSPACE_CONFIG|.*DETERMINISTIC|LOCAL_RANK")
    copy = {name: value for name, value in os.environ.items() if not ours.fullmatch(name)}
    monkeypatch.setattr(os, "environ", copy)
    return copy


@pytest.fixture
def fake_pytorch(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> Callable[..., None]:
    """Makes PyTorch claim a build and a device; nothing may be computed on it."""

    def claim(
        *,
        cuda: str | None = None,
        hip: str | None = None,
        xpu: str | None = None,
        accelerator: str | None = None,
        bfloat16: bool = True,
        architecture: str = "gfx942:sramecc+:xnack-",
        tells_free_memory: bool = True,
        float64: bool = True,
        deterministic: bool = False,
    ) -> None:
        def init(name: str) -> None:
            if name != accelerator:
                raise RuntimeError(f"no driver for {name}\nand a stack that nobody reads")

        def memory_info() -> tuple[int, int]:
            if not tells_free_memory:
                raise RuntimeError("this device does not tell its free memory")
            return 500, 1000

        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.version, "xpu", xpu)
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
        current = torch.device(accelerator) if accelerator else None
        fake_accelerator = {
            "current_accelerator": lambda: current,
            "device_count": lambda: int(current is not None),
            "set_device_index": lambda index: None,
            "get_memory_info": memory_info,
            "memory_reserved": lambda: 30,
            "memory_allocated": lambda: 20,
        }
        for name, fake in fake_accelerator.items():
            monkeypatch.setattr(torch.accelerator, name, fake)
        properties = types.SimpleNamespace(
            gcnArchName=architecture, total_memory=1000, has_fp64=float64
        )
        for name in ("cuda", "xpu"):
            module = getattr(torch, name)
            monkeypatch.setattr(module, "init", lambda name=name: init(name))
            monkeypatch.setattr(
                module,
                "is_bf16_supported",
                lambda including_emulation=True: bfloat16 or including_emulation,
            )
            monkeypatch.setattr(module, "get_device_properties", lambda *_: properties)
            monkeypatch.setattr(module, "memory_allocated", lambda: 20)

    for module in (cppo_cuda, cppo_rocm, cppo_xpu):
        monkeypatch.setattr(module, "usable", lambda names, device, dtype: names)
        monkeypatch.setattr(module, "token_statistics_for", lambda *given: given)
    for module in (cppo_cuda, cppo_rocm):
        monkeypatch.setattr(module, "installed_flash_attention", lambda: ("flash_attention_2",))
    monkeypatch.setattr(cppo_cuda, "verified", lambda *given: given)
    monkeypatch.setattr(cppo_cuda, "faster", lambda *given: given)
    return claim


@pytest.mark.parametrize(
    ("module", "build", "reason"),
    [
        (cppo_cuda, {"hip": "7.1"}, "built for ROCm, not CUDA: use --backend rocm"),
        (cppo_cuda, {}, "built without CUDA: install"),
        (cppo_cuda, {"cuda": "12.8"}, r"sees no NVIDIA GPU \(no driver for cuda\): check"),
        (cppo_rocm, {"cuda": "12.8"}, "built for CUDA, not ROCm: use --backend cuda"),
        (cppo_rocm, {}, "built without ROCm: install"),
        (cppo_rocm, {"hip": "7.1"}, r"sees no AMD GPU \(no driver for cuda\): check"),
        (cppo_xpu, {}, "built without XPU: install"),
        (cppo_xpu, {"xpu": "20250301"}, r"sees no Intel GPU \(no driver for xpu\): check"),
        (cppo_cuda, {"cuda": "12.8", "accelerator": "cuda"}, None),
        (cppo_rocm, {"hip": "7.1", "accelerator": "cuda"}, None),
        (cppo_xpu, {"xpu": "20250301", "accelerator": "xpu"}, None),
    ],
)
def test_a_fake_pytorch_build_is_told_apart(
    fake_pytorch: Callable[..., None],
    module: types.ModuleType,
    build: dict[str, str],
    reason: str | None,
) -> None:
    fake_pytorch(**build)
    if reason is None:
        backend = module.probe()
        assert backend.device == build["accelerator"]
        assert backend.precision[0] is torch.bfloat16
        assert backend.memory.headroom_bytes() == 500 + 30 - 20
        asked = (build["accelerator"], backend.precision, module.TILINGS)
        assert backend.token_statistics == asked
        offered = None
        if module is cppo_cuda:
            offered = ((cppo_cuda.PARTIAL_ATTENTION, "cuda", backend.precision), "cuda")
        assert backend.partial_attention == offered
    else:
        with pytest.raises(Unavailable, match=reason):
            module.probe()


@pytest.mark.parametrize(
    ("module", "old", "attention"),
    [
        (cppo_cuda, {"cuda": "12.8", "accelerator": "cuda", "bfloat16": False}, ("sdpa", "eager")),
        (
            cppo_rocm,
            {"hip": "7.1", "accelerator": "cuda", "architecture": "gfx906"},
            ("flash_attention_2", "sdpa", "eager"),
        ),
        (cppo_xpu, {"xpu": "1", "accelerator": "xpu", "bfloat16": False}, ("sdpa", "eager")),
    ],
)
def test_emulated_bfloat16_is_not_offered_on_a_fake_old_card(
    fake_pytorch: Callable[..., None],
    module: types.ModuleType,
    old: dict[str, str],
    attention: tuple[str, ...],
) -> None:
    fake_pytorch(**old)
    backend = module.probe()
    assert backend.precision == (torch.float32, torch.float16)
    assert backend.attention == attention
    if module is cppo_cuda:  # flash attention does not run on it
        assert backend.partial_attention == ((cppo_cuda.PARTIAL_ATTENTION, "cuda", ()), "cuda")
    with pytest.raises(ValueError, match=r"'bfloat16' is not available .* give auto or float32"):
        device.resolve_precision(backend, "bfloat16")


def test_a_fake_intel_card_without_float64_cannot_scale_losses(
    fake_pytorch: Callable[..., None],
) -> None:
    fake_pytorch(xpu="20250301", accelerator="xpu", float64=False)
    assert cppo_xpu.probe().precision == (torch.bfloat16, torch.float32)


def test_headroom_of_a_fake_intel_card_that_does_not_tell_its_free_memory(
    fake_pytorch: Callable[..., None],
) -> None:
    fake_pytorch(xpu="20250301", accelerator="xpu", tells_free_memory=False)
    assert cppo_xpu.probe().memory.headroom_bytes() == 1000 - 20


def test_the_allocator_and_attention_are_set_before_their_first_use(
    fake_pytorch: Callable[..., None], environment: dict[str, str]
) -> None:
    fake_pytorch(cuda="12.8", accelerator="cuda")
    torch.backends.cuda.enable_cudnn_sdp(True)
    cppo_cuda.probe()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert environment.pop("PYTORCH_ALLOC_CONF") == "expandable_segments:True"
    environment["PYTORCH_CUDA_ALLOC_CONF"] = "max_split_size_mb:128"
    cppo_cuda.probe()
    assert "PYTORCH_ALLOC_CONF" not in environment


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_mode_reaches_the_libraries(
    fake_pytorch: Callable[..., None], environment: dict[str, str], deterministic: bool
) -> None:
    fake_pytorch(cuda="12.8", accelerator="cuda", deterministic=deterministic)
    cppo_cuda.probe()
    assert ("CUBLAS_WORKSPACE_CONFIG" in environment) == deterministic
    assert (environment.pop("FLASH_ATTENTION_DETERMINISTIC", "") == "1") == deterministic
    fake_pytorch(hip="7.1", accelerator="cuda", deterministic=deterministic)
    cppo_rocm.probe()
    assert (environment.get("FLASH_ATTENTION_DETERMINISTIC", "") == "1") == deterministic


def test_memory_of_another_accelerator_is_never_reported(
    fake_pytorch: Callable[..., None],
) -> None:
    fake_pytorch(cuda="12.8", accelerator="cuda")
    with pytest.raises(Unavailable, match="'cuda' for this process's accelerator, not 'xpu'"):
        device.accelerator_memory("xpu")


def test_a_process_beyond_the_last_fake_card_is_told_how_many_there_are(
    fake_pytorch: Callable[..., None], environment: dict[str, str]
) -> None:
    fake_pytorch(cuda="12.8", accelerator="cuda")
    environment["LOCAL_RANK"] = "0"
    assert device.claim_device("cuda") == torch.device("cuda", 0)
    environment["LOCAL_RANK"] = "1"
    with pytest.raises(Unavailable, match=r"process 2 on this machine has no 'cuda' .* 1 visible"):
        device.claim_device("cuda")


@pytest.fixture
def fake_torch_npu(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> types.ModuleType:
    module = types.ModuleType("torch_npu")
    module.__spec__ = types.SimpleNamespace()
    module.__version__ = torch.__version__.split("+")[0] + ".post1"
    module.npu = types.SimpleNamespace(
        is_available=lambda: True,
        is_bf16_supported=lambda: True,
        max_memory_allocated=lambda: 40,
        reset_peak_memory_stats=lambda: None,
        empty_cache=lambda: None,
        mem_get_info=lambda: (500, 1000),
        memory_reserved=lambda: 30,
        memory_allocated=lambda: 20,
    )
    module.npu_fusion_attention = object()
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    monkeypatch.setattr(cppo_npu, "version", lambda distribution: module.__version__)
    monkeypatch.setattr(cppo_npu, "usable", lambda names, device, dtype: names)
    return module


def test_a_fake_torch_npu_brings_its_fused_attention(
    fake_torch_npu: types.ModuleType, environment: dict[str, str]
) -> None:
    backend = cppo_npu.probe()
    assert backend.device == "npu"
    assert backend.attention == ("flash_attention_2", "sdpa", "eager")
    assert backend.precision[0] is torch.bfloat16
    assert backend.collectives == "hccl"
    assert backend.memory.peak_bytes() == 40
    assert backend.memory.headroom_bytes() == 500 + 30 - 20
    assert environment["PYTORCH_NPU_ALLOC_CONF"] == "expandable_segments:True"
    assert "HCCL_DETERMINISTIC" not in environment


def test_an_old_fake_npu_has_neither_bfloat16_nor_fused_attention(
    fake_torch_npu: types.ModuleType,
) -> None:
    fake_torch_npu.npu.is_bf16_supported = lambda: False
    del fake_torch_npu.npu_fusion_attention
    backend = cppo_npu.probe()
    assert backend.precision == (torch.float32, torch.float16)
    assert backend.attention == ("sdpa", "eager")


def test_deterministic_mode_reaches_a_fake_npus_collectives(
    fake_torch_npu: types.ModuleType, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    cppo_npu.probe()
    assert environment["HCCL_DETERMINISTIC"] == "true"


def test_a_fake_torch_npu_without_a_device_says_what_to_check(
    fake_torch_npu: types.ModuleType,
) -> None:
    fake_torch_npu.npu.is_available = lambda: False
    with pytest.raises(Unavailable, match=r"torch-npu \S+ sees no NPU: check"):
        cppo_npu.probe()


def test_a_fake_torch_npu_for_another_pytorch_is_refused_before_it_is_imported(
    fake_torch_npu: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)  # an import of it would raise
    fake_torch_npu.__version__ = "2.1.0"
    with pytest.raises(Unavailable, match=r"torch-npu 2\.1\.0 does not fit PyTorch .*: install"):
        cppo_npu.probe()


def test_a_missing_torch_npu_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(distribution: str) -> str:
        raise PackageNotFoundError(distribution)

    monkeypatch.setattr(cppo_npu, "version", version)
    with pytest.raises(Unavailable, match="torch-npu is not installed: install CANN"):
        cppo_npu.probe()


def test_a_fake_torch_npu_that_does_not_load_is_told_from_a_missing_one(
    fake_torch_npu: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_npu")
    with pytest.raises(Unavailable, match=r"does not import \(libhccl\.so.*source CANN"):
        cppo_npu.probe()


def test_bfloat16_that_a_cpu_only_emulates_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = {"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert cppo_cpu.probe().precision == (torch.float32,)
    capabilities["amx_bf16"] = True
    assert cppo_cpu.probe().precision == (torch.float32, torch.bfloat16)
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in PyTorch 2.10
    assert cppo_cpu.probe().precision == (torch.float32,)


# ---------------------------------------------------------------- the CPU's memory, on fake files


@pytest.fixture
def fake_linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    monkeypatch.setattr(cppo_cpu, "PROC", tmp_path / "proc")
    monkeypatch.setattr(cppo_cpu, "CGROUP", tmp_path / "cgroup")

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("proc/meminfo", "MemTotal:  2000 kB\nMemAvailable:  1000 kB\n")
    return write


def test_headroom_without_control_groups_is_the_machines(
    fake_linux: Callable[[str, str], None],
) -> None:
    assert cppo_cpu.probe().memory.headroom_bytes() == 1_024_000


def test_headroom_is_the_tightest_enclosing_control_groups(
    fake_linux: Callable[[str, str], None],
) -> None:
    fake_linux("proc/self/cgroup", "1:cpu:/\n0::/job/step\n")
    fake_linux("cgroup/job/step/memory.max", "max\n")
    fake_linux("cgroup/job/memory.max", "500000\n")
    fake_linux("cgroup/job/memory.current", "300000\n")
    fake_linux("cgroup/job/memory.stat", "anon 200000\ninactive_file 40000\n")
    assert cppo_cpu.probe().memory.headroom_bytes() == 500_000 - 300_000 + 40_000


def test_headroom_in_a_version_1_container_comes_from_the_mounts_root(
    fake_linux: Callable[[str, str], None],
) -> None:
    fake_linux("proc/self/cgroup", "4:cpu,memory:/docker/of-the-host\n3:cpuset:/\n")
    fake_linux("cgroup/memory/memory.limit_in_bytes", "600000\n")
    fake_linux("cgroup/memory/memory.usage_in_bytes", "100000\n")
    fake_linux("cgroup/memory/memory.stat", "total_inactive_file 0\n")
    assert cppo_cpu.probe().memory.headroom_bytes() == 500_000


def test_a_peak_that_cannot_be_reset_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cppo_cpu._warn_of_lasting_peak.cache_clear()
    monkeypatch.setattr(cppo_cpu, "PROC", tmp_path / "absent")
    memory = cppo_cpu.probe().memory
    assert memory.peak_bytes() > 10_000_000
    assert memory.headroom_bytes() > 0
    memory.reset_peak()
    memory.reset_peak()
    assert caplog.text.count("peak memory counts from the start of the process") == 1


# ---------------------------------------------------------------- what the command line says


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """What `cppo train` says to hardware that it cannot have: one paragraph, and no run begun."""

    def train(*arguments: str) -> str:
        folder = tmp_path / "elsewhere"
        folder.mkdir()
        monkeypatch.chdir(folder)
        assert cli.main(["train", *arguments]) == 2
        said = capsys.readouterr().err
        [paragraph] = [line for line in said.splitlines() if line.startswith("cppo: ")]
        assert said.endswith(paragraph + "\n")
        assert "Traceback" not in said
        assert list(folder.iterdir()) == []
        return paragraph

    return train


def test_a_vendors_backend_on_anothers_fake_pytorch_is_refused(
    refused: Callable[..., str], fake_pytorch: Callable[..., None]
) -> None:
    fake_pytorch(cuda="12.8", accelerator="cuda")
    assert "'rocm' cannot run here: PyTorch" in (said := refused("--backend", "rocm"))
    assert "built for CUDA, not ROCm: use --backend cuda" in said


def test_an_unknown_backend_is_refused(refused: Callable[..., str]) -> None:
    said = refused("--backend", "cdua")
    known = ", ".join(row.name for row in INSTALLED)
    assert {"cpu", "cuda", "npu", "rocm", "xpu"} <= set(known.split(", "))
    assert f"'cdua' is not known: give auto or one of {known} (did you mean 'cuda'?)" in said


def test_two_accelerators_are_not_chosen_between(
    refused: Callable[..., str], install: Install
) -> None:
    install("card", WORKING.format(device="meta"))
    install("tile", WORKING.format(device="meta"))
    said = refused("--backend", "auto")
    assert "several accelerators: card from fake-card 1.0" in said
    assert re.search("choose one with --backend card or .*--backend tile", said)


def test_attention_that_does_not_work_here_is_refused_with_the_reason(
    refused: Callable[..., str],
) -> None:
    said = refused("--backend", "cpu", "--attention", "flash_attention_2")
    assert "'flash_attention_2' is not available on cpu" in said
    assert "give auto or sdpa or eager (flash_attention_2 needs an accelerator)" in said


def test_a_precision_that_the_hardware_lacks_is_refused(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    said = refused("--backend", "cpu", "--precision", "bfloat16")
    assert "'bfloat16' is not available on cpu here: give auto or float32" in said


def test_a_backend_that_breaks_is_refused_and_listed_with_its_traceback(
    refused: Callable[..., str], install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("card", BROKEN)
    said = refused("--backend", "card")
    assert "fake-card 1.0 (fake_card) failed with ImportError: libcard.so" in said
    assert cli.main(["backends"]) == 0
    listed = capsys.readouterr().out
    assert all(f" {row.name} " in listed for row in INSTALLED)
    assert "card: fake-card 1.0 (fake_card) is broken\nTraceback" in listed
    assert "fake_card.py" in listed
    assert listed.endswith("ImportError: libcard.so: cannot open shared object file\n")


def test_two_backends_of_one_name_are_refused(
    refused: Callable[..., str], install: Install
) -> None:
    install("card", WORKING.format(device="meta"), package="first-card")
    install("card", WORKING.format(device="meta"), package="second-card")
    said = refused("--backend", "card")
    assert "named 'card': first-card 1.0 (first_card) and second-card 1.0 (second_card)" in said


@pytest.mark.parametrize(
    ("environment_of", "reason"),
    [
        (LAUNCHER, "processes on 'cpu' are joined by 'sccl', which this PyTorch"),
        (("WORLD_SIZE",), "WORLD_SIZE is 2, but RANK and LOCAL_RANK .* is not set"),
    ],
)
def test_processes_that_cannot_be_joined_are_refused(
    refused: Callable[..., str],
    install: Install,
    environment: dict[str, str],
    environment_of: tuple[str, ...],
    reason: str,
) -> None:
    install("card", WORKING.format(device="cpu").replace("gloo", "sccl"))
    launched = dict(zip(LAUNCHER, ("0", "2", "0", "127.0.0.1", "29999"), strict=True))
    environment.update({name: launched[name] for name in environment_of})
    assert re.search(reason, refused("--backend", "card"))


# ---------------------------------------------------------------- what cppo itself may know


def test_no_vendor_is_named_in_cppo() -> None:
    names = "cuda|rocm|hip|xpu|npu|nccl|hccl|xccl|rccl|nvidia|amd|intel|ascend|huawei|mps"
    vendor = re.compile(rf"(?<![a-z])({names})(?![a-z])", re.IGNORECASE)
    named = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted((ROOT / "cppo").rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if vendor.search(line)
    ]
    assert named == []


def test_importing_the_device_interface_imports_no_torch() -> None:
    code = "import sys, cppo.device; cppo.device.installed(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
