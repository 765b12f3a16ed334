"""What ``doctor`` says of machines that this one is not."""

from __future__ import annotations

import pytest
import torch

from curator_embed.cli import doctor
from curator_embed.cli.doctor import Driver, Finding, conclude


def gpu(
    monkeypatch: pytest.MonkeyPatch, driver: Driver | None, cuda: str | None, *, usable: bool = False
) -> dict[str, Finding]:
    """The findings about the GPU, with this driver and a torch of that build."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda n: f"H200 {n}")
    return {finding.what: finding for finding in doctor._gpu(driver)}


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu(monkeypatch, None, "13.2")
    assert [finding.state for finding in found.values()] == ["missing", "ok", "missing"]
    assert "works on the CPU" in found["gpu"].detail


def test_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu(monkeypatch, Driver((12, 4), 1), None)
    assert "up to 12.4" in found["nvidia driver"].detail
    assert found["torch for CUDA"].state == "missing"
    assert "torchvision 'curator-embed[cuda12]'" in found["torch for CUDA"].detail
    assert "driver sees 1, torch none" in found["gpu"].detail


def test_a_torch_too_new_for_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu(monkeypatch, Driver((12, 8), 1), "13.2")["torch for CUDA"]
    assert found.state == "missing"
    assert "too new" in found.detail and "'curator-embed[cuda12]'" in found.detail


def test_gpus_that_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES=''" in gpu(monkeypatch, Driver((13, 2), 0), "13.2")["gpu"].detail


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu(monkeypatch, Driver((13, 2), 2), "13.2", usable=True)
    assert {finding.state for finding in found.values()} == {"ok"}
    assert found["gpu"].detail == "H200 0, H200 1"


def test_dali_decodes_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda *names: "2.4.0")
    monkeypatch.setattr(doctor, "_present", lambda module: True)
    assert doctor._dali(Driver((13, 2), 1)).detail == "decoding on a GPU (2.4.0)"
    assert "CPU operators work; decoding on a GPU needs one" in doctor._dali(None).detail
    monkeypatch.setattr(doctor, "_version", lambda *names: "")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    absent = doctor._dali(Driver((12, 8), 1))
    assert (absent.state, absent.detail) == ("missing", "decoding on a GPU: pip install 'curator-embed[cuda12]'")


def test_both_extras_where_torch_tells_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    missing = doctor._optional((("no-such-package",), "no_such_module", doctor.CUDA, "nothing"))
    assert missing.detail == "nothing: pip install 'curator-embed[cuda13]' or pip install 'curator-embed[cuda12]'"


@pytest.mark.parametrize(
    ("states", "sentence"),
    [
        (
            {"nvidia driver": "missing", "torch for CUDA": "ok", "gpu": "missing"},
            "This machine embeds on its CPU and on no GPU (missing: nvidia driver, gpu); it reads from local disks.",
        ),
        (
            {"gpu": "ok", "nvidia-dali": "ok", "dask-cuda": "missing", "s3fs": "ok"},
            "This machine embeds on its GPU (one GPU only), decoding there, too; it reads from local disks, S3.",
        ),
        (
            {"gpu": "ok", "nvidia-dali": "missing", "dask-cuda": "ok", "gcsfs": "ok"},
            "This machine embeds on its GPU, decoding on its CPU; it reads from local disks, Google Cloud Storage.",
        ),
        ({"timm": "broken", "gpu": "ok"}, "Nothing works before these are put right: timm."),
    ],
)
def test_the_conclusion(states: dict[str, str], sentence: str) -> None:
    assert conclude([Finding(what, state, "") for what, state in states.items()]) == sentence
