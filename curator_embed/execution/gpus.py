"""What can be said about this machine's GPUs before torch is imported: NVIDIA's driver, and what torch is built for.

Importing torch takes seconds; a command that asks for a GPU where there is none is refused without it.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Driver:
    """What NVIDIA's driver says of itself.

    Attributes:
        cuda: the newest CUDA it can run, (major, minor).
        devices: GPUs it sees; those that CUDA_VISIBLE_DEVICES hides are not among them.
    """

    cuda: tuple[int, int]
    devices: int


def driver() -> Driver | None:
    """Ask NVIDIA's driver library, which needs neither torch nor a CUDA toolkit; None where there is none."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version, devices = ctypes.c_int(0), ctypes.c_int(0)
    library.cuDriverGetVersion(ctypes.byref(version))
    if library.cuInit(0) == 0:
        library.cuDeviceGetCount(ctypes.byref(devices))
    return Driver((version.value // 1000, version.value % 1000 // 10), devices.value)


def torch_built_for() -> str | None:
    """The CUDA version that the installed torch is built for, read from its ``version.py`` without importing it.

    Returns:
        "13.0"; "" for a build without CUDA; None where that cannot be told, or says nothing: a build for AMD's GPUs
        calls its devices "cuda" without any.
    """
    found = find_spec("torch")
    if found is None or not found.submodule_search_locations:
        return None
    try:
        text = Path(found.submodule_search_locations[0], "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    told = dict(re.findall(r"^(cuda|hip)\b[^=\n]*=\s*(\S+)", text, re.MULTILINE))
    if "cuda" not in told or told.get("hip", "None") != "None":
        return None
    return "" if told["cuda"] == "None" else str(told["cuda"]).strip("'\"")


def why_no_gpu(wanted: int = 1) -> str:
    """Why this process cannot use so many GPUs, in words; empty where it can, or where only torch can tell.

    Args:
        wanted: GPUs that are needed: 2 for the device "cuda:1".
    """
    if not sys.platform.startswith("linux"):
        return ""  # the driver's library has another name there
    built = torch_built_for()
    if built is None:
        return ""
    found = driver()
    if found is None:
        return "this machine has no NVIDIA driver (there is no libcuda.so.1)"
    if not found.devices:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        return "the driver sees none" if hidden is None else f"CUDA_VISIBLE_DEVICES={hidden!r} hides them"
    if not built:
        return "the torch that is installed is built without CUDA"
    if int(built.partition(".")[0]) > found.cuda[0]:
        return f"torch is built for CUDA {built}, and the driver runs CUDA up to {found.cuda[0]}.{found.cuda[1]}"
    if found.devices < wanted:
        return f"the driver sees {found.devices} GPU{'s' * (found.devices > 1)}"
    return ""
