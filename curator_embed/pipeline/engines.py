"""The decode engines: every image decoded once, shown to every step that wants it.

Pillow one image at a time, or DALI a batch at a time with Pillow beside it for what DALI cannot do.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from curator_embed.decoding.pillow import DecodeOptions, decode
from curator_embed.errors import CuratorEmbedError, ImageError, Reason, StepError, UsageError
from curator_embed.pipeline.pipeline import Prepared
from curator_embed.steps import BatchStep, ImageStep, Step

if TYPE_CHECKING:
    from curator_embed.decoding.dali import Admitted
    from curator_embed.decoding.spec import PreprocessSpec

log = logging.getLogger(__name__)


class CpuEngine:
    """Pillow decodes, steps prepare. Stateless: any number of threads may call it."""

    chunk = 1

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = tuple(steps)
        self.options = agreed_decode(steps)
        self._columns = [frozenset(step.columns()) for step in steps]
        self._told: set[tuple[type, type]] = set()

    def prepare(self, encoded: Sequence[bytes], wanted: Sequence[tuple[int, ...]]) -> list[Prepared]:
        """Decode and prepare; see ``DecodeEngine``."""
        return [self._one(data, positions) for data, positions in zip(encoded, wanted, strict=True)]

    def _one(self, encoded: bytes, positions: tuple[int, ...]) -> Prepared:
        result = Prepared()
        try:
            image = decode(encoded, self.options.limits, honour_exif=self.options.honour_exif)
        except ImageError as error:
            result.error = error.reason
            return result
        result.decoder = "pillow"
        for position in positions:
            step = self.steps[position]
            try:
                if isinstance(step, BatchStep):
                    result.tensors[position] = step.prepare(image)
                elif isinstance(step, ImageStep):
                    result.values[position] = self._checked(position, step.measure(image))
            except ImageError as error:
                result.error = result.error or error.reason
            except CuratorEmbedError:
                raise
            except Exception as error:  # a step's own bug costs the row, not the run; the log has it once
                result.error = result.error or Reason.EMBED_ERROR
                self._tell(step, error)
        return result

    def _checked(self, position: int, values: Any) -> Mapping[str, Any]:
        """What an image step gave, once it is seen that all of it has a column.

        Raises:
            StepError: it has not.
        """
        own = self._columns[position]
        if isinstance(values, Mapping) and values.keys() <= own:
            return values
        name = type(self.steps[position]).__name__
        if not isinstance(values, Mapping):
            raise StepError(f"{name}.measure must give values by column, a dict, and gave {type(values).__name__}")
        foreign = next(key for key in values if key not in own)
        raise StepError(
            f"{name}.measure gave a value for {foreign!r}, which is no column of its own ({', '.join(sorted(own))}). "
            "Correct the key, or name it in columns()"
        )

    def _tell(self, step: Step, error: Exception) -> None:
        kind = type(step), type(error)
        if kind not in self._told:
            self._told.add(kind)
            said = "%s failed on an image; such rows carry '%s'"
            log.warning(said, type(step).__name__, Reason.EMBED_ERROR, exc_info=error)


class DaliEngine:
    """DALI decodes and resizes for the embedders; Pillow takes what DALI cannot read, and what other steps want to see.

    A row's result depends on its own bytes alone: DALI refuses the same images in any company, and those are Pillow's.

    Args:
        steps: the job's.
        device: where the models run, "cuda" for a GPU; "cpu" runs the same graph with CPU operators, for tests.
        threads: of Pillow, and of each DALI pipeline.

    Raises:
        MissingExtra: DALI is not installed.
    """

    MOST_AT_A_TIME = 256

    def __init__(self, steps: Sequence[Step], *, device: str, threads: int) -> None:
        from curator_embed.decoding.dali import DaliDecoder

        self._pillow = CpuEngine(steps)
        specs = {position: spec for position, step in enumerate(steps) if (spec := _spec_for_dali(step)) is not None}
        self._positions = tuple(specs)
        batches = [step.batch_size for step in steps if isinstance(step, BatchStep)]
        self.chunk = min(max(batches, default=64), self.MOST_AT_A_TIME)
        self._decoder = DaliDecoder(
            tuple(specs.values()),
            device=device,
            batch_size=self.chunk,
            threads=threads,
            honour_exif=self._pillow.options.honour_exif,
            limits=self._pillow.options.limits,
        )
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="beside-dali")

    def prepare(self, encoded: Sequence[bytes], wanted: Sequence[tuple[int, ...]]) -> list[Prepared]:
        """Decode and prepare; see ``DecodeEngine``."""
        admitted: dict[int, Admitted] = {}
        beside: dict[int, Future[Prepared]] = {}
        for row, (data, positions) in enumerate(zip(encoded, wanted, strict=True)):
            others = tuple(position for position in positions if position not in self._positions)
            plan = self._decoder.admit(data) if len(others) < len(positions) else None
            if plan is not None:
                admitted[row] = plan
            if plan is None or others:
                beside[row] = self._pool.submit(self._with_pillow, data, positions if plan is None else others)
        tensors = dict(zip(admitted, self._decoder.decode(list(admitted.values())), strict=True))
        refused = [row for row, made in tensors.items() if made is None]
        for row in refused:
            beside[row] = self._pool.submit(self._with_pillow, encoded[row], wanted[row])
        return [
            self._merged(wanted[row], tensors.get(row), beside[row].result() if row in beside else None)
            for row in range(len(encoded))
        ]

    def _merged(self, positions: tuple[int, ...], by_dali: Any, beside: Prepared | None) -> Prepared:
        if by_dali is None:
            assert beside is not None
            return beside
        if beside is not None and beside.decoder is None:
            return beside  # Pillow finds it broken: then it is, whatever DALI made of it
        result = beside or Prepared()
        result.decoder = "dali"
        for position, tensor in zip(self._positions, by_dali, strict=True):
            if position in positions:
                result.tensors[position] = tensor
        return result

    def _with_pillow(self, data: bytes, positions: tuple[int, ...]) -> Prepared:
        """Decode on the CPU; what shares batches with DALI's images is brought to where those are."""
        (result,) = self._pillow.prepare([data], [positions])
        for position in self._positions:
            if position in result.tensors:
                result.tensors[position] = self._decoder.to_device(result.tensors[position])
        return result


def _spec_for_dali(step: Step) -> PreprocessSpec | None:
    """What DALI can do in a step's place; None for steps that must see the image."""
    from curator_embed.decoding.dali import FILTERS

    spec = step.pixels() if isinstance(step, BatchStep) else None
    return spec if spec is not None and spec.interpolation in FILTERS else None


def agreed_decode(steps: Sequence[Step]) -> DecodeOptions:
    """What the steps ask of the one decode they share.

    Raises:
        UsageError: they ask for different ones.
    """
    asked: dict[DecodeOptions, str] = {}
    for step in steps:
        options = step.decode_options()
        if options is not None:
            asked.setdefault(options, type(step).__name__)
    if len(asked) > 1:
        raise UsageError(
            "all steps of a run share one decode, but they ask for different ones: "
            + "; ".join(f"{name}: {it.limits}, honour_exif={it.honour_exif}" for it, name in asked.items())
            + ". Give them the same limits and honour_exif, or save one before adding the other"
        )
    return next(iter(asked), DecodeOptions())
