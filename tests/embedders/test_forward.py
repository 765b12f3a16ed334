"""The model runner: one shape, the same bits, short memory, mixed kinds of models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from curator_embed.decoding.spec import OpaqueTransform, PreprocessSpec
from curator_embed.embedders.catalogue import Blueprint
from curator_embed.embedders.forward import (
    ForwardOptions,
    ModelRunner,
    cpu_compiler_found,
    intra_op_threads,
    prefers_channels_last,
)
from curator_embed.errors import CuratorEmbedError, UsageError

SPEC = PreprocessSpec("squash", (32, 32), (32, 32), "bilinear", (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def images(count: int, side: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=generator) for _ in range(count)]


def options(batch_size: int = 4, **changes: object) -> ForwardOptions:
    return ForwardOptions(**{"device": "cpu", "batch_size": batch_size, "spec": SPEC, **changes})  # type: ignore[arg-type]


class Recorder:
    """Returns its input's first values, and remembers the shapes it saw."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(batch.shape))
        return batch.flatten(1)[:, :7]


def test_every_pass_has_one_shape_and_normalised_input() -> None:
    model, four = Recorder(), images(4)
    runner = ModelRunner(model, options(normalize=False))
    whole, part = runner(four), runner(four[1:3])
    assert model.shapes == [(4, 3, 32, 32)] * 2
    assert whole.shape == (4, 7) and part.shape == (2, 7)
    assert np.array_equal(part, whole[1:3])
    expected = (four[0].float() / 255 - torch.tensor(SPEC.mean).view(3, 1, 1)) / torch.tensor(SPEC.std).view(3, 1, 1)
    np.testing.assert_allclose(whole[0], expected.flatten()[:7].numpy(), atol=1e-6)


def test_results_are_unit_float32_or_cast_after_normalising() -> None:
    two = images(2)
    plain = ModelRunner(Recorder(), options())(two)
    half = ModelRunner(Recorder(), options(dtype="float16"))(two)
    assert plain.dtype == np.float32 and half.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(plain, axis=1), 1, atol=1e-6)
    assert np.array_equal(half, plain.astype(np.float16))
    zeros = ModelRunner(lambda batch: torch.zeros(len(batch), 5), options())(two)
    assert np.array_equal(zeros, np.zeros((2, 5)))


def test_results_do_not_share_memory_with_the_next_batch() -> None:
    runner = ModelRunner(Recorder(), options(normalize=False))
    four = images(4)
    first = runner(four)
    before = first.copy()
    runner(four[::-1])
    assert np.array_equal(first, before)


REPEATED = ("test_vit", "test_resnet", "test_convnext")


def repeated(name: str) -> tuple[ModelRunner, list[torch.Tensor]]:
    blueprint = Blueprint.of(name)
    settings = ForwardOptions("cpu", 8, blueprint.spec(), threads=2)
    return ModelRunner(blueprint.build(), settings), images(8, blueprint.native_size)


@pytest.mark.parametrize("name", REPEATED)
def test_neighbours_and_position_change_no_bit(name: str) -> None:
    runner, eight = repeated(name)
    whole = runner(eight)
    assert np.array_equal(runner(eight[::-1])[::-1], whole)
    assert np.array_equal(runner(eight[3:4])[0], whole[3])
    assert np.array_equal(repeated(name)[0](eight), whole)


def test_random_weights_and_embeddings_are_the_same_in_another_process() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_forward import REPEATED, repeated\n"
        "for name in REPEATED:\n"
        "    runner, eight = repeated(name)\n"
        "    sys.stdout.buffer.write(runner(eight).tobytes())"
    )
    here = Path(__file__).resolve()
    environment = {**os.environ, "PYTHONPATH": str(here.parents[2])}
    there = subprocess.run([sys.executable, "-c", code, str(here.parent)], env=environment, capture_output=True)
    assert there.returncode == 0, there.stderr.decode()
    assert there.stdout == b"".join(runner(eight).tobytes() for runner, eight in map(repeated, REPEATED))


def test_convolutions_run_channels_last() -> None:
    seen: list[bool] = []

    class Net(torch.nn.Module):
        def __init__(self, kernel: int, stride: int) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, kernel, stride)

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            seen.append(batch.is_contiguous(memory_format=torch.channels_last))
            result: torch.Tensor = self.conv(batch).mean((2, 3))
            return result

    overlapping, patches = Net(3, 1), Net(8, 8)
    assert prefers_channels_last(overlapping) and not prefers_channels_last(patches)
    for net in (overlapping, patches):
        ModelRunner(net, options())(images(3))
    assert seen == [True, False]


class ShortOfMemory:
    """Raises like CUDA above a number of rows; what it computes depends on one row alone."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.rows: list[int] = []

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        if len(batch) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.rows.append(len(batch))
        return batch.flatten(1)[:, :5]


@pytest.mark.parametrize(("batch_size", "most", "settled"), [(16, 4, 4), (16, 5, 4), (10, 3, 3), (7, 1, 1)])
def test_out_of_memory_halves_the_batch_for_good_and_is_told(batch_size: int, most: int, settled: int) -> None:
    model = ShortOfMemory(most)
    runner = ModelRunner(model, options(batch_size))
    some = images(batch_size)
    result = runner(some)
    expected = ModelRunner(ShortOfMemory(99), options(batch_size))(some)
    assert np.array_equal(result, expected)
    assert set(model.rows) == {settled}
    told = runner.exceptions()
    assert told and told[0].startswith(f"batch halved from {batch_size} to ")
    assert np.array_equal(runner(some[:2]), expected[:2])
    assert runner.exceptions() == told
    assert runner.batch_size == batch_size


def test_not_even_one_image_fits() -> None:
    with pytest.raises(CuratorEmbedError, match="smaller model"):
        ModelRunner(ShortOfMemory(0), options())(images(1))


def test_other_errors_are_not_taken_for_short_memory() -> None:
    def broken(batch: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        ModelRunner(broken, options())(images(1))


@pytest.mark.parametrize("result", [torch.zeros(4), torch.zeros(4, 2, 2), torch.zeros(3, 2)])
def test_a_model_must_return_one_vector_an_image(result: torch.Tensor) -> None:
    with pytest.raises(UsageError, match="one vector an image"):
        ModelRunner(lambda batch: result, options())(images(4))


def test_arrays_are_as_good_as_tensors() -> None:
    result = ModelRunner(lambda batch: batch.flatten(1)[:, :3].numpy(), options(normalize=False))(images(2))
    assert np.array_equal(result, ModelRunner(Recorder(), options(normalize=False))(images(2))[:, :3])


def test_bad_batches_are_refused() -> None:
    runner = ModelRunner(Recorder(), options())
    for wrong, message in (([], "1 to 4"), (images(5), "1 to 4"), ([*images(1), *images(1, 16)], "differ in shape")):
        with pytest.raises(UsageError, match=message):
            runner(wrong)


def test_images_of_an_opaque_transform_are_not_normalised_again() -> None:
    spec = OpaqueTransform(lambda image: torch.zeros(3, 2, 2), "a lambda")
    runner = ModelRunner(Recorder(), options(spec=spec, normalize=False))
    values = torch.arange(12.0).view(3, 2, 2)
    assert np.array_equal(runner([values])[0], np.arange(7, dtype=np.float32))


def test_threads_are_those_asked_for_and_put_back() -> None:
    seen: list[int] = []

    def model(batch: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return batch.flatten(1)[:, :2]

    with intra_op_threads(2):
        ModelRunner(model, options(threads=1))(images(1))
        assert seen == [1]
        assert torch.get_num_threads() == 2


def test_what_does_not_compile_runs_as_it_is_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> object:
        def run(batch: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no compiler\nsecond line")

        return run

    monkeypatch.setattr(torch, "compile", refuse)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 4))
    runner = ModelRunner(net, options(compile=True))
    assert runner.exceptions() == ["not compiled: RuntimeError: no compiler"]
    assert np.array_equal(runner(images(2)), ModelRunner(net, options())(images(2)))


@pytest.mark.skipif(not cpu_compiler_found(), reason="no C++ compiler or no Python headers")
def test_compiled_is_close_to_eager_and_repeats_its_bits() -> None:
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, 2),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(1800, 6),
    )
    four = images(4)
    compiled = ModelRunner(net, options(compile=True, threads=2))
    result = compiled(four)
    assert compiled.exceptions() == []
    np.testing.assert_allclose(result, ModelRunner(net, options(threads=2))(four), atol=1e-5)
    assert np.array_equal(compiled(four[::-1])[::-1], result)
    assert np.array_equal(compiled(four[2:3])[0], result[2])
