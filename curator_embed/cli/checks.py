"""What can be refused at once: a device that is not there, a model of no such name, weights that cannot be read.

Kept apart from the commands because all of it comes before torch is imported and before anything is started.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from curator_embed.errors import MissingExtra, UsageError

_DEVICE = re.compile(r"(?P<type>cpu|cuda|mps|xpu)(:(?P<index>\d+))?")


def check_device(device: str | None, *, here: bool) -> None:
    """See that a device can be meant, and that this machine has it if the work is done here.

    Args:
        here: the work is done by this machine's processes, and not on a cluster elsewhere.

    Raises:
        UsageError: it cannot be, or this machine has no such GPU.
    """
    if device is None:
        return
    asked = _DEVICE.fullmatch(device)
    if asked is None:
        raise UsageError(f"--device {device}: use cpu, cuda, or cuda:0 for one GPU of several")
    if asked["type"] == "cuda" and here:
        from curator_embed.execution.gpus import why_no_gpu

        why = why_no_gpu(int(asked["index"] or 0) + 1)
        if why:
            raise UsageError(
                f"--device {device} needs an NVIDIA GPU, and {why}. Run 'curator-embed doctor' to see what is missing, "
                "or use --device cpu"
            )


def check_decoder(decoder: str, *, here: bool) -> None:
    """See that DALI is installed where it is asked for.

    Raises:
        MissingExtra: it is not.
    """
    if decoder == "dali" and here and (find_spec("nvidia") is None or find_spec("nvidia.dali") is None):
        raise MissingExtra("nvidia-dali", "cuda13]' or 'curator-embed[cuda12", "--decoder dali")


def check_models(names: Iterable[str]) -> None:
    """See that timm or OpenAI has models of these names; what only timm can tell is left to it.

    Raises:
        UsageError: there is none; near names are given.
    """
    from curator_embed.embedders.names import check_name

    for name in names:
        check_name(name)


def check_weights(files: Iterable[Path]) -> None:
    """See that files of weights are there and can be opened.

    Raises:
        UsageError: one cannot.
    """
    for file in files:
        try:
            with open(file, "rb") as opened:
                opened.read(1)
        except OSError as error:
            raise UsageError(
                f"--weights {file}: cannot be read ({error.strerror}). Give the path of a safetensors file or of a "
                "state dict that torch.save wrote"
            ) from error


def check_place(path: str | None, storage_options: Mapping[str, Any]) -> None:
    """See that an output can be reached as far as packages go: the file system of its URL can be opened.

    Raises:
        UsageError: no file system goes by that name, or it refuses the storage options.
        MissingExtra: the package for such URLs is not installed.
    """
    if path is not None:
        from curator_embed.storage.files import filesystem, is_remote

        if is_remote(path):
            filesystem(path, storage_options)
