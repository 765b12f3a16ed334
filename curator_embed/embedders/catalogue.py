"""Which models there are and how each is built: names, heads, input sizes, dimensions.

Everything is derived from timm's configuration and from models on the meta device, which cost no memory and no
arithmetic; no list of names but OpenAI's.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from curator_embed.decoding.spec import PreprocessSpec, openai_spec, spec_from_timm
from curator_embed.embedders.forward import prefers_channels_last
from curator_embed.embedders.names import unknown_model
from curator_embed.embedders.openai_clip import TOWERS
from curator_embed.embedders.weights import load_weights
from curator_embed.errors import CuratorEmbedError, UsageError

MEASURED_ARCHITECTURES = 24
"""``list_models`` builds at most this many on the meta device (0.1 s each) to learn their dimension."""

SIZES_TRIED = 8
"""How many sizes an error message looks at on either side of one that does not fit."""

_seeding = threading.Lock()


@dataclass(frozen=True)
class Blueprint:
    """A model that a name stands for, not built yet.

    Attributes:
        name: as the user wrote it, timm's or OpenAI's.
        timm_name: timm's, with its pretrained tag if it has one.
        image_size: pixels of a square input instead of the configured one.
    """

    name: str
    timm_name: str
    image_size: int | None = None

    @classmethod
    def of(cls, name: str, image_size: int | None = None) -> Blueprint:
        """Look a name up and check that the image size fits.

        Raises:
            UsageError: no such model (near names are given), or the size does not fit (sizes that do are given).
        """
        blueprint = cls(name, _timm_name(name))
        if image_size is None or image_size == blueprint.native_size:
            return blueprint
        if not isinstance(image_size, int) or isinstance(image_size, bool) or image_size < 1:
            raise UsageError(f"image_size must be a positive whole number of pixels, not {image_size!r}")
        resized = cls(name, blueprint.timm_name, image_size)
        if not resized._fits():
            sizes = ", ".join(map(str, sorted(blueprint._sizes_near(image_size))))
            patch = f" of {patch_size} pixels" if (patch_size := blueprint.patch_size) else ""
            raise UsageError(
                f"image_size={image_size} does not fit {name} (patches or strides{patch} must fill it). "
                f"Nearest sizes that do: {sizes}"
            )
        return resized

    def __getstate__(self) -> dict[str, Any]:
        """Only the fields travel: what is cached beside them is large and quickly found again."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def config(self) -> Any:
        """timm's ``PretrainedCfg``."""
        from timm.models import get_pretrained_cfg

        return get_pretrained_cfg(self.timm_name)

    @property
    def is_openai(self) -> bool:
        """Whether the name is OpenAI's, and so promises OpenAI's preprocessing."""
        return self.name in TOWERS

    @property
    def projects(self) -> bool:
        """Whether the configured "head" is a projection into an embedding space, to be kept, and no classifier.

        Told by its width: embedding spaces are multiples of 64 up to 2048 wide, and no label set is (1000, 11821,
        21841, ...). Checked against all pretrained tags of timm 1.0.
        """
        width = self.config.num_classes or 0
        return 0 < width <= 2048 and width % 64 == 0

    @property
    def native_size(self) -> int:
        """Height and width of the configured input."""
        return int(self.config.input_size[-1])

    @property
    def patch_size(self) -> int | None:
        """Side of a patch in pixels; None for models that do not cut the image into patches."""
        named = re.search(r"_patch(\d+)", self.timm_name)
        if named:
            return int(named[1])
        side = getattr(getattr(self.meta, "patch_embed", None), "patch_size", None)
        side = side[0] if isinstance(side, tuple | list) else side
        return side if isinstance(side, int) and side > 1 else None

    @property
    def droppable(self) -> tuple[str, ...]:
        """Names of the classifier modules that the built model lacks and a weights file may have."""
        classifier = self.config.classifier or ()
        return () if self.projects else (classifier,) if isinstance(classifier, str) else tuple(classifier)

    def spec(self) -> PreprocessSpec:
        """The preprocessing that the name promises."""
        if self.is_openai:
            return openai_spec(self.image_size or self.native_size)
        return spec_from_timm(self.config, self.image_size)

    @cached_property
    def meta(self) -> torch.nn.Module:
        """The model without memory, for questions about its structure."""
        with torch.device("meta"):
            return self._create(pretrained=False).eval()

    @cached_property
    def is_convolutional(self) -> bool:
        """Whether convolutions make up the model: what decides about memory layout and compiling."""
        return prefers_channels_last(self.meta)

    @cached_property
    def dim(self) -> int:
        """Length of an embedding.

        Raises:
            UsageError: the model gives something else than one vector an image.
        """
        try:
            shape = self._shape_on(self.meta)
        except Exception:  # some models compute sizes from values, which the meta device does not have
            shape = self._shape_on(self.build())
        if len(shape) != 2:
            raise UsageError(f"{self.name} gives {tuple(shape[1:])} values an image, not one vector; choose another")
        return int(shape[1])

    def build(self, *, pretrained: bool = False, weights: str | Path | None = None) -> torch.nn.Module:
        """Build the model on the CPU, in eval mode.

        Args:
            pretrained: download timm's weights, unless ``weights`` is given.
            weights: a safetensors file or a torch state dict. With neither, weights are random and the same in
                every process.

        Raises:
            UsageError: the weights do not fit, or the name has none to download.
            CuratorEmbedError: the download failed.
        """
        if pretrained and weights is None:
            return self._download().eval()
        with _seeding, torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self._create(pretrained=False)
        if weights is not None:
            load_weights(model, weights, droppable=self.droppable)
        return model.eval()

    def _create(self, *, pretrained: bool) -> torch.nn.Module:
        import timm

        args: dict[str, Any] = {} if self.projects else {"num_classes": 0}
        # Nets that take any size have no such argument; the others are built for one.
        if self.image_size is not None and self.config.fixed_input_size:
            args["img_size"] = self.image_size
        model: torch.nn.Module = timm.create_model(self.timm_name, pretrained=pretrained, **args)
        return model

    def check_pretrained(self) -> None:
        """See that there are weights to download, without downloading any.

        Raises:
            UsageError: there are none under this name; names of the architecture that have some are given.
        """
        if self.config.has_weights:
            return
        import timm

        tagged = timm.list_models(f"{self.timm_name.partition('.')[0]}.*", pretrained=True)
        if tagged:
            raise UsageError(
                f"there are no pretrained weights of {self.name}; choose {' or '.join(tagged[:4])}, "
                "or pass weights=PATH"
            )
        raise UsageError(
            f"there are no pretrained weights of {self.name}; pass weights=PATH, or choose one of the models that "
            "'curator-embed models' lists"
        )

    def _download(self) -> torch.nn.Module:
        self.check_pretrained()
        hub = self.config.hf_hub_id
        try:
            if hub:
                _ask_hub(hub, self.config.hf_hub_filename)
        except Exception as error:  # its library has had three network libraries below it, each with its own errors
            raise CuratorEmbedError(
                f"the hub could not be reached for the weights of {self.name} ({_in_short(error)}). Check the network, "
                f"or download {hub} elsewhere and pass weights=PATH. Or run 'hf download {hub}' where there is a "
                "network, bring its cache (HF_HOME) here and set HF_HUB_OFFLINE=1"
            ) from error
        try:
            return self._create(pretrained=True)
        except Exception as error:  # hub, network and file errors of several libraries
            raise CuratorEmbedError(
                f"the weights of {self.name} could not be downloaded ({_in_short(error)}). Check the network, or "
                f"download {hub or self.config.url} elsewhere and pass weights=PATH"
            ) from error

    def _shape_on(self, model: torch.nn.Module) -> torch.Size:
        device = next(model.parameters()).device
        with torch.inference_mode():
            shape: torch.Size = model(torch.zeros(1, 3, *self.spec().output, device=device)).shape
        return shape

    def _fits(self) -> bool:
        size = self.image_size
        assert size is not None
        if size % (self._patch_or_one()):
            return False
        try:
            self._shape_on(self.meta)
        except Exception:
            # Not to be judged on the meta device when it does not run there at its own size either.
            return not Blueprint(self.name, self.timm_name)._runs_on_meta()
        return True

    def _patch_or_one(self) -> int:
        return Blueprint(self.name, self.timm_name).patch_size or 1

    def _runs_on_meta(self) -> bool:
        try:
            self._shape_on(self.meta)
        except Exception:
            return False
        return True

    def _sizes_near(self, wanted: int) -> Iterator[int]:
        """The nearest size that fits on either side of ``wanted``, as far as a short search finds one."""
        step = self.patch_size or 32
        for direction, start in ((-1, wanted // step), (1, -(-wanted // step))):
            for size in ((start + direction * tries) * step for tries in range(SIZES_TRIED)):
                if size > 0 and (size == self.native_size or Blueprint(self.name, self.timm_name, size)._fits()):
                    yield size
                    break
            else:
                if (self.native_size - wanted) * direction > 0:
                    yield self.native_size


def _ask_hub(repository: str, file: str | None) -> None:
    """Ask the hub once for a file that is not in the cache; raises what its library raises when nobody answers.

    A download asks six times for each name that the file may have: a minute where there is no network.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    name, _, revision = repository.partition("@")
    names = [file] if file else ["model.safetensors", "pytorch_model.bin"]
    if any(isinstance(try_to_load_from_cache(name, one, revision=revision or None), str) for one in names):
        return
    with suppress(HfHubHTTPError):  # an answer: the download tells what it means
        get_hf_file_metadata(hf_hub_url(name, names[0], revision=revision or None))


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One line of ``list_models``.

    Attributes:
        name: what ``TimmImageEmbedder`` takes.
        input_size: "224x224", height first.
        dim: length of an embedding; None where it was not looked up.
        patch_size: in pixels; None for nets without patches, or where it was not looked up.
        understood: whether the preprocessing is one of the engines' own.
    """

    name: str
    input_size: str
    dim: int | None
    patch_size: int | None
    understood: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def list_models(pattern: str = "*") -> list[ModelRow]:
    """Models with pretrained weights whose name matches a glob, OpenAI's names first.

    Dimensions are looked up by building models on the meta device, unless more than ``MEASURED_ARCHITECTURES``
    architectures match; then only those that the configuration tells (projections) are given.
    """
    names = listed_names(pattern)
    blueprints = [Blueprint(name, TOWERS.get(name, name)) for name in names]
    architectures = {(b.timm_name.partition(".")[0], b.projects) for b in blueprints}
    look_up = len(architectures) <= MEASURED_ARCHITECTURES
    known: dict[tuple[str, bool, int], tuple[int | None, int | None]] = {}
    rows = []
    for blueprint in blueprints:
        dim = blueprint.config.num_classes if blueprint.projects else None
        named = re.search(r"_patch(\d+)", blueprint.timm_name)
        patch = int(named[1]) if named else None
        try:
            spec = blueprint.spec()
        except UsageError:
            size = "x".join(map(str, blueprint.config.input_size[1:]))
            rows.append(ModelRow(blueprint.name, size, dim, patch, understood=False))
            continue
        if look_up:
            key = blueprint.timm_name.partition(".")[0], blueprint.projects, blueprint.config.num_classes
            if key not in known:
                with suppress(UsageError):  # no single vector: no dimension to tell
                    dim = blueprint.dim
                known[key] = dim, blueprint.patch_size
            dim, patch = known[key]
        rows.append(ModelRow(blueprint.name, "x".join(map(str, spec.output)), dim, patch, understood=True))
    return rows


def listed_names(pattern: str = "*") -> list[str]:
    """Names of models with pretrained weights that match a glob, OpenAI's first."""
    import timm

    return [name for name in TOWERS if fnmatchcase(name, pattern)] + list(timm.list_models(pattern, pretrained=True))


def _timm_name(name: str) -> str:
    """Check a model name and translate OpenAI's to timm's.

    Raises:
        UsageError: there is none; near names are given.
    """
    import timm
    from timm.models import get_pretrained_cfg

    if name in TOWERS:
        return TOWERS[name]
    architecture, _, tag = name.partition(".")
    tagged: list[str] = []
    if timm.is_model(architecture):
        tagged = timm.list_models(f"{architecture}.*", pretrained=True)
        with suppress(RuntimeError):  # what timm raises for a tag it does not know
            if not tag or get_pretrained_cfg(name, allow_unregistered=False) is not None:
                return name
    known = tagged or [*TOWERS, *timm.list_models(pretrained=True), *timm.list_models()]
    raise unknown_model(name, known, tagged)
