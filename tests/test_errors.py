"""What messages may show: URLs without users, passwords and signed queries."""

from __future__ import annotations

import pickle
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from curator_embed.errors import ImageError, MissingExtra, Reason, SourceError, UsageError, redact, redact_name
from curator_embed.sources.shard import Note

URL = "https://me:hunter2@host/a.tar?X-Amz-Signature=hunter2"

_SAFE = string.ascii_letters + string.digits + "-._~"
_PASSWORDS = st.text(_SAFE + "!$&'()*+,;=:@%", min_size=1, max_size=20).map(lambda text: f"Q{text}Q")
_S3_SECRETS = st.text(string.ascii_letters + string.digits + "/+=", min_size=1, max_size=40).map(
    lambda text: f"Q{text}Q"
)
_QUERIES = st.text(_SAFE + "!$&'()*+,;=:@%/?", max_size=30).map(lambda text: f"sig=Q{text}Q")
_PATHS = st.lists(st.text(_SAFE + "!$&'()*+,;=:@%", max_size=8), max_size=4).map("/".join)
_HOSTS = st.sampled_from(["host", "host.example:8000", "[::1]", "[2001:db8::1]:443", "bucket"])


@given(st.sampled_from(["http", "https", "HTTPS", "s3", "ftp"]), _PASSWORDS, _HOSTS, _PATHS)
def test_no_password_is_shown(scheme: str, password: str, host: str, path: str) -> None:
    url = f"{scheme}://user:{password}@{host}/{path}"
    for text in (redact(url), redact_name(url), redact(f"('{url}', at 3): no")):
        assert password not in text and f"{scheme}://{host}/" in text and "user" not in text.partition(host)[0]


@given(_S3_SECRETS, _PATHS)
def test_no_secret_with_slashes_is_shown(secret: str, path: str) -> None:
    for url in (f"s3://KEY:{secret}@bucket/{path}", f"http://me:{secret}@host/{path}"):
        assert secret not in redact(url) + redact_name(url) + redact(f"'{url}': no such file")


@given(st.sampled_from(["http", "https", "HTTP"]), _HOSTS, _PATHS, _QUERIES)
@example("http", "host", "://", "sig=QQ")
def test_no_query_is_shown(scheme: str, host: str, path: str, query: str) -> None:
    url = f"{scheme}://{host}/{path}?{query}"
    for text in (redact(url), redact_name(url), redact(f"{url} failed"), redact(f'"{url}" and')):
        assert query not in text and "sig=Q" not in text
    assert redact_name(f"{url}#token") == f"{scheme}://{host}/{path}"


@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=10))
def test_a_name_shows_no_query_whatever_it_holds(path: str, query: str, before: str) -> None:
    name = f"{before}https://me:hunter2@host/{path}?sig=hunter2{query}"
    assert "hunter2" not in redact_name(name)


@given(st.text(max_size=60))
def test_text_without_urls_stays(text: str) -> None:
    assert redact(text) == text or "://" in text
    assert redact_name(text) == text or "://" in text
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "http://localhost:8000/x@y",
        "s3://bucket/00?.tar: no *.tar there",
        "hf://datasets/user/name@main/x.parquet",
        "/data/what?.jpg",
        "http://[::1]:80/x@y",
        "see https://h/b, or s3://c/d",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_punctuation_behind_a_query_stays() -> None:
    assert redact("('https://h/b?t=1', \"https://h/c?s=2\"): no") == "('https://h/b', \"https://h/c\"): no"


def test_long_texts_take_no_time() -> None:
    for text in ("a://a:b" * 100_000, "http://" * 100_000 + "?", ")" * 500_000 + "://", "://" * 300_000):
        redact(text), redact_name(text)


@pytest.mark.parametrize(
    "error",
    [UsageError(f"{URL}: no"), SourceError(URL, f"gone ({URL})", f"see {URL}"), ImageError(Reason.CORRUPT, URL)],
)
def test_errors_show_no_credentials(error: Exception) -> None:
    for shown in (str(error), str(pickle.loads(pickle.dumps(error)))):
        assert "hunter2" not in shown and "https://host/a.tar" in shown
    assert "aiohttp" in str(MissingExtra("aiohttp", "http", "Reading"))


def test_notes_show_no_credentials() -> None:
    note = Note("0", URL, f"of {URL}, say")
    assert (note.path, note.message) == ("https://host/a.tar", "of https://host/a.tar, say")
