"""What this machine has and lacks, and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec


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


REQUIRED = ("torch", "torchvision", "timm", "pillow", "pyarrow", "pandas", "dask", "distributed", "fsspec", "imagehash")
OPTIONAL = (
    ("nvidia-dali-cuda120", "nvidia.dali", "cuda12", "decoding on a GPU"),
    ("dask-cuda", "dask_cuda", "cuda12", "one worker a GPU"),
    ("cudf", "cudf", "cuda12", "metadata as cuDF"),
    ("open_clip_torch", "open_clip", "clip", "CLIP models with a text tower"),
    ("faiss", "faiss", "faiss", "similarity indexes"),
    ("s3fs", "s3fs", "s3", "datasets on S3"),
    ("obstore", "obstore", "s3", "path lists on S3 at full speed"),
    ("gcsfs", "gcsfs", "gcs", "datasets on Google Cloud Storage"),
    ("adlfs", "adlfs", "azure", "datasets on Azure"),
    ("dask-jobqueue", "dask_jobqueue", "clusters", "clusters of Slurm, PBS and LSF"),
    ("asyncssh", "asyncssh", "clusters", "clusters of machines reached by SSH"),
    ("dask-kubernetes", "dask_kubernetes", "kubernetes", "clusters on Kubernetes"),
    ("dask-databricks", "dask_databricks", "databricks", "clusters on Databricks"),
    ("ipywidgets", "ipywidgets", "notebook", "progress bars in notebooks"),
)


def examine() -> list[Finding]:
    """Look at Python, the packages, the processor, the GPU and the compiler."""
    findings = [
        Finding("python", "ok" if sys.version_info >= (3, 11) else "broken", platform.python_version()),
        Finding("processor", "ok", f"{_cores()} cores, {platform.machine()}"),
    ]
    for name in REQUIRED:
        version = _version(name)
        findings.append(Finding(name, "ok", version) if version else Finding(name, "broken", f"pip install {name}"))
    findings.append(_timm())
    findings.append(_gpu())
    for name, module, extra, purpose in OPTIONAL:
        present = _present(module)
        note = f"{purpose}: pip install 'curator-embed[{extra}]'" if not present else f"{purpose}"
        if not present and extra == "cuda12":
            note += " (or [cuda13])"
        findings.append(Finding(name, "ok" if present else "missing", note))
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    findings.append(
        Finding("c++ compiler", "ok", compiler)
        if compiler
        else Finding("c++ compiler", "missing", "models are not compiled on the CPU: install g++")
    )
    return findings


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _present(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _timm() -> Finding:
    """torch and torchvision from different indexes break ``import timm``."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        return Finding("import timm", "broken", f"{error}: install torch and torchvision from one index")
    return Finding("import timm", "ok", f"{len(timm.list_models(pretrained=True))} pretrained models known")


def _gpu() -> Finding:
    try:
        import torch
    except ImportError:
        return Finding("gpu", "missing", "torch is not installed")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = (
            "this torch is built without CUDA"
            if built is None
            else f"torch is built for CUDA {built}; no driver or GPU"
        )
        return Finding("gpu", "missing", f"{why}. Everything works on the CPU, slower")
    names = ", ".join(torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count()))
    return Finding("gpu", "ok", f"{names}; CUDA {torch.version.cuda}")
