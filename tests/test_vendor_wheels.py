"""Every name and call that the vendor backends use stands in what each vendor publishes.

No machine at hand has all the hardware, and importing a vendor's wheel needs that vendor's
drivers. So the sources inside the published files are read, not imported, and of wheels only the
members wanted, by HTTP range requests. Without a network these tests skip and say why.
"""

from __future__ import annotations

import ast
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import unquote, urldefrag, urljoin, urlsplit
from urllib.request import Request, urlopen

import pytest
from conftest import skip_or_fail
from packaging.version import Version

pytestmark = pytest.mark.network

ROOT = Path(__file__).parents[1]
OLDEST = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[0]
TESTED = re.findall(r"(?m)^torch==([\d.]+)", (ROOT / "ci/constraints.txt").read_text())[0]
TRANSFORMERS = Path(str(find_spec("transformers").origin)).parent
PYTORCH = "https://download.pytorch.org/whl"  # lists every build: +cu130, +rocm7.1, +xpu ...
BUILDS = {"cuda": (r"(cu\d+)?", ""), "rocm": (r"rocm.*", PYTORCH), "xpu": ("xpu", PYTORCH)}

# ---------------------------------------------------------------- reading what is published

unreachable: dict[str, str] = {}  # each host is waited for once


def fetch(url: str, **headers: str) -> Any:
    host = str(urlsplit(url).hostname)
    try:
        if host not in unreachable:
            return urlopen(Request(url, headers=headers), timeout=20)
    except HTTPError as error:
        skip_or_fail(f"{host} does not give {urlsplit(url).path}: {error}")
    except OSError as error:
        unreachable[host] = f"{host} cannot be reached: {error}"
    return skip_or_fail(unreachable[host])


@cache
def default_index() -> str:
    """The one that pip is configured with."""
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    configured = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return os.environ.get("PIP_INDEX_URL") or configured.strip() or "https://pypi.org/simple"


def published(project: str, version: str, build: str, index: str, ending: str) -> str:
    """The URL of the newest final release (of `version`, where not "newest") whose local part
    (rocm7.1 in 2.10.0+rocm7.1) fits the regular expression `build`."""
    with fetch(f"{index.rstrip('/')}/{project}/", Accept="text/html") as page:
        base, text = page.url, page.read().decode()
    found: dict[Version, str] = {}
    for link in re.findall(r'<a\s(?![^>]*data-yanked)[^>]*href="([^"]+)"', text):
        url = urljoin(base, urldefrag(link).url)
        if re.search(f"{ending}$", name := unquote(url.rpartition("/")[2])):
            release = Version(name.removesuffix(".tar.gz").split("-")[1])
            wanted = version == "newest" or Version(version) == Version(release.base_version)
            if wanted and not release.is_prerelease and re.fullmatch(build, release.local or ""):
                found[release] = url
    host = urlsplit(base).hostname
    if not found:
        skip_or_fail(f"{host} has no {project} {version} {build}")
    return found[max(found)]


@cache
def wheel(project: str, version: str, build: str = "", index: str = "") -> Sources:
    ending = r"linux[\w.]*_x86_64\.whl"
    url = published(project, version, build, index or default_index(), ending)
    sparse = tempfile.TemporaryFile()  # noqa: SIM115 - of the wheel's size, but holds what is read

    def bring(span: str) -> None:
        with fetch(url, Range=f"bytes={span}") as part:
            if part.status != 206:
                skip_or_fail(f"{urlsplit(url).hostname} ignores range requests")
            sparse.seek(int(re.findall(r"\d+", part.headers["Content-Range"])[0]))
            sparse.write(part.read())

    bring(f"-{2**22}")  # the list of members stands at the end
    archive = zipfile.ZipFile(sparse)
    members = {member.filename: member for member in archive.infolist()}

    def read(path: str) -> str | None:
        if member := members.get(path):
            bring(f"{member.header_offset}-{member.header_offset + member.compress_size + 2**10}")
            return archive.read(member).decode()
        return None

    return Sources(read)


@cache
def bindings(scope: ast.AST) -> dict[str, list[Any]]:
    """What a module or class binds to each name, conditionally or not; imports as "module.name"."""
    table: dict[str, list[Any]] = {}
    parts = ("body", "handlers", "orelse", "finalbody")
    for node in (x for part in parts for x in getattr(scope, part, [])):
        inner: dict[str, list[Any]] = {}
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            inner[node.name] = [node]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            inner |= {x.id: [node] for x in targets if isinstance(x, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            inner |= {x.asname or x.name: [f"{node.module}.{x.name}"] for x in node.names}
        else:
            inner = bindings(node)
        for name, values in inner.items():
            table[name] = table.get(name, []) + values
    return table


class Sources:
    """Python sources and stubs, read one by one, in which names are looked up."""

    def __init__(self, read: Callable[[str], str | None]) -> None:
        self.read, self.module = read, cache(self.parse)

    def parse(self, name: str) -> ast.Module | None:
        for end in ("/__init__.py", ".py", "/__init__.pyi", ".pyi"):
            if (text := self.read(name.replace(".", "/") + end)) is not None:
                tree = ast.parse(text)
                for node in ast.walk(tree):
                    if isinstance(node, ast.ImportFrom) and node.level:
                        package = name if "/" in end else name.rpartition(".")[0]
                        node.module = resolve_name("." * node.level + (node.module or ""), package)
                return tree
        return None

    def find(self, name: str, seen: tuple[str, ...] = ()) -> list[ast.AST]:
        """What defines a dotted name; empty where nothing does. Members of modules and classes are
        looked up, those of other values taken on trust."""
        owner, _, attribute = name.rpartition(".")
        if (module := self.module(name)) or not owner or name in seen:
            return [module] if module else []
        seen = (*seen, name)
        owners = [scope] if (scope := self.module(owner)) else self.find(owner, seen)
        scopes = [x for x in owners if isinstance(x, ast.Module | ast.ClassDef)]
        found = [x for scope in scopes for x in bindings(scope).get(attribute, [])]
        for other in [x for x in found if isinstance(x, str)]:  # compiled: bound, not defined
            found += self.find(other, seen) or [ast.Pass()]
        for star in () if found else [x for s in scopes for x in bindings(s).get("*", [])]:
            found = found or self.find(star[:-1] + attribute, seen)
        return [x for x in found if not isinstance(x, str)] if scopes else owners


# ---------------------------------------------------------------- what is used

Use = tuple[str, ast.Call | None]


def uses(text: str, *prefixes: str) -> list[Use]:
    """The dotted names with one of the prefixes, aliases resolved, each with its call if called."""
    nodes = list(ast.walk(ast.parse(text)))
    full: dict[str, str] = {}

    def spelled(node: ast.AST) -> str:
        head, dot, rest = ast.unparse(node).partition(".")
        record = r"torch\.(\w+)\.get_device_properties\(.*?\)"
        name = full.get(head, "?") + dot + rest
        return re.sub(record, lambda of: f"torch._C._{of[1].title()}DeviceProperties", name)

    for node in nodes:
        if isinstance(node, ast.Import):
            full |= {(top := x.name.split(".")[0]): top for x in node.names}
            full |= {x.asname: x.name for x in node.names if x.asname}
        elif isinstance(node, ast.ImportFrom):
            full |= {x.asname or x.name: f"{node.module}.{x.name}" for x in node.names}
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute):
            full |= {ast.unparse(target): spelled(node.value) for target in node.targets}
    calls = {id(node.func): node for node in nodes if isinstance(node, ast.Call)}
    inner = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    chains = [n for n in nodes if isinstance(n, ast.Name | ast.Attribute) and id(n) not in inner]
    found = [(spelled(node), calls.get(id(node))) for node in chains]
    return [use for use in found if re.fullmatch(r"[\w.]+", use[0]) and use[0].startswith(prefixes)]


def used(folder: str, *prefixes: str) -> list[Use]:
    paths = (ROOT / folder).rglob("*.py")
    return [use for path in paths for use in uses(path.read_text(encoding="utf-8"), *prefixes)]


def takes(parameters: ast.arguments, call: ast.Call) -> bool:
    """Whether a function with these parameters can be called so."""
    positional = [x.arg for x in (*parameters.posonlyargs, *parameters.args)]
    left = positional[len(call.args) :]
    names = [x.arg for x in parameters.kwonlyargs]
    only = dict(zip(names, parameters.kw_defaults, strict=True))
    required = {*left[: max(0, len(left) - len(parameters.defaults))]}
    required |= {name for name, default in only.items() if default is None}
    allowed = {*left, *only} - {x.arg for x in parameters.posonlyargs}
    given = {keyword.arg for keyword in call.keywords}
    if None in given or any(isinstance(x, ast.Starred) for x in call.args):
        return True  # what is unpacked is known at run time only
    room = parameters.vararg is not None or len(call.args) <= len(positional)
    return room and required <= given and (given <= allowed or parameters.kwarg is not None)


def missing(sources: Sources, wanted: list[Use]) -> set[str]:
    """What the sources do not define, and calls that no definition (stubs overload) takes."""
    lacking = set()
    for name, call in wanted:
        defined = sources.find(name)
        functions = [node.args for node in defined if isinstance(node, ast.FunctionDef)]
        if not defined or (call and functions and not any(takes(f, call) for f in functions)):
            lacking.add(ast.unparse(call) if defined and call else name)
    return lacking


@pytest.mark.parametrize(
    ("version", "build"),
    [(OLDEST, "cuda"), (TESTED, "cuda"), *(("newest", build) for build in BUILDS)],
)
def test_pytorch_has_every_name_and_collective_in_use(version: str, build: str) -> None:
    torch = wheel("torch", version, *BUILDS[build])
    fields = {node for node in torch.module("torch.version").body if hasattr(node, "annotation")}
    filled = {node.target.id for node in fields if ast.literal_eval(node.value)}
    assert filled & {"cuda", "hip", "xpu"} == {"hip" if build == "rocm" else build}
    accelerator = used("cppo", "torch.accelerator.", "torch.distributed.")
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "backends").rglob("*.py")]
    names = set(re.findall(r'collectives="(\w+)"', "".join(texts))) - {"hccl"}
    assert names == {"gloo", "nccl", "xccl"}
    collectives = [(f"torch.distributed.distributed_c10d.Backend.{x.upper()}", None) for x in names]
    lacking = missing(torch, used("backends", "torch.") + accelerator + collectives)
    assert lacking <= ({"torch.cpu.get_capabilities"} if version == OLDEST else set())  # guarded


def test_a_name_or_a_call_that_does_not_exist_is_missing() -> None:
    wrong = {"torch.accelerator.memory_allocated(0, 1)", "torch.cuda.is_bf16_supported(old=True)"}
    wrong |= {"torch.cuda.no_such_name", "torch._C._XpuDeviceProperties.no_such_field"}
    right = {"torch.cuda.is_bf16_supported(including_emulation=False)", "torch.bfloat16.itemsize"}
    text = "\n".join(["import torch", *wrong, *right])
    assert missing(wheel("torch", TESTED), uses(text, "torch.")) == wrong


@pytest.mark.parametrize("version", [TESTED, "newest"])
def test_torch_npu_has_what_is_used_of_it(version: str) -> None:
    npu = wheel("torch-npu", version)
    attached = re.findall(r"(?m)^(torch_npu\.\w+) = t", npu.read("torch_npu/utils/custom_ops.py"))
    assert missing(npu, used("backends", "torch_npu.")) <= {*attached}
    registry = npu.read("torch_npu/_init/registry/distributed.py")
    assert re.search(r'Backend\.register_backend\(\s*"hccl"', registry)
    # PyTorch loads it by itself, and each release goes with one PyTorch alone.
    release = re.findall(r"__version__ = '(.*)'", npu.read("torch_npu/version.py"))[0]
    entries = npu.read(f"torch_npu-{release}.dist-info/entry_points.txt")
    assert "[torch.backends]\ntorch_npu = torch_npu:_autoload\n" in entries
    metadata = npu.read(f"torch_npu-{release}.dist-info/METADATA")
    torch_release = re.findall(r"Requires-Dist: torch ?==([\d.]+)", metadata)[0]
    assert torch_release.split(".")[:3] == release.split(".")[:3]
    # transformers' flash_attention_2 is this operator's, which one file declares for C++.
    operators = npu.read("torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml")
    schema = re.findall(r"func: npu_fusion_attention\((.*)\) ->", operators)[0]
    parameters = ", ".join(typed.split()[-1] for typed in schema.split(", "))
    function = ast.parse(f"lambda {parameters}: None", mode="eval").body
    text = (TRANSFORMERS / "integrations/npu_flash_attention.py").read_text(encoding="utf-8")
    calls = [call for _, call in uses(text, "torch_npu.npu_fusion_attention") if call]
    assert "torch_npu.npu_fusion_attention" in attached
    assert calls
    assert all(takes(function.args, call) for call in calls)


def test_flash_attn_exports_what_transformers_imports() -> None:
    with fetch(published("flash-attn", "newest", "", default_index(), r"\.tar\.gz")) as response:
        archive = tarfile.open(fileobj=io.BytesIO(response.read()))  # noqa: SIM115
    files = {
        x.name.partition("/")[2]: x for x in archive if re.search(r"/flash_attn/\w+\.py", x.name)
    }
    flash_attn = Sources({k: archive.extractfile(x).read() for k, x in files.items()}.get)
    text = (TRANSFORMERS / "modeling_flash_attention_utils.py").read_text(encoding="utf-8")
    lines = re.findall(r"from (flash_attn|flash_attn\.bert_padding) import (.+)", text)
    wanted = [(f"{module}.{name}", None) for module, names in lines for name in names.split(", ")]
    assert len(wanted) >= 4
    assert missing(flash_attn, wanted) == set()
