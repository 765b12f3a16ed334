"""The options by which every command opens its source, and what they mean."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from curator_embed.cli.checks import check_place
from curator_embed.cli.source_kind import SourceKind, detect
from curator_embed.cli.storage_options import StorageOptions
from curator_embed.cli.wording import in_options, telling
from curator_embed.errors import UsageError

if TYPE_CHECKING:
    from curator_embed.datasets import ImageTextPairDataset
    from curator_embed.datasets.describing import DatasetDescription


class KeySplit(StrEnum):
    """Which dot of a member's name ends its sample's key."""

    auto = "auto"
    first = "first"
    last = "last"


class Links(StrEnum):
    """What becomes of links that lead out of where the images lie."""

    inside = "inside"
    any = "any"


class Urls(StrEnum):
    """Which http(s) URLs rows may name."""

    own = "own"
    public = "public"
    any = "any"


_LIST = "Path lists: "

log = logging.getLogger(__name__)


class _Written(logging.Handler):
    """Hands what is logged to a function, progress lines among it."""

    def __init__(self, write: Callable[[str], None]) -> None:
        super().__init__(logging.DEBUG)
        self.write = write

    def emit(self, record: logging.LogRecord) -> None:
        self.write(self.format(record))


@dataclass(frozen=True)
class SourceOptions(StorageOptions):
    """What the options about the source say; see each one's help."""

    source: Annotated[
        SourceKind, typer.Option(help="What SRC is; by default seen from its ending, or from what lies in the folder.")
    ] = SourceKind.auto
    id_col: Annotated[
        str | None,
        typer.Option(
            help="Column by which rows and images meet. By default 'key', the tar's own key (other names come from the "
            "json); 'path' for path lists and folders."
        ),
    ] = None
    metadata: Annotated[
        str | None, typer.Option(help="Folder of the parquet files, when they do not lie where they would by default.")
    ] = None
    use_index_files: Annotated[
        bool, typer.Option("--use-index-files", help="Let .idx files beside the tars say which samples count.")
    ] = False
    key_split: Annotated[
        KeySplit,
        typer.Option(
            help="Webdatasets: the dot that ends a sample's key in its members' names; auto: the last one where the "
            "table's ids hold dots, else the first."
        ),
    ] = KeySplit.auto
    image_col: Annotated[str | None, typer.Option(help="Parquet: the column that holds the images.")] = None
    root: Annotated[
        str | None,
        typer.Option(
            "--root", "--target-dir", help=_LIST + "what the paths are below, a folder or s3://bucket/prefix."
        ),
    ] = None
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Path lists and folders: the name that output files begin with; lines of a list may begin with "
            "it and a slash, which is no part of the path."
        ),
    ] = None
    start_line: Annotated[int, typer.Option(min=0, help=_LIST + "the first line wanted, counted from 0.")] = 0
    end_line: Annotated[int | None, typer.Option(help=_LIST + "the line after the last one wanted.")] = None
    images_per_file: Annotated[
        int | None, typer.Option(min=1, help="Path lists and folders: rows of an output file.  [default: 1024]")
    ] = None
    links: Annotated[
        Links,
        typer.Option(
            help="Single image files: links that lead out of --root or the folder are refused (inside) or followed "
            "(any)."
        ),
    ] = Links.inside
    urls: Annotated[
        Urls,
        typer.Option(
            help="http(s) URLs that rows name. own: where the source is a list of URLs or lies on the web; public: any "
            "public address; any: any address."
        ),
    ] = Urls.own
    allow: Annotated[
        list[str] | None, typer.Option(help="With --urls public: a network (10.1.0.0/16) that may be reached, too.")
    ] = None
    batch_per_inference: Annotated[
        int | None,
        typer.Option(min=1, help="With --inference-per-file: rows of a file are --batch-size times this times that."),
    ] = None
    inference_per_file: Annotated[int | None, typer.Option(min=1, help="See --batch-per-inference.")] = None
    process_index: Annotated[
        int, typer.Option(min=0, help="Number of this process among those that work side by side: names its log.")
    ] = 0
    log_dir: Annotated[
        str | None, typer.Option(help="Folder for a log of this run, '{dataset}_{process_index}.txt'.")
    ] = None

    def open(
        self, src: str, *, output: str | None = None, state: str | None = None, batch_size: int = 1
    ) -> ImageTextPairDataset:
        """Open the source.

        Args:
            output: where the command writes: options for S3 hold there, too.
            state: where it keeps reports and locks; the same holds.
            batch_size: of the command, for ``--batch-per-inference``.

        Raises:
            UsageError: options that contradict each other or do not belong to such a source, or nothing there.
        """
        storage = self.storage(src, self.root, self.metadata, output, state)
        check_place(output, storage)
        check_place(state, storage)
        kind = self.source if self.source is not SourceKind.auto else detect(src, storage)
        opened = self._opened(src, kind, storage, batch_size)
        if output is not None:
            from curator_embed.sources.nesting import check_output

            check_output(output, opened.inputs, storage)
        if kind is SourceKind.webdataset and all(shard.image_source() is None for shard in opened.shards):
            from curator_embed.storage.files import redact

            log.warning(
                "%s: no tar, and no parquet column that is plainly one of images: every row counts as one without an "
                "image. '--source parquet' says more",
                redact(src),
            )
        return opened

    def describe(self, src: str, *, verify: bool = False, state: str | None = None) -> DatasetDescription:
        """What the source holds; an output of a run, which has no images, serves as well."""
        from curator_embed.datasets.describing import describe_dataset

        storage = self.storage(src, self.root, self.metadata, state)
        kind = self.source if self.source is not SourceKind.auto else detect(src, storage, outputs=True)
        return describe_dataset(self._opened(src, kind, storage, 1), src, kind, verify=verify, state=state)

    def _opened(self, src: str, kind: SourceKind, storage: dict[str, Any], batch_size: int) -> ImageTextPairDataset:
        from curator_embed.datasets import ImageTextPairDataset
        from curator_embed.storage.objects import ReadPolicy

        self._check(kind)
        reading = ReadPolicy(
            in_flight=self.in_flight,
            timeout=self.timeout,
            retries=self.retries,
            links=self.links.value,
            urls=self.urls.value,
            allow=tuple(self.allow or ()),
        )
        common: dict[str, Any] = {"metadata_path": self.metadata, "storage_options": storage}
        if kind is SourceKind.path_list:
            return ImageTextPairDataset.from_path_list(
                src,
                self.root,
                self.dataset,
                self.start_line,
                self.end_line,
                self._rows(batch_size),
                id_col=self.id_col or "path",
                reading=reading,
                **common,
            )
        if kind is SourceKind.folder:
            return ImageTextPairDataset.from_folder(
                src,
                self._rows(batch_size),
                dataset=self.dataset,
                id_col=self.id_col or "path",
                reading=reading,
                **common,
            )
        if kind is SourceKind.parquet:
            return ImageTextPairDataset.from_parquet(src, self.id_col, self.image_col, reading=reading, **common)
        return ImageTextPairDataset.from_webdataset(
            src,
            id_col=self.id_col or "key",
            use_index_files=self.use_index_files,
            key_split=self.key_split.value,
            **common,
        )

    @contextmanager
    def logging(self, src: str) -> Iterator[Callable[[str], None]]:
        """A function that writes to this process's log; begin, progress, warnings and end are in it, too."""
        from curator_embed.storage.files import redact

        if self.log_dir is None:
            yield lambda text: None
            return
        name = self.dataset or os.path.splitext(os.path.basename(redact(src).rstrip("/")))[0]
        path = os.path.join(os.path.expanduser(self.log_dir), f"{name}_{self.process_index}.txt")
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            opened = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed below
        except OSError as error:
            raise UsageError(f"--log-dir {self.log_dir}: cannot write there ({error.strerror})") from error
        with opened as file:

            def write(text: str) -> None:
                for line in in_options(text).splitlines():
                    file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {line}\n")
                file.flush()

            lines = f", lines {self.start_line} to {'the end' if self.end_line is None else self.end_line}"
            write(f"begin {name}{lines if self.given('start_line', 'end_line') else ''}")
            with telling(_Written(write)):
                try:
                    yield write
                except BaseException as error:
                    write(f"error: {str(error) or type(error).__name__}")
                    raise
            write("end")

    def _rows(self, batch_size: int) -> int:
        product = self.batch_per_inference, self.inference_per_file
        if product == (None, None):
            return self.images_per_file or 1024
        if self.images_per_file is not None:
            raise UsageError("--images-per-file and --inference-per-file both say how many rows a file has; give one")
        return batch_size * (self.batch_per_inference or 1) * (self.inference_per_file or 1)

    def _check(self, kind: SourceKind) -> None:
        for kinds, names in (
            ((SourceKind.path_list,), ("root", "start_line", "end_line")),
            (
                (SourceKind.path_list, SourceKind.folder),
                ("dataset", "images_per_file", "batch_per_inference", "inference_per_file"),
            ),
            ((SourceKind.parquet,), ("image_col",)),
            ((SourceKind.path_list, SourceKind.folder, SourceKind.parquet), ("links",)),
            ((SourceKind.path_list, SourceKind.parquet), ("urls", "allow")),
            ((SourceKind.webdataset,), ("use_index_files", "key_split")),
        ):
            wrong = [] if kind in kinds else list(self.given(*names))
            if wrong:
                option = f"--{wrong[0].replace('_', '-')}"
                raise UsageError(
                    f"{option} is for {' and '.join(kinds)}, and this is a {kind}; say --source if it is not"
                )
