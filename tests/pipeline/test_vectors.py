"""Embeddings by ordinal: in memory up to a bound, in nameless files past it, and the same either way."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from curator_embed.errors import SourceError
from curator_embed.pipeline import vectors as module
from curator_embed.pipeline.vectors import VectorMemory, Vectors
from curator_embed.storage.location import Location
from curator_embed.tables.writing import clear_temporaries

CHUNK = Vectors.CHUNK


def full_disk(*_: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("most", [None, 0, 1])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_vectors_of_many_chunks_are_gathered_by_ordinal(most: int | None, dtype: type, tmp_path: Path) -> None:
    memory = None if most is None else VectorMemory(most)
    vectors = Vectors(memory, str(tmp_path / "out" / "0.parquet"))
    wanted = [0, 1, CHUNK - 1, CHUNK, 5 * CHUNK + 3]
    for ordinal in wanted:
        vectors.put(ordinal, np.full(3, ordinal, dtype))
    found, present = vectors.gather(np.array([wanted[4], -1, 7, *wanted]))
    assert present.tolist() == [True, False, False] + [True] * 5
    assert found.dtype == dtype and found.shape == (8, 3)
    assert found[3:, 0].tolist() == [dtype(n) for n in wanted]
    assert vectors.gather(np.empty(0, np.int64))[0].shape == (0, 3)


def test_past_the_bound_values_are_the_same_and_no_file_is_seen(tmp_path: Path) -> None:
    count, rng = 3 * CHUNK + 17, np.random.default_rng(0)
    values = rng.standard_normal((count, 24), dtype=np.float32)
    memory = VectorMemory(CHUNK * values[0].nbytes)
    vectors = Vectors(memory, str(tmp_path / "0.parquet"))
    for ordinal in range(count):
        vectors.put(ordinal, values[ordinal])
    assert os.listdir(tmp_path) == []
    assert memory.used == CHUNK * values[0].nbytes, "one chunk in memory, the rest in the file"
    for order in (np.arange(count), rng.permutation(count), rng.integers(-1, count, 2 * count)):
        found, present = vectors.gather(order)
        assert (present == (order >= 0)).all()
        assert (found[order >= 0] == values[order[order >= 0]]).all()


def test_the_bound_is_shared_and_given_back() -> None:
    memory = VectorMemory(100_000)
    shards = [Vectors(memory) for _ in range(3)]
    for shard in shards:
        for ordinal in range(CHUNK + 1):
            shard.put(ordinal, np.ones(5, np.float32))
    assert memory.used == 2 * CHUNK * 20 + 16 * 20, "a chunk begins where there is room; the third shard found none"
    assert shards[2]._scratch is not None
    shards[0].close()
    assert memory.used == CHUNK * 20 and shards[0].gather(np.array([1]))[1].all(), "what is there can be read"
    shards[0].put(5000, np.ones(5, np.float32))
    assert not shards[0].gather(np.array([5000]))[1].any(), "what comes too late is dropped"


def test_many_small_shards_need_no_file(tmp_path: Path) -> None:
    """Memory is counted by the rows that are there, not by what is set aside for them."""
    memory = VectorMemory(4 << 20)
    shards = [Vectors(memory, str(tmp_path / "none" / f"{n}.parquet")) for n in range(100)]
    for shard in shards:
        shard.put(0, np.zeros(1024, np.float16))
    assert 0 < memory.used < 4 << 20 and not (tmp_path / "none").exists()


def test_a_file_that_keeps_its_name_is_cleared_like_other_temporaries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_use(path: str) -> None:
        raise PermissionError(errno.EACCES, "in use")

    monkeypatch.setattr(module.os, "unlink", in_use)
    vectors = Vectors(VectorMemory(0), str(tmp_path / "00000.parquet"))
    vectors.put(0, np.ones(4, np.float32))
    (left,) = os.listdir(tmp_path)
    assert left.startswith(f"00000.parquet.tmp-{os.getpid()}-") and left.endswith(".vectors")
    assert list(tmp_path.glob("*.parquet")) == []
    monkeypatch.undo()
    assert clear_temporaries(Location.of(str(tmp_path)), ["other"]) == 0
    assert clear_temporaries(Location.of(str(tmp_path)), ["00000"]) == 1


def test_where_no_file_can_lie_beside_the_output_it_lies_in_the_systems_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for place in (str(tmp_path / "file" / "0.parquet"), None):
        vectors = Vectors(VectorMemory(0), place)
        vectors.put(3, np.full(4, 7, np.float32))
        assert vectors.gather(np.array([3]))[0].tolist() == [[7.0] * 4]
        assert vectors._scratch is not None and vectors._scratch.folder == os.path.realpath(tempfile.gettempdir())


def test_a_full_disk_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = Vectors(VectorMemory(0), str(tmp_path / "0.parquet"))
    vectors.put(0, np.ones(4, np.float32))
    monkeypatch.setattr(module, "_allocate", full_disk)
    monkeypatch.setattr(module, "SEGMENT_BYTES", 1)
    said = pytest.raises(
        SourceError, match=rf"{tmp_path}: holds 64 MB .* has no room for more\. Free some space and run"
    )
    with said:
        for ordinal in range(0, 10_000 * CHUNK, CHUNK):
            vectors.put(ordinal, np.ones(4, np.float32))
    with pytest.raises(SourceError, match=rf"{tmp_path}: has no room for more"):
        Vectors(VectorMemory(0), str(tmp_path / "1.parquet")).put(0, np.ones(4, np.float32))
    assert os.listdir(tmp_path) == []


def test_room_is_made_where_the_disk_cannot_promise_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_here(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(module.os, "posix_fallocate", not_here)
    with open(tmp_path / "file", "wb") as file:
        module._allocate(file.fileno(), 4096, (1 << 20) + 4096)
    assert (tmp_path / "file").stat().st_size == (1 << 20) + 8192
    assert (tmp_path / "file").stat().st_blocks * 512 >= 1 << 20


MEMORY = """
import sys
import numpy as np
from curator_embed.pipeline.vectors import VectorMemory, Vectors

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

vectors = Vectors(VectorMemory(16 << 20), sys.argv[1])
values = np.random.default_rng(0).standard_normal((4096, 512), dtype=np.float32)
count = 40 * 4096
before = peak()
for ordinal in range(count):
    vectors.put(ordinal, values[ordinal % 4096])
order = np.random.default_rng(1).permutation(count)
for start in range(0, count, 8192):
    rows = order[start : start + 8192]
    found, present = vectors.gather(rows)
    assert present.all() and (found == values[rows % 4096]).all()
print(peak() - before)
"""


def test_a_large_shard_needs_little_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "0.parquet")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(ran.stdout) < 160, "MB more for 320 MB of vectors; 64 MB of the file are mapped at a time"
