"""What a source costs: the same images from tars, from a path list on disk, and from a server, in turn, round by round.

    python -m benchmarks.sources [--images 600] [--rounds 3] [--threads 2] [--in-flight 64] [--photos FOLDER]

* decode: Pillow decodes to RGB, nothing else, in as many threads.
* read only, and the data path (read, decode, resize, crop, normalise, no model), from each source.
* server: a static server on loopback, a process of its own that answers from memory; its ceiling is what a bare
  client gets out of it that does nothing with the answers.

http:// is fsspec's HTTP file system, s3:// is s3fs with that server as its endpoint (which checks no signature).
Everything shares the cores: server, clients and decoders.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.cpu import NormaliseOnly, decode_only, timed
from benchmarks.images import encoded_images, write_shards
from curator_embed.embedders import TimmImageEmbedder
from curator_embed.execution.job import ShardJob
from curator_embed.execution.shard_run import ShardRun
from curator_embed.pipeline.engines import CpuEngine
from curator_embed.pipeline.pipeline import Pipeline
from curator_embed.sources.path_list import find_lines
from curator_embed.sources.shard import Shard
from curator_embed.sources.webdataset import find_shards
from curator_embed.steps import Settings
from curator_embed.storage.objects import ReadPolicy
from curator_embed.storage.s3 import S3Options

PER_SHARD = 200


class Answers(asyncio.Protocol):
    """HTTP/1.1 with keep-alive, GET only: the last part of the path is a key of ``stored``."""

    def __init__(self, stored: dict[bytes, bytes]) -> None:
        self.stored, self.received = stored, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        while (end := self.received.find(b"\r\n\r\n")) >= 0:
            path = self.received[:end].split(b" ", 2)[1]
            self.received = self.received[end + 4 :]
            body = self.stored.get(path.rpartition(b"/")[2])
            status = b"404 Not Found" if body is None else b"200 OK"
            length = 0 if body is None else len(body)
            head = b'HTTP/1.1 %s\r\nContent-Length: %d\r\nETag: "x"\r\nContent-Type: image/jpeg\r\n\r\n' % (
                status,
                length,
            )
            self.transport.write(head + (body or b""))


def serve(folder: Path, tell: Connection) -> None:
    """Load a folder's files and answer for ever; tells its port."""
    stored = {path.name.encode(): path.read_bytes() for path in folder.iterdir()}

    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(lambda: Answers(stored), "127.0.0.1", 0)
        tell.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def bare_client(port: int, names: Sequence[str], connections: int) -> int:
    """Ask for every file and read the answers, doing nothing with them."""

    async def one(mine: Sequence[str]) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        for name in mine:
            writer.write(f"GET /{name} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r")[0])
            await reader.readexactly(length)
        writer.close()
        return len(mine)

    async def run() -> int:
        return sum(await asyncio.gather(*(one(names[n::connections]) for n in range(min(connections, len(names))))))

    return asyncio.run(run())


def read_only(shards: Sequence[Shard], id_col: str) -> int:
    """Drain a source."""
    return sum(sample.image is not None for shard in shards for sample in shard.samples(id_col=id_col))


def data_path(shards: Sequence[Shard], id_col: str, embedder: TimmImageEmbedder, threads: int) -> int:
    """Our pipeline with a model that does nothing, without writing."""
    pipeline = Pipeline(CpuEngine((embedder,)), {0: NormaliseOnly(embedder)}, threads=threads)
    count = 0
    try:
        with tempfile.TemporaryDirectory() as nowhere:
            job = ShardJob((embedder,), id_col, output=nowhere, decode_threads=threads)
            runs = []
            for shard in shards:
                run = ShardRun(job, shard, pipeline)
                run.begin()
                runs.append(run)
                count += sum(run.has_image) - len(run.source_errors)
            for run in runs:
                assert run.opened is not None
                run.opened.wait()
                run.abandon()
    finally:
        pipeline.close()
    return count


def main(arguments: list[str] | None = None) -> None:
    """Print the table and, with ``--json``, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=cores)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--model", default="vit_base_patch32_clip_224.openai")
    parser.add_argument("--photos", type=Path, help="a folder of photographs to cut from, instead of the wheels' own")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)

    os.environ.setdefault("AWS_ACCESS_KEY_ID", "benchmark")
    os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "benchmark")
    with tempfile.TemporaryDirectory() as scratch:
        images = encoded_images(given.images, given.photos)
        tars = write_shards(Path(scratch) / "tars", images, PER_SHARD)
        loose = Path(scratch) / "loose"
        loose.mkdir()
        names = [f"{number:06d}.jpg" for number in range(len(images))]
        for name, data in zip(names, images, strict=True):
            (loose / name).write_bytes(data)
        listing = Path(scratch) / "list.txt"
        listing.write_text("".join(f"{name}\n" for name in names))
        here, there = multiprocessing.Pipe()
        server = multiprocessing.get_context("spawn").Process(target=serve, args=(loose, there), daemon=True)
        server.start()
        port = here.recv()

        def listed(root: str, options: S3Options | None = None) -> list[Shard]:
            policy = ReadPolicy(in_flight=given.in_flight)
            return list(
                find_lines(listing, root=root, images_per_file=PER_SHARD, storage_options=options, policy=policy)
            )

        s3 = S3Options(
            region="us-east-1", endpoint=f"http://127.0.0.1:{port}", connections=given.in_flight, no_proxy=True
        )
        sources: dict[str, tuple[list[Shard], str]] = {
            "tars": (list(find_shards(str(tars))), "key"),
            "disk": (listed(str(loose)), "path"),
            "http": (listed(f"http://127.0.0.1:{port}"), "path"),
            "s3": (listed("s3://bucket", s3), "path"),
        }
        embedder = TimmImageEmbedder(given.model, num_threads_per_worker=given.threads, device="cpu").settled(
            Settings(threads=cores)
        )
        rows: dict[str, Callable[[], int]] = {
            "decode": lambda: decode_only(images, given.threads),
            "server": lambda: bare_client(port, names, given.in_flight),
        }
        for name, (shards, id_col) in sources.items():
            rows[f"read {name}"] = lambda shards=shards, id_col=id_col: read_only(shards, id_col)  # type: ignore[misc]
        for name, (shards, id_col) in sources.items():
            rows[f"path {name}"] = lambda shards=shards, id_col=id_col: data_path(  # type: ignore[misc]
                shards, id_col, embedder, given.threads
            )
        rates: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(given.rounds + 1):
            for name, work in rows.items():
                rates[name].append(timed(work))
        server.terminate()
        server.join()

    medians = {name: statistics.median(values[1:]) for name, values in rates.items()}
    size = sum(map(len, images)) / len(images) / 1000
    print(
        f"{len(images)} JPEGs of {size:.0f} KB, {given.threads} threads, {cores} cores, {given.in_flight} in flight, "
        f"median of {given.rounds} rounds after one warm-up"
    )
    for name, rate in medians.items():
        print(f"  {name:<10} {rate:>8.1f} images/s   ({min(rates[name][1:]):.0f}-{max(rates[name][1:]):.0f})")
    least = min(medians["server"], medians["decode"])
    ratios = {
        "path list on disk / tars": (medians["path disk"] / medians["path tars"], 0.95),
        "http / smaller of server and decode": (medians["path http"] / least, 0.9),
        "s3 / smaller of server and decode": (medians["path s3"] / least, 0.9),
        "http / tars": (medians["path http"] / medians["path tars"], None),
        "s3 / tars": (medians["path s3"] / medians["path tars"], None),
    }
    for name, (ratio, wanted) in ratios.items():
        print(f"  {name:<40} {ratio:>6.2f}" + ("" if wanted is None else f"   (to reach: {wanted})"))
    if given.json:
        found = {"rates": medians, "ratios": {name: ratio for name, (ratio, _) in ratios.items()}}
        given.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
