"""The errors a person can meet, the reason codes a row can carry, and what no message may show.

Kept apart so that every room can raise them without importing another room.
"""

from __future__ import annotations

import re
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
    REFUSED = "refused"  # the row names what its dataset may not open: outside its root, another host, a chain
    AMBIGUOUS_ID = "ambiguous_id"  # an id occurs n times in the table and m times among the samples
    BAD_VECTOR = "bad_vector"  # the embedding is zero, infinite or not a number; none is stored
    EMBED_ERROR = "embed_error"  # a step failed on this image, or a custom embedder returned nothing for the row


_PUNCTUATION = "'\")]}.,:;"
_NO_SPACE = re.compile(r"[^\s\"<>]+")


def redact(text: str) -> str:
    """Take user names, passwords and queries (they may be signed) out of every URL in ``text``."""
    if "://" not in text:
        return text
    return _NO_SPACE.sub(lambda found: _redacted(found[0]), text)


def redact_name(name: str) -> str:
    """As ``redact``, for a text that is one name as a whole, a row's key say: whatever its URL holds, blanks too."""
    return _redacted(name, whole=True)


def _redacted(text: str, *, whole: bool = False) -> str:
    """One URL, or several that lead through each other. In a sentence, punctuation at the end is the sentence's."""
    first, *rest = text.split("://")
    shown, is_web = [first], False
    for piece in rest:
        is_web = is_web or shown[-1].lower().endswith(("http", "https"))
        shown.append(_without_user(piece))
        if is_web and (end := re.search("[?#]" if whole else "[?]", shown[-1])):
            shown[-1] = shown[-1][: end.start()] + ("" if whole else text[len(text.rstrip(_PUNCTUATION)) :])
            break
    return "://".join(shown)


def _without_user(rest: str) -> str:
    """What follows ``://``, without user and password. Both may hold an @, and secrets of S3 hold slashes."""
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    rest = rest[authority.rfind("@") + 1 :]
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    port = authority.partition(":")[2].rstrip(_PUNCTUATION)
    if port and not port.isdecimal() and not authority.startswith("["):
        rest = rest[rest.rfind("@") + 1 :]  # no port: a password that holds a slash
    return rest


class CuratorEmbedError(Exception):
    """Base class of all errors raised on purpose by this package. Its text shows no credentials."""

    def __str__(self) -> str:
        return redact(super().__str__())


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
        return redact(f"{self.path}: {self.problem}. {self.remedy}")


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
        return redact(f"{self.reason}: {self.detail}") if self.detail else str(self.reason)
