"""What a run says of its certificate: on the terminal, in the report, and plainly where the figures do not hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from curator_embed.datasets import ImageTextPairDataset
from curator_embed.decoding.parity import ParityReport, compare
from curator_embed.decoding.reference import transform_of
from curator_embed.decoding.spec import PreprocessSpec
from curator_embed.embedders import TimmImageEmbedder
from tests.stub import ColourEmbedder

MODEL = "test_resnet.r160_in1k"


class Differs(TimmImageEmbedder):
    """Its model's authors would have interpolated otherwise: real pixels that are far apart."""

    def certify(self, images: Sequence[bytes]) -> ParityReport:
        assert isinstance(self.spec, PreprocessSpec)
        return compare(images, self.spec, transform_of(dataclasses.replace(self.spec, interpolation="nearest")))


def test_figures_that_do_not_hold_are_told_plainly(source: Path, tmp_path: Path) -> None:
    pending = Differs(MODEL, compile=False)(ImageTextPairDataset.from_webdataset(str(source)))
    report = pending.save_metadata(str(tmp_path / "out"), certify=True, progress=False)
    assert report.certificate["image_embedding"]["holds"] is False
    text = str(report)
    assert "certified      image_embedding: DIFFERS from the model's own preprocessing on" in text
    assert "note           certify: 'image_embedding' does not agree with the model's own preprocessing" in text
    assert any("does not agree" in note for note in report.to_dict()["notes"])
    assert report.embedded > 0, "the run itself is done"


def test_what_cannot_be_compared_is_told_too(source: Path, tmp_path: Path) -> None:
    pending = ColourEmbedder()(ImageTextPairDataset.from_webdataset(str(source)))
    report = pending.save_metadata(str(tmp_path / "out"), certify=True, progress=False)
    assert report.certificate == {} and "has no preprocessing to be compared with" in str(report)
