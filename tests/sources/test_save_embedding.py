"""The job that save-embedding does, by the command: a path list embedded and hashed from S3 by two processes side by
side, compared with one process that reads the same images from disk."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import moto.server as moto_server
import pyarrow.parquet as pq
import pytest
import s3fs

from curator_embed.cli import main
from tests.shards import crops

COMMAND = [sys.executable, "-c", "from curator_embed.cli import main; main()"]
REPO = Path(__file__).resolve().parents[2]
MODEL = "test_vit.r160_in1k"


@pytest.fixture
def server() -> Iterator[str]:
    running = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


def start(*arguments: object) -> subprocess.Popen[str]:
    secrets = {"AWS_ACCESS_KEY_ID": "AKIAHUNTER2", "AWS_SECRET_ACCESS_KEY": "hunter2secret"}
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        cwd=REPO,
        env={**os.environ, **secrets},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_processes_on_s3_write_what_one_does_from_disk(
    server: str, tmp_path: Path, wheel_photos: list[Path]
) -> None:
    import timm
    from safetensors.torch import save_file

    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model(MODEL, num_classes=0).state_dict(), weights)
    fs = s3fs.S3FileSystem(endpoint_url=server, key="a", secret="b", skip_instance_cache=True)
    fs.mkdir("replay")
    images = tmp_path / "images" / "album"
    images.mkdir(parents=True)
    for number, image in enumerate(crops(wheel_photos[0], 11)):
        (images / f"{number}.jpg").write_bytes(image)
        fs.pipe_file(f"replay/album/{number}.jpg", image)
    listing = tmp_path / "photos.txt"
    listing.write_text("".join(f"photos/album/{number}.jpg\n" for number in range(12)))  # the last is not there

    model = ["--model", MODEL, "--weights", weights, "--hash", "phash", "--compile", "off", "--quiet"]
    rows = ["--batch-size", 2, "--batch-per-inference", 1, "--inference-per-file", 2]
    common = ["embed", listing, "--dataset", "photos", *model, *rows]
    s3 = ["--root", "s3://replay", "--endpoint", server, "--region-name", "us-east-1", "--timeout", 20, "--retry", 3]
    parts = [(0, ("--end-line", 8)), (1, ("--start-line", 8))]
    out, logs = ["--no-proxy", "--output", tmp_path / "s3"], ["--log-dir", tmp_path / "logs", "--process-index"]
    runs = [start(*common, *s3, *out, *lines, *logs, index) for index, lines in parts]
    told = [run.communicate(timeout=240)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    with pytest.raises(SystemExit) as ended:
        main([*map(str, common), "--target-dir", str(tmp_path / "images"), "--output", str(tmp_path / "disk")])
    assert not ended.value.code

    names = [f"photos_{n:09d}-{n + 4:09d}.parquet" for n in (0, 4, 8)]
    for folder in ("s3", "disk"):
        assert sorted(path.name for path in (tmp_path / folder).glob("*.parquet")) == names
    for name in names:
        assert (tmp_path / "s3" / name).read_bytes() == (tmp_path / "disk" / name).read_bytes()
    table = pq.read_table(tmp_path / "s3")
    assert table.column_names == ["path", "image_embedding", "phash", "image_error"]
    assert table["path"].to_pylist() == listing.read_text().splitlines()
    assert table["image_error"].to_pylist() == [None] * 11 + ["not_found"]
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["photos_0.txt", "photos_1.txt"]
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for secret in ("AKIAHUNTER2", "hunter2secret"):
        assert secret.encode() not in written and secret not in "".join(told)
