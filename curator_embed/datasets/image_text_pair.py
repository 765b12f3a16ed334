"""``ImageTextPairDataset``: an ordered list of shards, an id column, and the steps still to run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from curator_embed.datasets.pending import check_step, taken_columns
from curator_embed.errors import UsageError
from curator_embed.execution.job import ShardJob
from curator_embed.sources.nesting import Input, check_output
from curator_embed.sources.shard import Shard, first_images
from curator_embed.sources.webdataset import find_shards
from curator_embed.steps import Step
from curator_embed.storage.files import absolute

if TYPE_CHECKING:
    import dask.dataframe as dd

    from curator_embed.datasets.export import ExportReport
    from curator_embed.execution.report import RunReport
    from curator_embed.execution.run_plan import RunPlan
    from curator_embed.storage.objects import ReadPolicy


class ImageTextPairDataset:
    """Images, their metadata, and columns that are still to be computed.

    Datasets are made by ``from_webdataset`` and grow by calling steps on them; nothing is read or
    computed before ``save_metadata``, ``to_webdataset`` or ``metadata`` asks for it. Every operation
    returns a new dataset; the one exception is ``save_metadata``, after which the saved object reads
    its metadata from where it was saved.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        id_col: str,
        steps: Sequence[Step] = (),
        *,
        storage_options: Mapping[str, Any] | None = None,
        inputs: Sequence[Input] = (),
    ) -> None:
        """
        Args:
            inputs: what it was opened from: no output may lie where the next run would take it for input.
        """
        self._shards, self.id_col, self._steps = tuple(shards), id_col, tuple(steps)
        self.storage_options = dict(storage_options or {})
        self.inputs = tuple(inputs)
        self._metadata: dd.DataFrame | None = None
        self._columns_as_read: list[str] = []
        self._assigned_before: frozenset[str] = frozenset()

    @classmethod
    def from_webdataset(
        cls,
        path: str | Sequence[str],
        id_col: str = "key",
        *,
        metadata_path: str | None = None,
        use_index_files: bool = False,
        key_split: Literal["auto", "first", "last"] = "auto",
        storage_options: Mapping[str, Any] | None = None,
    ) -> ImageTextPairDataset:
        """Open a folder of webdataset shards: ``00000.tar`` with ``00000.parquet`` beside it, or tars alone.

        Args:
            path: a folder, one tar, a glob, a brace range (``{00000..00012}.tar``) or a list of tars; local
                or any fsspec URL.
            id_col: the column by which rows and samples meet. ``"key"`` is the tar's own key; any other name
                is looked up in the sample's json member.
            metadata_path: where the parquet files lie, when not beside the tars.
            use_index_files: let ``.idx`` files beside the tars say which samples count (a subset is honoured).
            key_split: where a member's name ends its key: at the "first" dot as webdataset has it, at the
                "last" one, or "auto": the last only where the table's ids contain dots.
            storage_options: handed on to fsspec.

        Raises:
            UsageError: nothing there, or nothing that looks like shards.
        """
        shards: list[Shard] = list(
            find_shards(
                path,
                id_col=id_col,
                storage_options=storage_options,
                use_index_files=use_index_files,
                key_split=key_split,
            )
        )
        if metadata_path is not None:
            from curator_embed.sources.tables import check_tables_folder

            folder = absolute(metadata_path).rstrip("/")
            check_tables_folder(folder, storage_options)
            shards = [shard.with_table(f"{folder}/{shard.name}.parquet") for shard in shards]
        inputs = [Input(os.fspath(one), "tars") for one in ([path] if isinstance(path, str | os.PathLike) else path)]
        return cls(shards, id_col, storage_options=storage_options, inputs=inputs)

    @classmethod
    def from_path_list(
        cls,
        path_file: str | os.PathLike[str],
        root: str | os.PathLike[str] | None = None,
        dataset: str | None = None,
        start_line: int = 0,
        end_line: int | None = None,
        images_per_file: int = 1024,
        *,
        id_col: str = "path",
        metadata_path: str | None = None,
        reading: ReadPolicy | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> ImageTextPairDataset:
        """Open a text file with one image path a line; every ``images_per_file`` lines are a shard.

        Shards are named ``{dataset}_{start}-{end}`` by line numbers, so that line ranges of one list can be
        worked on by several machines into one folder. The list may be of any length: it is read once, and
        not held. An image that is not there is a row with ``image_error`` "not_found", an empty line one with
        "no_image".

        Args:
            path_file: the list, a local path or any fsspec URL. UTF-8; either kind of line ends.
            root: what the paths are below: a folder, or a bucket with or without a prefix (``s3://bucket``).
                A line may be a whole path or URL below it. None: the lines begin at the list's folder, or are
                http(s) URLs.
            dataset: the name that output files begin with, by default the list's own without its ending. Where
                lines begin with ``{dataset}/``, that is no part of the path below ``root``.
            start_line: the first line wanted, counted from 0.
            end_line: the line after the last one wanted; None for all.
            images_per_file: lines a shard.
            id_col: the column that holds the lines as they are.
            metadata_path: where parquet files of an earlier run lie, to add columns to them. By default
                the folder ``{path_file}_metadata``, where ``save_metadata()`` puts them.
            reading: how many images are read at a time, timeouts, retries, and whether links may lead elsewhere.
            storage_options: handed on to fsspec, for what lies below ``root`` or else on the list's own host.

        Raises:
            UsageError: no such list, lines or root, or arguments that contradict each other.
            SourceError: the list cannot be read.
        """
        from curator_embed.sources.path_list import find_lines
        from curator_embed.sources.tables import with_found_tables

        shards = find_lines(
            path_file,
            root=root,
            dataset=dataset,
            start_line=start_line,
            end_line=end_line,
            images_per_file=images_per_file,
            storage_options=storage_options,
            policy=reading,
        )
        tabled = with_found_tables(shards, metadata_path, storage_options)
        return cls(tabled, id_col, storage_options=storage_options, inputs=[Input(os.fspath(path_file), "")])

    @classmethod
    def from_folder(
        cls,
        path: str | os.PathLike[str],
        images_per_file: int = 1024,
        *,
        dataset: str | None = None,
        id_col: str = "path",
        metadata_path: str | None = None,
        reading: ReadPolicy | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> ImageTextPairDataset:
        """Open a folder of image files with its subfolders; every ``images_per_file`` images are a shard.

        Images are known by their endings and come in natural order (0, 1, 2, 10). Captions (``x.txt``) and json
        files (``x.json``) beside an image become columns. Hidden files are left out.

        The folder may change between runs: images that have a row in the output (or the tables) stay in that file,
        and others get files of their own behind.

        Args:
            path: the folder, local or any fsspec URL that can be listed.
            images_per_file: images in a new shard.
            dataset: the name that output files begin with, by default the folder's own.
            id_col: the column that holds the paths below the folder.
            metadata_path: where parquet files of an earlier run lie, to add columns to them. By default
                the folder ``{path}_metadata``, where ``save_metadata()`` puts them.
            reading: how many files are read at a time, timeouts and retries.
            storage_options: handed on to fsspec.

        Raises:
            UsageError: no such folder, or no images in it.
            SourceError: the folder cannot be listed.
        """
        from curator_embed.sources.folder import find_images
        from curator_embed.tables.known_files import fit_to_own_tables

        shards = find_images(
            path,
            images_per_file=images_per_file,
            dataset=dataset,
            id_col=id_col,
            storage_options=storage_options,
            policy=reading,
        )
        fitted = fit_to_own_tables(shards, metadata_path, id_col, storage_options)
        return cls(fitted, id_col, storage_options=storage_options, inputs=[Input(os.fspath(path), "images")])

    @classmethod
    def from_parquet(
        cls,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        id_col: str | None = None,
        image_col: str | None = None,
        *,
        metadata_path: str | None = None,
        reading: ReadPolicy | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> ImageTextPairDataset:
        """Open parquet files that hold the images: img2dataset's parquet format, Hugging Face datasets.

        Every file is a shard. Saved in place, files get columns and keep all they have; a new path gets all
        columns but the images, unless ``columns=`` names them.

        Args:
            path: a folder (with its subfolders), a file, a glob, a brace range or several of these; local or any
                fsspec URL, such as ``hf://datasets/user/name``.
            id_col: the column of ids; by default "key". Where there is none, rows get ids made of the file's name
                and their number, the files are not changed, and ``save_metadata()`` without a path writes into
                a folder beside, ``{folder}_metadata``.
            image_col: the column of images, binary or a struct of ``bytes`` and ``path``; by default found by its
                type and name.
            metadata_path: where parquet files of an earlier run lie, to add columns to them.
            reading: for images that a struct names by path only: how many are read at a time, timeouts, retries, and
                what such paths may be.
            storage_options: handed on to fsspec.

        Raises:
            UsageError: no such files or columns, or several columns that could hold the images.
            SourceError: a file cannot be read.
        """
        from curator_embed.sources.parquet import find_parquets
        from curator_embed.sources.tables import with_found_tables

        found = find_parquets(path, id_col=id_col, image_col=image_col, storage_options=storage_options, policy=reading)
        shards: list[Shard] = list(found)
        if metadata_path is not None or found[0].numbered:
            shards = with_found_tables(shards, metadata_path, storage_options)
        inputs = [Input(os.fspath(one), "tables") for one in ([path] if isinstance(path, str | os.PathLike) else path)]
        return cls(shards, found[0].id_col, storage_options=storage_options, inputs=inputs)

    # -- what it is ------------------------------------------------------------------------

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards, in order."""
        return self._shards

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps still to run, in order."""
        return self._steps

    @property
    def tar_files(self) -> list[str]:
        """Where the images lie, a tar each, for shards that have one."""
        return [source for shard in self._shards if (source := shard.image_source()) is not None]

    def __repr__(self) -> str:
        pending = ", ".join(name for step in self._steps for name in step.columns())
        return (
            f"ImageTextPairDataset({len(self._shards)} shards, id_col={self.id_col!r}"
            f"{f', pending: {pending}' if pending else ''})"
        )

    def with_step(self, step: Step) -> ImageTextPairDataset:
        """A new dataset with one more pending step.

        Raises:
            UsageError: it is of no known kind, or would write a column that is not its own: the ids, the images,
                ``image_error``, or one that another pending step writes.
        """
        check_step(step, self._steps, taken_columns(self._shards, self.id_col))
        return self.like(self._shards, (*self._steps, step))

    def like(self, shards: Sequence[Shard], steps: Sequence[Step]) -> ImageTextPairDataset:
        """A dataset of other shards and steps, otherwise like this one."""
        return ImageTextPairDataset(
            shards, self.id_col, steps, storage_options=self.storage_options, inputs=self.inputs
        )

    # -- runs --------------------------------------------------------------------------------

    @property
    def metadata(self) -> dd.DataFrame:
        """The metadata as a Dask DataFrame, one partition a shard; cuDF on a GPU cluster, else pandas.

        Columns of pending steps are in it and are computed when the frame is. Its dtypes are Arrow's, so
        that nulls and integers stay what they are. Columns assigned to it (``dataset.metadata["keep"] = ...``)
        are seen by ``to_webdataset`` and written by ``save_metadata``.
        """
        if self._metadata is None:
            from curator_embed.datasets.frames import metadata_frame

            self._metadata, self._assigned_before = metadata_frame(self)
            self._columns_as_read = list(self._metadata.columns)
        return self._metadata

    @metadata.setter
    def metadata(self, frame: dd.DataFrame) -> None:
        if frame.npartitions != len(self._shards):
            raise UsageError(
                f"the new metadata has {frame.npartitions} partitions for {len(self._shards)} shards; "
                "change columns, not the partitioning"
            )
        self.metadata  # noqa: B018  remember what was read, to know later what was added
        self._metadata = frame

    def job(
        self,
        output: str | None,
        columns: Sequence[str] | None = None,
        on_error: Literal["keep", "drop", "raise"] = "keep",
        overwrite: bool = False,
        state: str | None = None,
    ) -> ShardJob:
        """The pending steps as a job for ``execution``, not yet placed on any device.

        Raises:
            UsageError: ``columns`` is one string, or the output lies where the next run would take it for input.
        """
        if isinstance(columns, str):
            raise UsageError(f"columns={columns!r} is a string; pass a list of column names: columns=[{columns!r}]")
        threads = [step.num_threads_per_worker for step in self._steps if step.num_threads_per_worker is not None]
        return ShardJob(
            steps=self._steps,
            id_col=self.id_col,
            output=None if output is None else check_output(str(output), self.inputs, self.storage_options),
            select=None if columns is None else tuple(columns),
            on_error=on_error,
            overwrite=overwrite,
            decode_threads=max(threads, default=4),
            storage_options=self.storage_options,
            state=None if state is None else absolute(str(state)),
        )

    def save_metadata(
        self,
        path: str | None = None,
        columns: Sequence[str] | None = None,
        *,
        on_error: Literal["keep", "drop", "raise"] = "keep",
        overwrite: bool = False,
        certify: bool = False,
        limit: int | None = None,
        progress: bool = True,
        state: str | None = None,
    ) -> RunReport:
        """Compute what is pending and write it: one parquet a shard, whole or not at all.

        A run that was stopped or killed is finished by calling this again: shards that are done are
        recognised by their footers and skipped.

        Args:
            path: a folder for a new set of parquet files; None adds the columns to the dataset's own.
            columns: which of the input's columns a new path gets (the id and the new columns always come
                along); in place nothing is ever dropped.
            on_error: rows whose image failed are kept with a null and a reason in ``image_error``, dropped
                (needs a path), or end the run.
            overwrite: make everything anew, also what is up to date, and replace files and columns that are in the way:
                made another way, or by someone else. Such a run goes on when it was killed; one that is through begins
                anew when it is asked for again.
            certify: compare the preprocessing with the model's own on a sample of the images, and put the
                figures into the report.
            limit: work on the first ``limit`` rows only (needs a path).
            progress: show a progress bar.
            state: where reports and locks lie, by default beside the output in ``{path}.curator_embed``. Every run on
                the output must name the same place.

        Returns:
            The report; ``report.dataset`` is the saved dataset.

        Raises:
            UsageError: the call cannot be carried out as asked; nothing was changed.
            RunStopped: not all shards could be finished; what was finished is kept.
        """
        from curator_embed.datasets.saving import save

        job = self.job(path, columns, on_error, overwrite, state)
        return save(self, job, certify=certify, limit=limit, progress=progress)

    def plan(self, path: str | None = None, *, limit: int | None = None, overwrite: bool = False) -> RunPlan:
        """What ``save_metadata`` would do: shards and rows left, bytes to write, what stands in the way."""
        from curator_embed.datasets.saving import plan

        return plan(self, path, limit=limit, overwrite=overwrite)

    def to_webdataset(
        self,
        path: str,
        filter_column: str,
        samples_per_shard: int = 10000,
        max_shards: int = 5,
        old_id_col: str | None = None,
        *,
        overwrite: bool = False,
        progress: bool = True,
    ) -> ExportReport:
        """Write the samples whose ``filter_column`` is true as new shards, their encoded bytes untouched.

        Args:
            path: an empty or new folder (any fsspec URL), or one that holds the beginning of this very export.
            filter_column: a boolean column of the metadata; null counts as false.
            samples_per_shard: samples in each new tar.
            max_shards: digits of the new shards' names: 5 gives 00000.tar.
            old_id_col: keep the previous ids in a column of this name. New ids are the tars' keys, in the column
                "key": the shard's digits followed by the sample's, as img2dataset numbers them. Ids that come from
                json members stay there and in their column as well.
            overwrite: replace another export in this folder. Shards that no export has written are never touched.
            progress: show a progress bar.
        """
        from curator_embed.datasets.export import export

        return export(
            self,
            str(path),
            filter_column,
            samples_per_shard,
            max_shards,
            old_id_col,
            overwrite=overwrite,
            progress=progress,
        )

    @property
    def has_metadata(self) -> bool:
        """Whether ``metadata`` was asked for, so that it may have been changed."""
        return self._metadata is not None

    def added_columns(self) -> list[str]:
        """Columns that were assigned to ``metadata``; an earlier run may have written them to some files."""
        if self._metadata is None:
            return []
        from curator_embed.datasets.frames import assigned_in

        again = assigned_in(self._metadata) & self._assigned_before
        return [name for name in self._metadata.columns if name not in self._columns_as_read or name in again]

    def first_images(self, count: int) -> list[bytes]:
        """The first ``count`` encoded images, in the order they are stored."""
        return first_images(self._shards, self.id_col, count)

    def read_from(self, saved: ImageTextPairDataset) -> None:
        """After a save: this object reads from there as well, with nothing pending."""
        self._shards, self._steps = saved._shards, ()
        self._metadata, self._columns_as_read = None, []
