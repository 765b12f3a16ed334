"""What a dataset takes as a pending step, and which columns are nobody's target."""

from __future__ import annotations

import io
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curator_embed.cli import main
from curator_embed.columns import ImageHasher, ImageProperties
from curator_embed.datasets import ImageTextPairDataset
from curator_embed.decoding.image import DecodedImage
from curator_embed.embedders import TimmImageEmbedder
from curator_embed.errors import UsageError
from curator_embed.steps import ImageStep, Step
from tests.rows import table_rows
from tests.shards import crops, write_dataset
from tests.stub import ColourEmbedder

MODEL = "test_resnet.r160_in1k"


class Plain(Step):
    """Says what it writes, and nothing of what it wants to see."""

    def columns(self) -> dict[str, pa.DataType]:
        return {"plain": pa.int64()}

    def recipe(self) -> dict[str, Any]:
        return {"step": "plain"}


class Named(ImageStep):
    """Writes the columns it is told to."""

    def __init__(self, columns: dict[Any, Any]) -> None:
        self.named = columns

    def columns(self) -> dict[str, pa.DataType]:
        return self.named

    def recipe(self) -> dict[str, Any]:
        return {"step": "named"}

    def measure(self, image: DecodedImage) -> Mapping[str, Any]:
        return dict.fromkeys(self.named, 1)


class Listed(ColourEmbedder):
    """Claims another type for its vectors."""

    def __init__(self, kind: pa.DataType) -> None:
        super().__init__()
        self.kind = kind

    def columns(self) -> dict[str, pa.DataType]:
        return {"vector": self.kind}


class OwnReader(ColourEmbedder):
    """Says that it reads shards and does not."""

    reads_own_shards = True


@pytest.fixture
def tars(tmp_path: Path, wheel_photos: list[Path]) -> Path:
    """One tar of three photographs without a table."""
    return write_dataset(tmp_path / "tars", wheel_photos, shards=1, samples=3, missing=0, table=False)


@pytest.fixture
def tabled(tmp_path: Path, wheel_photos: list[Path]) -> Path:
    """One tar of three photographs and its table."""
    return write_dataset(tmp_path / "tabled", wheel_photos, shards=1, samples=3, missing=0)


@pytest.fixture
def parquet(tmp_path: Path, wheel_photos: list[Path]) -> Path:
    """A parquet file of three images, which are in the column "jpg"."""
    path = tmp_path / "parquet" / "0.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"key": ["a", "b", "c"], "jpg": crops(wheel_photos[0], 3)}), path)
    return path.parent


def webdataset(folder: Path) -> ImageTextPairDataset:
    return ImageTextPairDataset.from_webdataset(str(folder))


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (Plain(), "Plain is neither an ImageStep nor a BatchStep"),
        (Named({}), "Named adds no column"),
        (Named({"": pa.int64()}), "must give column names and their pyarrow types"),
        (Named({"a": "int64"}), "must give column names and their pyarrow types"),
        (Listed(pa.float32()), "column 'vector' is float"),
        (Listed(pa.list_(pa.float32(), 192)), "embeddings are lists: pa.list_"),
        (OwnReader(), "has no embed_shard"),
    ],
)
def test_what_a_run_could_not_carry_out_is_refused_when_it_is_called(step: Step, words: str, tars: Path) -> None:
    with pytest.raises(UsageError) as told:
        step(webdataset(tars))
    assert words in str(told.value)


@pytest.mark.parametrize("column", ["key", "image_error"])
@pytest.mark.parametrize("kind", ["tars", "tabled"])
def test_ids_and_reasons_are_nobodys_target(kind: str, column: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    with pytest.raises(UsageError, match=f"would write the column '{column}', which holds the"):
        ColourEmbedder(column)(webdataset(folder))
    with pytest.raises(UsageError, match=f"would write the column '{column}'"):
        Named({"fine": pa.int64(), column: pa.int64()})(webdataset(folder))
    assert not (folder / "00000.curator_embed").exists()


def test_images_are_nobodys_target(parquet: Path) -> None:
    dataset = ImageTextPairDataset.from_parquet(parquet)
    with pytest.raises(UsageError, match="would write the column 'jpg', which holds the images"):
        ColourEmbedder("jpg")(dataset)
    assert ColourEmbedder("png")(dataset).save_metadata(progress=False).embedded == 3


@pytest.mark.parametrize("column", ["image_error", "jpg"])
def test_assigned_columns_replace_neither_images_nor_reasons(parquet: Path, column: str) -> None:
    """The frame shows neither, so that such a name looks new."""
    before = (parquet / "0.parquet").read_bytes()
    for overwrite in (False, True):
        dataset = ImageTextPairDataset.from_parquet(parquet)
        dataset.metadata[column] = 1
        with pytest.raises(UsageError, match=f"new column '{column}' would replace the column that holds the"):
            dataset.save_metadata(overwrite=overwrite, progress=False)
        assert (parquet / "0.parquet").read_bytes() == before
    dataset = ImageTextPairDataset.from_parquet(parquet)
    dataset.metadata[f"{column}_2"] = 1
    dataset.save_metadata(progress=False)
    assert pq.read_table(parquet / "0.parquet")[f"{column}_2"].to_pylist() == [1, 1, 1]


@pytest.mark.filterwarnings("ignore:.*random weights")
@pytest.mark.parametrize(
    ("make", "id_col", "remedy"),
    [
        (lambda **name: TimmImageEmbedder(MODEL, **({"image_embedding_column": "uid"} | name)), "uid",
         "image_embedding_column"),
        (lambda **name: ImageHasher("phash", **name), "phash", "prefix"),
        (lambda **name: ImageProperties(["width"], **name), "image_width", "prefix"),
    ],
)  # fmt: skip
def test_the_other_name_that_a_refusal_advises_does(make: Any, id_col: str, remedy: str, tabled: Path) -> None:
    path = tabled / "00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.rename_columns([id_col, *table.column_names[1:]]), path)
    dataset = ImageTextPairDataset.from_webdataset(str(tabled), id_col=id_col)
    with pytest.raises(UsageError) as told:
        make()(dataset)
    assert f"the column '{id_col}', which holds the ids" in str(told.value)
    assert str(told.value).endswith(f"Give it another column name ({remedy}=...)")
    step: Step = make(**{remedy: "mine_"})
    assert step(dataset).steps[-1].columns().keys() == step.columns().keys() != {id_col}


def test_the_other_name_for_two_steps_of_one_column_does(tars: Path) -> None:
    pending = ImageHasher("phash")(webdataset(tars))
    with pytest.raises(UsageError, match=r"column 'phash'\. Give one of them another column name \(prefix=\.\.\.\)"):
        ImageHasher("phash", 16)(pending)
    report = ImageHasher("phash", 16, prefix="long_")(pending).save_metadata(progress=False)
    assert report.embedded == 3
    assert {(len(row["phash"]), len(row["long_phash"])) for row in table_rows(tars).values()} == {(16, 64)}


# -- the command ------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit status and standard error of the command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
@pytest.mark.parametrize(
    ("command", "option", "remedy", "column"),
    [
        (("embed", "--model", MODEL, "--compile", "off"), ("--column", "{id}"), "--column mine", "mine"),
        (("embed", "--compile", "off"), ("--model", MODEL + "={id}"), f"--model {MODEL}=mine", "mine"),
        (("columns", "--hash", "phash"), (), "--prefix my_", "my_phash"),
    ],
)
def test_the_command_refuses_and_its_advice_works(
    command: Sequence[str],
    option: Sequence[str],
    remedy: str,
    column: str,
    overwrite: Sequence[str],
    tabled: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    id_col = "phash" if "phash" in command else "key"
    path = tabled / "00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.rename_columns([id_col, *table.column_names[1:]]), path)
    before = path.read_bytes()
    common = (command[0], tabled, *command[1:], "--quiet", "--id-col", id_col, *overwrite)
    if id_col == "phash":  # the tar's own keys are these
        write_json_ids(tabled, id_col)
    status, said = run(capsys, *common, *(text.format(id=id_col) for text in option))
    assert status == 2, said
    assert f"would write the column '{id_col}', which holds the ids" in said
    assert remedy.split()[0] in said and "Traceback" not in said
    assert path.read_bytes() == before
    status, said = run(capsys, *common, *shlex.split(remedy))
    assert status == 0, said
    rows = table_rows(tabled, id_col)
    assert len(rows) == 3 and all(row[column] is not None for row in rows.values())


def write_json_ids(folder: Path, id_col: str) -> None:
    """Have the samples' json name the ids under this name, too."""
    import json
    import tarfile

    path = folder / "00000.tar"
    with tarfile.open(path) as archive:
        members = [(item.name, archive.extractfile(item).read()) for item in archive]  # type: ignore[union-attr]
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            if name.endswith(".json"):
                data = json.dumps({**json.loads(data), id_col: name.partition(".")[0]}).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
