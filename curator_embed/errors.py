"""The errors a person can meet, and the reason codes a row can carry.

Kept apart so that every room can raise them without importing another room.
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why a row has no embedding: the values of the ``image_error`` column.

    The codes are part of the output format: add to them, never rename them.
    """

    NO_IMAGE = "no_image"  # the row has no sample, or its sample has no image
    EMPTY = "empty"  # zero bytes
    NOT_AN_IMAGE = "not_an_image"  # HTML, text, garbage: no known image signature
    UNSUPPORTED = "unsupported_format"  # a real image format that no decoder here reads (SVG, ...)
    TRUNCATED = "truncated"  # the data ends early
    CORRUPT = "corrupt"  # a known format whose data does not decode
    TOO_LARGE = "too_large"  # more pixels (decoded or resized) than the limit
    READ_ERROR = "read_error"  # the bytes could not be read from disk or network
    NOT_FOUND = "not_found"  # a list names the image, and there is no such file or object
    AMBIGUOUS_ID = "ambiguous_id"  # an id occurs n times in the table and m times among the samples
    BAD_VECTOR = "bad_vector"  # the embedding is zero, infinite or not a number: the model cannot do with this image
    EMBED_ERROR = "embed_error"  # a step failed on this image, or a custom embedder returned nothing for the row


class CuratorEmbedError(Exception):
    """Base class of all errors raised on purpose by this package."""


class UsageError(CuratorEmbedError, ValueError):
    """The call cannot be carried out as asked; the message says what to change."""


class MissingExtra(CuratorEmbedError, ImportError):
    """An optional package is not installed; the message names the extra to install."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        self.package, self.extra, self.purpose = package, extra, purpose
        super().__init__(package, extra, purpose)  # as given: a worker's error is pickled on its way back

    def __str__(self) -> str:
        return (
            f"{self.purpose} needs the package '{self.package}', which is not installed. "
            f"Install it with: pip install 'curator-embed[{self.extra}]'"
        )


class SourceError(CuratorEmbedError):
    """A shard's files cannot be used; the message names the file and the remedy."""

    def __init__(self, path: str, problem: str, remedy: str) -> None:
        self.path, self.problem, self.remedy = path, problem, remedy
        super().__init__(path, problem, remedy)

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}. {self.remedy}"


class StepError(CuratorEmbedError):
    """A step does not do what it says, on any shard and any machine: it ends the run.

    The message names the step and the column.
    """


class ImageError(CuratorEmbedError):
    """One image cannot be decoded. Carries a stable code and, apart from it, detail for people."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        self.reason, self.detail = reason, detail
        super().__init__(reason, detail)

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else str(self.reason)
