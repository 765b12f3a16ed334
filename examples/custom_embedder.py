"""Two embedders of your own, on the demo's photographs: the short way and the long way.

    python examples/custom_embedder.py [FOLDER]

FOLDER keeps what is written; without it, a temporary folder is used.
"""

from __future__ import annotations

import io
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from torchvision import transforms

from curator_embed import load_embeddings
from curator_embed.cli.demo_data import build_demo_data
from curator_embed.datasets import ImageTextPairDataset
from curator_embed.embedders import ImageEmbedder


class Thumbnail(torch.nn.Module):
    """A model that needs no training: an 8x8 thumbnail, less its mean."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        small = torch.nn.functional.adaptive_avg_pool2d(images, 8).flatten(1)
        return small - small.mean(dim=1, keepdim=True)


class ThumbnailEmbedder(ImageEmbedder):
    """The short way: say what the model is. Broken images, resuming and all the rest come with the base class."""

    def load_embedding_model(self, device: str) -> Thumbnail:
        return Thumbnail().to(device)


class GreyEmbedder(ThumbnailEmbedder):
    """The long way: read the shard yourself, and give batches in whatever form the model takes."""

    def load_dataset_shard(self, tar_path: str) -> Iterable[tuple[torch.Tensor, dict[str, list[str]]]]:
        to_tensor = transforms.Compose([transforms.Resize((64, 64)), transforms.ToTensor()])
        with tarfile.open(tar_path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if extension in ("jpg", "png", "webp"):
                    try:
                        image = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("L")
                    except OSError:
                        continue  # left out: the row will say so
                    yield to_tensor(image)[None], {"key": [key]}


def main(folder: Path) -> None:
    data = build_demo_data(folder / "dataset", photographs=4)
    dataset = ImageTextPairDataset.from_webdataset(str(data.folder), id_col="key")

    squash = transforms.Compose(
        [transforms.Resize((224, 224)), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    )
    short = ThumbnailEmbedder("thumbnail", image_embedding_column="thumbnail", transform=squash)
    long = GreyEmbedder("grey thumbnail", image_embedding_column="grey")
    report = long(short(dataset)).save_metadata(str(folder / "embedded"))
    print(report)

    for column in ("thumbnail", "grey"):
        keys, vectors = load_embeddings(str(folder / "embedded"), column=column)
        print(f"{column}: {len(keys)} vectors of {vectors.shape[1]} values")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
