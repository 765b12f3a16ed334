"""What this machine has and lacks, the command that mends it, and what can be done with it as it is."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from curator_embed.execution.gpus import Driver, driver


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        what: a package, a driver, a compiler.
        state: "ok", "missing" (an option that cannot be used) or "broken" (nothing works without it).
        detail: version or consequence, and what to do.
    """

    what: str
    state: str
    detail: str

    def to_dict(self) -> dict[str, str]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.state:<8} {self.what:<16} {self.detail}"


REQUIRED = (
    *("torch", "torchvision", "timm", "pillow", "pyarrow", "pandas", "numpy"),
    *("dask", "distributed", "fsspec", "imagehash", "safetensors", "tqdm"),
)
CUDA = "cuda"
"""Stands for the extra that fits the torch that is installed: cuda12 or cuda13."""

OPTIONAL = (
    (("dask-cuda",), "dask_cuda", CUDA, "one worker per GPU"),
    (("cudf-cu13", "cudf-cu12"), "cudf", CUDA, "metadata as cuDF"),
    (("dask-cudf-cu13", "dask-cudf-cu12"), "dask_cudf", CUDA, "metadata as cuDF"),
    (("open_clip_torch",), "open_clip", "clip", "CLIP models with a text tower"),
    (("faiss-cpu", "faiss-gpu"), "faiss", "faiss", "similarity indexes"),
    (("s3fs",), "s3fs", "s3", "datasets on S3"),
    (("obstore",), "obstore", "s3", "path lists on S3 at full speed"),
    (("gcsfs",), "gcsfs", "gcs", "datasets on Google Cloud Storage"),
    (("adlfs",), "adlfs", "azure", "datasets on Azure"),
    (("aiohttp",), "aiohttp", "http", "datasets on web servers"),
    (("dask-jobqueue",), "dask_jobqueue", "clusters", "clusters of Slurm, PBS and LSF"),
    (("asyncssh",), "asyncssh", "clusters", "clusters of machines reached by SSH"),
    (("bokeh",), "bokeh", "clusters", "Dask's dashboard"),
    (("dask-kubernetes",), "dask_kubernetes", "kubernetes", "clusters on Kubernetes"),
    (("dask-databricks",), "dask_databricks", "databricks", "clusters on Databricks"),
    (("ipywidgets",), "ipywidgets", "notebook", "progress bars in notebooks"),
)
"""(distributions that bring it, module, extra, what for)."""

_STORES = {"s3fs": "S3", "gcsfs": "Google Cloud Storage", "adlfs": "Azure", "aiohttp": "web servers"}


def examine() -> list[Finding]:
    """Look at Python, the packages, the processor, the GPU and the compiler."""
    findings = [
        Finding("python", "ok" if sys.version_info >= (3, 11) else "broken", platform.python_version()),
        Finding("processor", "ok", f"{_cores()} cores, {platform.machine()}"),
    ]
    for name in REQUIRED:
        version = _version(name)
        findings.append(Finding(name, "ok", version) if version else Finding(name, "broken", f"pip install {name}"))
    found = driver()
    findings += [_timm(), *_gpu(found), _dali(found), *map(_optional, OPTIONAL), _compiler()]
    return findings


def conclude(findings: Sequence[Finding]) -> str:
    """What this machine can do now, in one sentence."""
    state = {finding.what: finding.state for finding in findings}
    if broken := [name for name, found in state.items() if found == "broken"]:
        return f"Nothing works before these are put right: {', '.join(broken)}."
    if state.get("gpu") == "ok":
        decoder = "decoding there, too" if state.get("nvidia-dali") == "ok" else "decoding on its CPU"
        several = "" if state.get("dask-cuda") == "ok" else " (one GPU only)"
        doing = f"embeds on its GPU{several}, {decoder}"
    else:
        lacks = [name for name in ("nvidia driver", "torch for CUDA", "gpu") if state.get(name) != "ok"]
        doing = f"embeds on its CPU and on no GPU (missing: {', '.join(lacks)})"
    stores = ["local disks", *(place for package, place in _STORES.items() if state.get(package) == "ok")]
    return f"This machine {doing}; it reads from {', '.join(stores)}."


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(*distributions: str) -> str:
    """Of the first of these that is installed; empty when none is."""
    for name in distributions:
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return ""


def _present(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _optional(package: tuple[tuple[str, ...], str, str, str]) -> Finding:
    distributions, module, extra, purpose = package
    name = module.replace("_", "-")
    if _present(module):
        return Finding(name, "ok", f"{purpose} ({_version(*distributions) or 'version unknown'})")
    return Finding(name, "missing", f"{purpose}: {_pip(extra)}")


def _pip(extra: str) -> str:
    """The line that installs an extra; of the two for CUDA the one that goes with the torch that is there."""
    extras: Iterable[str] = [extra]
    if extra == CUDA:
        built = _built_for()
        extras = [f"cuda{built.partition('.')[0]}"] if built else ["cuda13", "cuda12"]
    return " or ".join(f"pip install 'curator-embed[{name}]'" for name in extras)


def _built_for() -> str:
    """The CUDA version that torch is built for; empty without any."""
    try:
        import torch
    except (ImportError, OSError):
        return ""
    return torch.version.cuda or ""


def _timm() -> Finding:
    """torch and torchvision from different indexes break ``import timm``."""
    try:
        import timm
    except (ImportError, OSError, RuntimeError) as error:
        return Finding("import timm", "broken", f"{error}: install torch and torchvision from one index")
    return Finding("import timm", "ok", f"{len(timm.list_models(pretrained=True))} pretrained models known")


def _gpu(found: Driver | None) -> list[Finding]:
    """The driver, torch's build and the GPU: each needs those before it."""
    built = _built_for()
    fitting = "curator-embed[cuda12]" if found and found.cuda[0] < 13 else "curator-embed[cuda13]"
    if found is None:
        first = Finding("nvidia driver", "missing", "no libcuda.so.1: if there is an NVIDIA GPU, install its driver")
    else:
        first = Finding("nvidia driver", "ok", f"runs CUDA up to {found.cuda[0]}.{found.cuda[1]}")
    if not built:
        mend = f"pip install --force-reinstall torch torchvision '{fitting}'"
        second = Finding("torch for CUDA", "missing", f"this torch is built without CUDA: {mend}")
    elif found and int(built.partition(".")[0]) > found.cuda[0]:
        mend = f"install a newer driver, or pip install '{fitting}'"
        second = Finding("torch for CUDA", "missing", f"built for CUDA {built}, too new for the driver: {mend}")
    else:
        second = Finding("torch for CUDA", "ok", f"built for CUDA {built}")
    return [first, second, _device(found)]


def _device(found: Driver | None) -> Finding:
    try:
        import torch

        usable = torch.cuda.is_available()
    except (ImportError, OSError):
        usable = False
    if usable:
        names = ", ".join(torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count()))
        return Finding("gpu", "ok", names)
    if found is None:
        return Finding("gpu", "missing", "no driver, so none can be used. Everything works on the CPU, slower")
    if found.devices:
        return Finding("gpu", "missing", f"the driver sees {found.devices}, torch none: see above")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = "the driver sees none" if hidden is None else f"hidden by CUDA_VISIBLE_DEVICES={hidden!r}"
    return Finding("gpu", "missing", f"{why}. Everything works on the CPU, slower")


def _dali(found: Driver | None) -> Finding:
    version = _version("nvidia-dali-cuda130", "nvidia-dali-cuda120")
    if not version or not _present("nvidia.dali"):
        return Finding("nvidia-dali", "missing", f"decoding on a GPU: {_pip(CUDA)}")
    here = "decoding on a GPU" if found and found.devices else "its CPU operators work; decoding on a GPU needs one"
    return Finding("nvidia-dali", "ok", f"{here} ({version})")


def _compiler() -> Finding:
    """What torch.compile needs for the CPU; told without torch, and as ``forward.cpu_compiler_found`` looks."""
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")
    if compiler is None:
        return Finding("c++ compiler", "missing", "models are not compiled: apt install g++, or your system's package")
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return Finding(
            "c++ compiler", "missing", f"{compiler} is there, Python's headers are not: apt install python3-dev"
        )
    return Finding("c++ compiler", "ok", f"compiled models ({compiler})")
