"""``curator-embed demo``: the main job on real photographs, and a picture of what came out."""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import typer

from curator_embed.cli.demo_data import ORIGINAL, DemoData, build_demo_data
from curator_embed.report import Group, Tile, contact_sheet, nearest

NEIGHBOURS = 5


@dataclass(frozen=True)
class DemoResult:
    """What the demo made and found.

    Attributes:
        run: the run's report, as ``RunReport.to_dict`` gives it.
        same_photograph: images whose nearest neighbour shows the same photograph, out of ``images``.
        own_original: variants whose nearest original is their own, out of ``variants``.
        picture: the sheet of neighbours.
    """

    data: DemoData
    run: dict[str, Any]
    images: int
    same_photograph: int
    variants: int
    own_original: int
    embeddings: Path
    picture: Path
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}
        data = {name: str(value) if isinstance(value, Path) else value for name, value in vars(self.data).items()}
        return {**plain, "data": data, "seconds": round(self.seconds, 2)}


def run_demo(out: str | Path = "demo-output", *, as_json: bool = False, photographs: int | None = None) -> DemoResult:
    """Build a webdataset of real photographs, embed it, and draw each beside its nearest neighbours.

    Args:
        out: folder for all of it: ``dataset/``, ``weights/``, ``embeddings/`` and ``neighbours.png``. A second run
            in the same folder finds its shards finished and only draws.
        as_json: print the result as JSON, and nothing else.
        photographs: use only the first so many photographs.

    Raises:
        MissingExtra: the photographs' or the weights' packages are not installed.
    """
    from curator_embed.datasets import ImageTextPairDataset, load_embeddings
    from curator_embed.embedders import TimmImageEmbedder, efficientnet_lite0_weights
    from curator_embed.embedders.lite0 import MODEL

    started, out = time.perf_counter(), Path(out)

    def say(text: str = "") -> None:
        if not as_json:
            typer.echo(text)

    data = build_demo_data(out / "dataset", photographs=photographs)
    say(f"1. A webdataset of {data.photographs} photographs in {data.variants} variants each, in {data.folder}")
    say(f"   {data.rows} rows in {data.shards} shards; {data.missing} rows have no image, {data.broken} a broken one")
    say(f"2. Embedding it with {MODEL}, pretrained on ImageNet")
    embedder = TimmImageEmbedder(MODEL, weights=efficientnet_lite0_weights(out / "weights"))
    embeddings = out / "embeddings"
    dataset = ImageTextPairDataset.from_webdataset(str(data.folder), id_col="key")
    report = embedder(dataset).save_metadata(str(embeddings), progress=not as_json)
    say("\n".join(f"   {line}" for line in str(report).splitlines()))

    keys, vectors = load_embeddings(str(embeddings))
    table = pq.read_table(embeddings, columns=["key", "photograph", "variant"]).to_pylist()
    rows = {row["key"]: row for row in table}
    shown = np.array([rows[key]["photograph"] for key in keys])
    variant = np.array([rows[key]["variant"] for key in keys])

    neighbours, _ = nearest(vectors, 1)
    originals = np.flatnonzero(variant == ORIGINAL)
    others = np.flatnonzero(variant != ORIGINAL)
    closest = originals[(vectors[others] @ vectors[originals].T).argmax(axis=1)]
    picture = out / "neighbours.png"
    _draw(dataset, keys, vectors, shown, variant).save(picture)
    result = DemoResult(
        data=data,
        run=report.to_dict(),
        images=len(keys),
        same_photograph=int((shown[neighbours[:, 0]] == shown).sum()),
        variants=len(others),
        own_original=int((shown[closest] == shown[others]).sum()),
        embeddings=embeddings,
        picture=picture,
        seconds=time.perf_counter() - started,
    )
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
    say("3. Looking at neighbours, by cosine similarity")
    say(f"   {result.same_photograph} of {result.images} images: the nearest neighbour shows the same photograph")
    say(f"   {result.own_original} of {result.variants} variants: the nearest original is their own")
    say(f"Look at    {result.picture}")
    say(f"Read       {result.embeddings} (parquet, one file per shard)")
    say(f"Took       {result.seconds:.0f} s")
    return result


def _draw(
    dataset: Any,
    keys: npt.NDArray[Any],
    vectors: npt.NDArray[np.floating],
    shown: npt.NDArray[np.str_],
    variant: npt.NDArray[np.str_],
) -> Any:
    """Each original, its nearest neighbours, and the nearest that shows another photograph."""
    originals = sorted(np.flatnonzero(variant == ORIGINAL).tolist(), key=lambda row: str(shown[row]))
    found, cosines = nearest(vectors, len(vectors) - 1, originals)
    ranked = [
        list(zip(rows, scores, strict=True)) for rows, scores in zip(found.tolist(), cosines.tolist(), strict=True)
    ]
    near = [pairs[:NEIGHBOURS] for pairs in ranked]
    other = [
        [(row, score) for row, score in pairs if shown[row] != shown[query]][:1]
        for query, pairs in zip(originals, ranked, strict=True)
    ]
    images = _images(dataset, {keys[row] for row in originals} | {keys[row] for g in near + other for row, _ in g})

    def tile(row: int, score: float, query: int) -> Tile:
        same = bool(shown[row] == shown[query])
        return Tile(images[keys[row]], (f"{shown[row]}, {variant[row]}", f"{keys[row]}   {score:.3f}"), marked=same)

    groups = [
        Group(
            Tile(images[keys[query]], (str(shown[query]), str(keys[query]))),
            [tile(row, score, query) for row, score in near[number]],
            [tile(row, score, query) for row, score in other[number]],
        )
        for number, query in enumerate(originals)
    ]
    return contact_sheet(
        groups,
        title="Photographs and their nearest neighbours",
        subtitle=f"{len(keys)} images embedded with EfficientNet-Lite0; below each its key and the cosine similarity",
        headings=("photograph", "nearest in the whole dataset", "nearest other photograph"),
        legend="a variant of the same photograph",
    )


def _images(dataset: Any, keys: Collection[str]) -> dict[str, bytes]:
    """The encoded images of these keys, from the dataset's shards."""
    return {
        sample.key: sample.image
        for shard in dataset.shards
        for sample in shard.samples(id_col=dataset.id_col)
        if sample.key in keys and sample.image is not None
    }
