"""Where files lie: one way to name, list, identify and write them on a disk and behind any fsspec URL.

Everything that can name a credential is cut out of what people get to see.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from curator_embed.errors import MissingExtra, SourceError, UsageError
from curator_embed.errors import redact as redact  # where paths are, this is looked for
from curator_embed.storage.options import WEB, options_for
from curator_embed.storage.options import StorageOptions as StorageOptions

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_EXTRAS = {
    "s3": ("s3fs", "s3"),
    "s3a": ("s3fs", "s3"),
    "gs": ("gcsfs", "gcs"),
    "gcs": ("gcsfs", "gcs"),
    "az": ("adlfs", "azure"),
    "abfs": ("adlfs", "azure"),
    "abfss": ("adlfs", "azure"),
    "http": ("aiohttp", "http"),
    "https": ("aiohttp", "http"),
}


# --- names ---------------------------------------------------------------------------------------


def is_remote(path: str) -> bool:
    """Whether ``path`` is a URL that fsspec must open; ``file://`` and plain paths are not."""
    return "://" in path and not path.startswith(("file://", "local://"))


def local_path(path: str) -> str:
    """A local path as the operating system wants it: without ``file://``, with ``~`` expanded."""
    return os.path.expanduser(path.removeprefix("file://").removeprefix("local://"))


def absolute(path: str) -> str:
    """A path that means the same to a worker that runs in another folder; URLs are left as they are.

    Raises:
        UsageError: the path is empty, which would mean the folder that the process happens to run in.
    """
    if is_remote(path):
        return path
    if not path.strip():
        raise UsageError(f"{path!r} is no path: it is empty. Name a file or a folder ('.' is the current one)")
    plain = local_path(path)
    return plain if os.path.isabs(plain) else os.path.abspath(plain)


def join(base: str, *parts: str) -> str:
    """Join path pieces with '/', for local paths and URLs alike."""
    return "/".join((base.rstrip("/") if base.strip("/") else base.removesuffix("/"), *parts))


def natural_key(path: str) -> tuple[list[list[str | int]], str]:
    """Sort key under which 2 comes before 10, folder by folder; ties go by the plain text."""
    pieces = [[int(p) if i % 2 else p for i, p in enumerate(re.split("([0-9]+)", s))] for s in path.split("/")]
    return pieces, path


# --- file systems --------------------------------------------------------------------------------


def filesystem(path: str, storage_options: StorageOptions = None) -> tuple[AbstractFileSystem, str]:
    """Open the file system of a URL: (fsspec file system, the path within it).

    Raises:
        MissingExtra: the package for this kind of URL is not installed.
        UsageError: no file system goes by this protocol, it refuses the storage options, or nobody answers.
    """
    import fsspec
    from fsspec.core import url_to_fs

    options: dict[str, Any] = dict(storage_options or {})
    if not is_remote(path):  # not as a URL: fsspec would take '::' in a file's name for a chain of them
        local = fsspec.filesystem("file", **options)
        return local, str(local._strip_protocol(path))
    protocol = path.rpartition("::")[2].partition("://")[0]
    try:
        if options and "::" not in path:
            options = options_for(protocol, options)
            if protocol in WEB:
                from curator_embed.storage.guard import client_of_origin

                host = re.split("[/?#]", path.partition("://")[2], maxsplit=1)[0].rpartition("@")[2]
                options.setdefault("get_client", client_of_origin(f"{protocol}://{host}"))
        fs, inner = url_to_fs(path, **options)
    except UsageError:
        raise
    except ImportError as exc:
        package, extra = _EXTRAS.get(protocol, (f"the fsspec package for {protocol}://", "all"))
        raise MissingExtra(package, extra, f"Reading {protocol}:// paths") from exc
    except (ValueError, TypeError, KeyError, OSError) as exc:  # some connect at once, and find nobody there
        raise UsageError(f"{redact(path)}: cannot be opened: {redact(str(exc))}") from exc
    return fs, inner


def open_web(public: tuple[str, ...] | None) -> AbstractFileSystem:
    """A file system for http(s) URLs on any host. It has no options: no host gets headers or credentials of the user's.

    Args:
        public: connect to public addresses only, and to these networks. None: to any address.

    Raises:
        MissingExtra: aiohttp is not installed.
    """
    import fsspec

    # Said one by one, because fsspec's own configuration may hold headers and credentials.
    plain: dict[str, Any] = {"client_kwargs": {}, "headers": {}, "auth": None, "cookies": None}
    try:
        if public is not None:
            from curator_embed.storage.guard import public_client

            plain["get_client"] = public_client(public)
        return fsspec.filesystem("http", **plain)
    except ImportError as exc:
        raise MissingExtra(*_EXTRAS["http"], "Reading http:// paths") from exc


def unreadable(path: str, exc: BaseException, at: int | None = None) -> SourceError:
    """Turn whatever a file system raised into an error that names the file and the remedy."""
    if isinstance(exc, FileNotFoundError):
        problem, remedy = "does not exist (any more)", "Restore it, or leave it out of the dataset"
    elif isinstance(exc, PermissionError):
        problem, remedy = "access denied", "Check the permissions or credentials for it"
    else:
        problem = f"cannot be read ({type(exc).__name__}: {redact(str(exc))})"
        remedy = "Check the disk or the connection and run again: finished shards are kept"
    where = "" if at is None else f" at byte {at}"
    return SourceError(redact(path), problem + where, remedy)


def fingerprint(path: str, storage_options: StorageOptions = None) -> dict[str, Any]:
    """Identify a stored file without reading it, as plain JSON values.

    Returns:
        ``{"size", "mtime_ns"}`` of a local file; ``{"size", "etag"}`` of a remote one that has an
        etag or checksum, else ``{"size", "mtime"}`` (text; null when the server tells none).

    Raises:
        SourceError: it does not exist or cannot be looked at.
    """
    if not is_remote(path):
        try:
            stat = os.stat(local_path(path))
        except OSError as exc:
            raise unreadable(path, exc) from exc
        return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    info = remote_info(path, storage_options)
    if (tag := etag(info)) is not None:
        return {"size": info.get("size"), "etag": tag}
    mtime = modified(info)
    return {"size": info.get("size"), "mtime": None if mtime is None else _plain(mtime)}


def etag(info: Mapping[str, Any]) -> str | None:
    """What a store tells a remote file's content by: an etag, a checksum, git's id on the Hugging Face hub."""
    names = ("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "Digest", "blob_id")
    return next((_plain(info[name]).strip('"') for name in names if info.get(name)), None)


def modified(info: Mapping[str, Any]) -> Any:
    """When a remote file was last written, in whatever type its file system tells it; None if it does not."""
    names = ("LastModified", "last_modified", "Last-Modified", "updated", "mtime", "created")
    return next((info[name] for name in names if info.get(name)), None)


def _plain(value: Any) -> str:
    if isinstance(value, bytes | bytearray):
        return value.hex()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def remote_info(path: str, storage_options: StorageOptions) -> dict[str, Any]:
    """What the file system knows of a remote file, freshly asked. Raises SourceError."""
    fs, inner = filesystem(path, storage_options)
    try:
        fs.invalidate_cache(inner)  # a listing made before the file was replaced must not answer
        return dict(fs.info(inner))
    except Exception as exc:  # every file system has exceptions of its own, here and below
        raise unreadable(path, exc) from None


def exists(path: str, storage_options: StorageOptions = None) -> bool:
    """Whether a file or folder is there. Raises SourceError where a server will not say."""
    if not is_remote(path):
        return os.path.exists(local_path(path))
    fs, inner = filesystem(path, storage_options)
    try:
        return bool(fs.exists(inner))
    except Exception as exc:
        raise unreadable(path, exc) from None


def is_folder(path: str, storage_options: StorageOptions = None) -> bool:
    """Whether ``path`` is a folder (on an object store: a prefix that holds something). Raises SourceError."""
    if not is_remote(path):
        return os.path.isdir(local_path(path))
    fs, inner = filesystem(path, storage_options)
    try:
        return bool(fs.isdir(inner))
    except Exception as exc:
        raise unreadable(path, exc) from None


def list_files(
    folder: str,
    suffixes: str | tuple[str, ...] = "",
    storage_options: StorageOptions = None,
    *,
    recursive: bool = False,
) -> list[str]:
    """The files of a folder whose names end so, as full paths or URLs in natural order (0, 1, 2, 10).

    Hidden files and folders (a leading dot) are left out: temporaries live there. Links to
    folders are not followed.

    Args:
        suffixes: lower-case endings that count, in any case; "" means every file.

    Raises:
        SourceError: the folder does not exist or cannot be listed.
    """
    if is_remote(folder):
        found = _list_remote(folder, storage_options, recursive)
    else:
        found = _list_local(local_path(folder), recursive)
    return sorted((path for path in found if path.lower().endswith(suffixes)), key=natural_key)


def glob_files(pattern: str, storage_options: StorageOptions = None) -> list[str]:
    """What a glob pattern matches, files and folders, as full paths or URLs in natural order."""
    if not is_remote(pattern):
        from glob import iglob

        return sorted(iglob(local_path(pattern), recursive=True), key=natural_key)
    fs, inner = filesystem(pattern, storage_options)
    try:
        fs.invalidate_cache()
        found = fs.glob(inner)
    except Exception as exc:
        raise unreadable(pattern, exc) from None
    return sorted((_as_listed(pattern, p) for p in found), key=natural_key)


def normal(path: str, storage_options: StorageOptions = None) -> str:
    """A path as listings spell it, so that what lies below it begins with it."""
    if not is_remote(path):
        return local_path(path)
    return as_url(path, filesystem(path, storage_options)[1])


def as_url(like: str, inner: str) -> str:
    """Give a path that a file system listed the protocol of the URL it was listed for."""
    return inner if "://" in inner else like[: like.rindex("://") + 3] + inner


def _list_remote(folder: str, storage_options: StorageOptions, recursive: bool) -> list[str]:
    fs, inner = filesystem(folder, storage_options)
    try:
        fs.invalidate_cache(inner)  # a listing made before files were added must not answer
        found = fs.find(inner, maxdepth=None if recursive else 1)
    except Exception as exc:
        raise unreadable(folder, exc) from None
    base = inner.rstrip("/") + "/"
    visible = (p for p in found if not any(s.startswith(".") for s in p.removeprefix(base).split("/")))
    return [_as_listed(folder, path) for path in visible]


def _as_listed(like: str, inner: str) -> str:
    """``as_url`` of a name in a listing. Some servers list what they like, and fsspec would open chains of URLs.

    Raises:
        SourceError: the name would be one.
    """
    url = as_url(like, inner)
    if url.count("::") > like.count("::"):
        raise SourceError(redact(url), "fsspec would take '::' in its name for a chain of URLs", "Rename it")
    return url


def _list_local(folder: str, recursive: bool) -> list[str]:
    found: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _is_dir(entry):
                    if recursive and not entry.is_symlink():
                        found += _list_local(entry.path, True)
                else:
                    found.append(entry.path)
    except OSError as exc:
        raise unreadable(folder, exc) from exc
    return found


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: whoever reads it says so
        return False


def write_whole(path: str, data: bytes, storage_options: StorageOptions = None) -> None:
    """Write a small file so that nobody ever sees half of it: renamed locally, put in one piece remotely.

    Raises:
        SourceError: it cannot be written there; nothing is left behind.
    """
    if is_remote(path):
        fs, inner = filesystem(path, storage_options)
        try:
            fs.pipe_file(inner, data)
        except Exception as exc:
            raise _unwritable(path, exc) from None
        return
    target = local_path(path)
    temporary = os.path.join(os.path.dirname(target), f".{os.path.basename(target)}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as exc:
        with suppress(OSError):
            os.unlink(temporary)
        raise _unwritable(path, exc) from exc


def _unwritable(path: str, exc: BaseException) -> SourceError:
    return SourceError(
        redact(path), f"cannot be written ({type(exc).__name__}: {redact(str(exc))})", "Choose a place that is writable"
    )
