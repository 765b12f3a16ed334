"""The commands and their options; what they do lies in the library.

Exit status: 0 all rows accounted for, 1 some rows failed under ``--on-error raise``,
2 bad usage or something missing that it needs (nothing was changed), 3 the run could not go on.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from curator_embed import __version__
from curator_embed.cli.checks import check_decoder, check_device, check_models, check_weights
from curator_embed.cli.cluster_options import ClusterOptions
from curator_embed.cli.option_groups import takes_groups
from curator_embed.cli.source_options import SourceOptions
from curator_embed.cli.storage_options import StorageOptions
from curator_embed.cli.wording import in_options, telling
from curator_embed.errors import CuratorEmbedError, MissingExtra, UsageError

if TYPE_CHECKING:
    from curator_embed.datasets import ImageTextPairDataset
    from curator_embed.steps import Step

app = typer.Typer(
    name="curator-embed",
    help="Embed image datasets of any size, every row accounted for. "
    "Start with 'curator-embed demo', or 'curator-embed embed --help'.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class OnError(StrEnum):
    """What happens to rows whose image fails."""

    keep = "keep"
    drop = "drop"
    raise_ = "raise"


class Dtype(StrEnum):
    """Type of the stored embeddings."""

    float32 = "float32"
    float16 = "float16"


class Compile(StrEnum):
    """Whether the model is compiled."""

    auto = "auto"
    on = "on"
    off = "off"


class Decoder(StrEnum):
    """What decodes the images."""

    auto = "auto"
    cpu = "cpu"
    dali = "dali"


Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="A folder of shards (00000.tar, with 00000.parquet beside it or not), one tar, a glob, or a range "
        "like 'data/{00000..00012}.tar'; a text file with one image path per line; a folder of images; parquet files "
        "that hold images. A local path or any fsspec URL (s3://, gs://, https://, hf://).",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
ModelName = Annotated[
    str,
    typer.Option("--model", help="A timm name (see 'curator-embed models') or an OpenAI CLIP name such as ViT-B/32."),
]
Weights = Annotated[
    Path | None, typer.Option(help="Weights to load, safetensors or a state dict, instead of downloading any.")
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Download the model's published weights.")]
ImageSize = Annotated[int | None, typer.Option(help="Input size in pixels, where the model's own is not wanted.")]
Hashes = Annotated[
    list[str] | None,
    typer.Option(
        "--hash",
        metavar="KIND",
        help="Add a column with this hash; give it several times for several. phash, dhash, ahash, whash, colorhash, "
        "crop_resistant, sha256 (of the encoded bytes, column image_sha256) or pixel_sha256.",
    ),
]
HashSize = Annotated[int, typer.Option(min=2, help="Side of phash, dhash, ahash and whash: its square is their bits.")]
KeepColumns = Annotated[
    list[str] | None,
    typer.Option(
        "--keep-column",
        metavar="NAME",
        help="With --output: a column of the input that the new files get, several times for several; by default all. "
        "The id and the new columns always come along.",
    ),
]
State = Annotated[
    str | None,
    typer.Option(
        "--state",
        metavar="DIR",
        help="Folder for reports, locks and what else a run keeps; by default beside the parquet files' own folder, "
        "named like it with '.curator_embed'. Give the same one to every run on these files.",
    ),
]
Properties = Annotated[
    bool,
    typer.Option(
        "--properties", help="Add columns image_width, image_format, image_brightness, image_blur, ...: see the docs."
    ),
]
Prefix = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="Begin the names of the columns of --hash and --properties with this. Without it hashes have their plain "
        "names, and properties begin with image_.",
    ),
]


@app.command()
@takes_groups
def embed(
    src: Source,
    model: Annotated[
        list[str],
        typer.Option(
            "--model",
            metavar="NAME[=COLUMN]",
            help="A timm name (see 'curator-embed models') or an OpenAI CLIP name such as ViT-B/32. Give it several "
            "times for several models in one pass, each with a column of its own.",
        ),
    ],
    source: SourceOptions,
    where: ClusterOptions,
    output: Annotated[
        str | None,
        typer.Option(help="Folder for the new parquet files. Without it the columns go into the dataset's own."),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[COLUMN=]PATH",
            help="Weights to load, safetensors or a state dict, instead of downloading any. With several models: "
            "COLUMN=PATH, for each that has some.",
        ),
    ] = None,
    pretrained: Pretrained = False,
    column: Annotated[
        str, typer.Option(help="Name of the new column, of a model without =COLUMN.")
    ] = "image_embedding",
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images per batch on a GPU; a CPU works in batches of 16 at most.")
    ] = 256,
    threads: Annotated[
        int, typer.Option("--threads", "--num-threads", min=1, help="Threads a worker uses to decode.")
    ] = 4,
    on_error: Annotated[
        OnError, typer.Option(help="Rows whose image fails: keep them with a reason, drop them, or end the run.")
    ] = OnError.keep,
    dtype: Annotated[Dtype, typer.Option(help="Type of the stored embeddings.")] = Dtype.float32,
    image_size: ImageSize = None,
    hash: Hashes = None,
    hash_size: HashSize = 8,
    properties: Properties = False,
    prefix: Prefix = None,
    compile: Annotated[
        Compile, typer.Option(help="Compile the model: pays on runs of many thousand images.")
    ] = Compile.auto,
    cuda_graphs: Annotated[
        bool,
        typer.Option("--cuda-graphs", help="On a GPU, record the model once and replay it: for small batches."),
    ] = False,
    device: Annotated[str | None, typer.Option(help="'cpu' or 'cuda'; by default a GPU where there is one.")] = None,
    decoder: Annotated[
        Decoder, typer.Option(help="What decodes the images; auto: DALI where there is a GPU and DALI is installed.")
    ] = Decoder.auto,
    certify: Annotated[
        bool, typer.Option("--certify", help="Compare the preprocessing with the model's own on your images.")
    ] = False,
    keep_column: KeepColumns = None,
    state: State = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="With --output: work on the first so many rows only.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, how much it would write and how long it takes.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace columns and files that were made another way.")
    ] = False,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Embed every image of a dataset.

    Adds a column of embeddings to the dataset's parquet files, or writes new ones with --output. Rows whose
    image is missing or broken are kept, with the reason in the column image_error. A run that was interrupted
    goes on where it stopped when the same command is given again.
    """
    wanted = _models(model, column)
    files = _weights(weights or [], [name for _, name in wanted])
    if pretrained and files:
        raise UsageError("--pretrained downloads weights and --weights names a file; give one of them")
    where.check()
    check_device(device, here=where.on_this_machine)
    check_decoder(decoder.value, here=where.on_this_machine)
    check_models(name for name, _ in wanted)
    check_weights(files.values())
    measured = _column_steps(hash or [], hash_size, properties, prefix)
    pending = source.open(src, output=output, state=state, batch_size=batch_size)
    # Only now torch: all that can be wrong without it has been told.
    from curator_embed.embedders import TimmImageEmbedder

    for name, into in wanted:
        embedder = TimmImageEmbedder(
            name,
            pretrained=pretrained,
            weights=files.get(into),
            batch_size=batch_size,
            num_threads_per_worker=threads,
            image_embedding_column=into,
            dtype=dtype.value,
            image_size=image_size,
            compile="auto" if compile is Compile.auto else compile is Compile.on,
            cuda_graphs=cuda_graphs,
            device=device,
            decoder=decoder.value,
        )
        pending = embedder(pending)
    for step in measured:
        pending = step(pending)
    if dry_run:
        from curator_embed.cli.dry_run import describe

        workforce, named = where.workforce(device)
        described = describe(pending, output, limit=limit, overwrite=overwrite, workforce=workforce, planned_for=named)
        typer.echo(json.dumps(described.to_dict(), indent=2) if as_json else in_options(str(described)))
        return
    with source.logging(src) as log, where.client():
        report = pending.save_metadata(
            output,
            keep_column,
            on_error=on_error.value,
            overwrite=overwrite,
            certify=certify,
            limit=limit,
            state=state,
            progress=not quiet and not as_json,
        )
        log(in_options(str(report)))
    typer.echo(report.to_json() if as_json else in_options(str(report)))


@app.command()
@takes_groups
def columns(
    src: Source,
    source: SourceOptions,
    where: ClusterOptions,
    output: Annotated[
        str | None,
        typer.Option(help="Folder for the new parquet files. Without it the columns go into the dataset's own."),
    ] = None,
    hash: Hashes = None,
    hash_size: HashSize = 8,
    properties: Properties = False,
    prefix: Prefix = None,
    on_error: Annotated[
        OnError, typer.Option(help="Rows whose image fails: keep them with a reason, drop them, or end the run.")
    ] = OnError.keep,
    keep_column: KeepColumns = None,
    state: State = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="With --output: work on the first so many rows only.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace columns and files that were made another way.")
    ] = False,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Add hashes and image properties, without a model.

    All columns come from one decode of each image, and columns that are already there are not computed again:
    'columns SRC --hash phash --properties' works on a dataset with embeddings as well as on one without.
    """
    steps = _column_steps(hash or [], hash_size, properties, prefix)
    if not steps:
        raise UsageError("nothing to compute: give --hash KIND (several times for several) or --properties")
    where.check()
    pending: ImageTextPairDataset = source.open(src, output=output, state=state)
    for step in steps:
        pending = step(pending)
    with source.logging(src) as log, where.client():
        report = pending.save_metadata(
            output,
            keep_column,
            on_error=on_error.value,
            overwrite=overwrite,
            limit=limit,
            state=state,
            progress=not quiet and not as_json,
        )
        log(in_options(str(report)))
    typer.echo(report.to_json() if as_json else in_options(str(report)))


@app.command()
@takes_groups
def info(
    src: Source,
    source: SourceOptions,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all ids as well, and find columns that were made for other ids.")
    ] = False,
    state: State = None,
    as_json: AsJson = False,
) -> None:
    """Say what a dataset or an output holds: shards, rows, columns, how each column was made, and what failed.

    A column that was made from images or ids that have changed since is out of date, and is told.

    Of a path list or a folder of images, --metadata names the output; by default it is the one beside.
    """
    described = source.describe(src, verify=verify, state=state)
    typer.echo(json.dumps(described.to_dict(), indent=2, ensure_ascii=False) if as_json else str(described))


@app.command()
def models(
    pattern: Annotated[
        str, typer.Argument(metavar="[PATTERN]", help="A name or glob, for instance 'vit_*clip*'.")
    ] = "*",
    as_json: AsJson = False,
) -> None:
    """List models: name, input size, dimension, patch size, and whether the preprocessing is understood."""
    from curator_embed.embedders import list_models

    rows = list_models(pattern)
    if not rows:
        from curator_embed.embedders.catalogue import listed_names
        from curator_embed.embedders.names import no_model_matches

        raise no_model_matches(pattern, listed_names())
    if as_json:
        typer.echo(json.dumps([row.to_dict() for row in rows], indent=2))
        return
    width = max(len(row.name) for row in rows)
    typer.echo(f"{'name':<{width}}  {'input':>9}  {'dim':>5}  {'patch':>5}  preprocessing")
    for row in rows:
        dim, patch = row.dim or "-", row.patch_size or "-"
        how = "understood" if row.understood else "runs as it is"
        typer.echo(f"{row.name:<{width}}  {row.input_size:>9}  {dim:>5}  {patch:>5}  {how}")


@app.command()
@takes_groups
def certify(
    src: Source,
    model: ModelName,
    source: SourceOptions,
    weights: Weights = None,
    pretrained: Pretrained = False,
    image_size: ImageSize = None,
    images: Annotated[int, typer.Option(min=1, help="How many of the dataset's images to compare.")] = 256,
    as_json: AsJson = False,
) -> None:
    """Compare our preprocessing with the model's own on your images, in grey levels and in embeddings.

    Exit status 0 when they agree as promised (at most 2 grey levels and cosine >= 0.9999), else 3.
    """
    check_models([model])
    check_weights([] if weights is None else [weights])
    dataset = source.open(src)
    from curator_embed.embedders import TimmImageEmbedder

    embedder = TimmImageEmbedder(model, pretrained=pretrained, weights=weights, image_size=image_size)
    report = embedder.certify(dataset.first_images(images))
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))
    if not report.holds:
        raise typer.Exit(3)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine has, what is missing and how to install it, and what it can do as it is."""
    from curator_embed.cli.doctor import conclude, examine

    findings = examine()
    if as_json:
        told = {"findings": [finding.to_dict() for finding in findings], "conclusion": conclude(findings)}
        typer.echo(json.dumps(told, indent=2))
        return
    for finding in findings:
        typer.echo(str(finding))
    typer.echo(conclude(findings))


@app.command("index-tars")
@takes_groups
def index_tars(
    src: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A folder of tars, one tar, a glob, or a range like 'data/{00000..00012}.tar'; local or a URL.",
        ),
    ],
    where: StorageOptions,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write indexes anew that are there and fresh.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write DALI's .idx file beside every tar: which sample lies where. Reading is faster with them."""
    from curator_embed.sources.webdataset import index_tars as write_indexes

    done = write_indexes(src, overwrite=overwrite, storage_options=where.storage(src))
    if as_json:
        typer.echo(json.dumps(done, indent=2))
    else:
        for path in done:
            typer.echo(path)
        typer.echo(f"{len(done)} indexes written")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the demo's data and results.")] = Path("demo-output"),
    as_json: AsJson = False,
) -> None:
    """Embed a small webdataset of real photographs and show each beside its nearest neighbours."""
    from curator_embed.cli.demo import run_demo

    run_demo(output, as_json=as_json)


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """Options of the command itself."""
    if show:
        typer.echo(__version__)
        raise typer.Exit


def _column_steps(hashes: list[str], hash_size: int, properties: bool, prefix: str | None) -> list[Step]:
    """The image steps that the options ask for."""
    from curator_embed.columns import ImageHasher, ImageProperties

    steps: list[Step] = [ImageHasher(hashes, hash_size, prefix=prefix or "")] if hashes else []
    if properties:
        steps.append(ImageProperties() if prefix is None else ImageProperties(prefix=prefix))
    return steps


def _models(given: list[str], column: str) -> list[tuple[str, str]]:
    """``NAME[=COLUMN]`` of every model -> (name, column)."""
    pairs = [(name, into if equals else column) for name, equals, into in (text.partition("=") for text in given)]
    for number, (name, into) in enumerate(pairs):
        if not name or not into:
            raise UsageError(f"--model {given[number]}: write NAME or NAME=COLUMN")
        if into in (earlier for _, earlier in pairs[:number]):
            raise UsageError(
                f"--model {given[number]}: another model writes the column '{into}' already; "
                f"give each a column of its own: --model {name}=COLUMN"
            )
    return pairs


def _weights(given: list[str], columns: list[str]) -> dict[str, Path]:
    """``[COLUMN=]PATH`` of every file -> path by column; with one model a path may hold an equals sign itself."""
    files: dict[str, Path] = {}
    for text in given:
        column, equals, path = text.partition("=")
        if not (equals and column in columns):
            if len(columns) > 1:
                raise UsageError(f"--weights {text}: with several models write COLUMN=PATH ({' or '.join(columns)})")
            column, path = columns[0], text
        if column in files:
            raise UsageError(f"--weights {text}: the model of column '{column}' has weights already")
        files[column] = Path(path)
    return files


INTERRUPTED = 130
"""What typer makes of a Ctrl-C that nobody caught."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command and turn errors into messages and exit statuses."""
    try:
        with telling(), warnings.catch_warnings():
            warnings.showwarning = _note(warnings.showwarning)
            app(arguments, standalone_mode=True)
    except (UsageError, MissingExtra) as error:
        _complain(error, 2)
    except CuratorEmbedError as error:
        from curator_embed.execution.run import RowsFailed, RunStopped

        if isinstance(error, RunStopped):
            status = 1 if isinstance(error, RowsFailed) else 3
            if "--json" in (sys.argv[1:] if arguments is None else arguments):
                typer.echo(error.report.to_json())
                _complain(error, status)
            typer.echo(in_options(str(error.report)), err=True)
            _complain(error.summary, status)
        _complain(error, 3)
    except SystemExit as ended:
        if ended.code != INTERRUPTED:
            raise
        typer.echo("interrupted; finished shards are kept, run the same command again to go on", err=True)
        sys.exit(3)
    except Exception as error:
        # Not foreseen: whoever mends it needs the trace, and a script must not take it for status 1.
        traceback.print_exc()
        _complain(error, 3)


def _note(otherwise: Callable[..., None]) -> Callable[..., None]:
    """Shows what the library warns users of as a line of its own, without the code that it comes from."""

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if category is UserWarning:
            typer.echo(f"note: {in_options(str(message))}", err=True)
        else:
            otherwise(message, category, *where, **more)

    return show


def _complain(error: Exception | str, status: int) -> NoReturn:
    typer.echo(f"error: {in_options(str(error))}", err=True)
    sys.exit(status)
