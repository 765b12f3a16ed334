"""Weights from files, read without running their code, fitted strictly, and identified by their contents."""

from __future__ import annotations

import hashlib
import pickle
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from curator_embed.errors import UsageError

StateDict = Mapping[str, torch.Tensor]

SHOWN = 5
"""Names per kind of mismatch that an error lists."""


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Read tensors by name from a safetensors file or a torch checkpoint (``weights_only=True``).

    A checkpoint's ``state_dict`` or ``model`` entry is taken where it has one, and the prefixes of
    DistributedDataParallel and ``torch.compile`` are removed.

    Raises:
        UsageError: no such file, or nothing that can be read safely.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"{file}: no such weights file. Give weights= the path of a safetensors or torch file")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded: Any = load_file(file)
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpicklers of untrusted files raise nearly everything
        raise UsageError(
            f"{file}: cannot be read as weights ({_first_line(error)}). It must be a .safetensors file or a state dict "
            "saved with torch.save; files that hold more than tensors are refused because loading them runs code"
        ) from error
    for entry in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(entry), Mapping):
            loaded = loaded[entry]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise UsageError(f"{file}: holds no state dict (tensors by name); save it with torch.save(model.state_dict())")
    return {str(name).removeprefix("module.").removeprefix("_orig_mod."): value for name, value in loaded.items()}


def load_weights(model: torch.nn.Module, path: str | Path, *, droppable: Sequence[str] = ()) -> None:
    """Fill every parameter and buffer of ``model`` from a file, or fail.

    Files in another of the formats that timm knows for the architecture (open_clip's, the authors') are converted by
    timm's own rules, which also resample position embeddings for another image size.

    Args:
        droppable: names of modules whose weights the file may hold in excess: the classifier of a headless model.

    Raises:
        UsageError: the weights do not fit; the message lists what is missing, unexpected or of another shape.
    """
    stored = read_state_dict(path)
    fitted = _without(stored, model, droppable)
    problems = _mismatch(model, fitted)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if problems and convert is not None:
        try:
            converted = _without(convert(dict(stored), model), model, droppable)
        except Exception:  # a converter given a foreign file fails anyhow; the plain mismatch tells more
            converted = fitted
        if not _mismatch(model, converted):
            fitted, problems = converted, []
    if problems:
        raise UsageError(
            f"{path}: these weights are not {type(model).__name__}'s: " + "; ".join(problems) + ". "
            "Give the model name (and image_size) that the weights were trained with"
        )
    model.load_state_dict(fitted, strict=False)


def state_dict_sha256(state: StateDict) -> str:
    """sha256 (hex) over names, dtypes, shapes and bytes in the order of names: the same for equal weights, however
    they were stored and in whatever memory layout they are."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _without(stored: StateDict, model: torch.nn.Module, droppable: Sequence[str]) -> dict[str, torch.Tensor]:
    own = model.state_dict()
    heads = tuple(f"{name}." for name in droppable)
    return {name: value for name, value in stored.items() if name in own or not name.startswith(heads)}


def _mismatch(model: torch.nn.Module, stored: StateDict) -> list[str]:
    own = model.state_dict()
    # Counts of training steps: of no effect on inference, and left out by some formats.
    missing = [name for name in own if name not in stored and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in stored if name not in own]
    misshapen = [
        f"{name} {list(stored[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in stored and stored[name].shape != own[name].shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
    return [f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds if names]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _first_line(error: BaseException) -> str:
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return "not a pickle of tensors"  # torch's own text tells how to switch the check off
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
