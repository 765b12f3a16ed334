"""What failures cost a run on a cluster of local processes, and that they cost nothing else.

    python -m benchmarks.failures [--shards 10000] [--workers 2] [--only NAME ...]

Tiny shards and a step that is nearly no work. Every outcome below is asserted, and its price printed as a ratio.

* undisturbed: wall time a shard, and what the driver's memory grows by.
* kills: workers get SIGKILL at random; the output is byte for byte the undisturbed one.
* scheduler: killed in the middle and started again; the next run works only on what was not finished.
* survivors: the same, but its workers live on and finish what they have, beside those of the next run.
* shard: one shard 50 times slower than the others; nobody waits for it but its own task.
* worker: one worker 50 times slower than the others; it gets less to do, and gives back what it has not begun.
* hanging: one worker is stopped in the middle, as by a disk that does not answer; the others do its shards, too.
* killer: one shard that kills every worker; it is set aside by its name, and no other is.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from distributed import Client
from distributed.core import Status
from PIL import Image

from benchmarks.images import write_shards
from benchmarks.stub import MeanColour, tiny_shards
from curator_embed.datasets import ImageTextPairDataset
from curator_embed.decoding.image import DecodedImage
from curator_embed.execution.clients import get_client
from curator_embed.execution.report import RunReport
from curator_embed.execution.run import RunStopped

REPO = Path(__file__).resolve().parents[1]
MARK = (255, 0, 255)
"""Colour of the images of a marked shard."""
SAMPLES = 4
"""Images of each shard."""
NANNY_KNOWS_S = 0.3
"""So long after its first task a worker's nanny surely knows that it has started; one that dies before is not started
again. Real workers take longer to load their models."""


class Troubled(MeanColour):
    """``MeanColour`` and what goes wrong beside it: the values and the recipe are the same.

    Args:
        pause: seconds that every image takes.
        on_mark: what an image of a marked shard does: take so many seconds, or kill its process, whose number is
            left in this file.
        slow_worker: a file and seconds: every image takes so long in the first process that makes the file.
    """

    def __init__(
        self, pause: float = 0.0, on_mark: str | float = 0.0, slow_worker: tuple[str, float] | None = None
    ) -> None:
        super().__init__()
        self.pause, self.on_mark, self.slow_worker = pause, on_mark, slow_worker

    def prepare(self, image: DecodedImage) -> Any:
        """One pixel, later or never."""
        seconds = self.pause
        if image.rgb.size == (8, 8) and image.rgb.getpixel((0, 0)) == MARK:
            if isinstance(self.on_mark, str):
                with open(self.on_mark, "a") as file:
                    file.write(f"{os.getpid()}\n")
                time.sleep(NANNY_KNOWS_S)
                os.kill(os.getpid(), signal.SIGKILL)
            seconds += self.on_mark
        if self.slow_worker is not None and _is_first(self.slow_worker[0]):
            seconds += self.slow_worker[1]
        time.sleep(seconds)
        return super().prepare(image)


def _is_first(file: str) -> bool:
    """Whether this is the process that made the file first."""
    me = str(os.getpid())
    try:
        with open(file, "x") as opened:
            opened.write(me)
    except FileExistsError:
        return Path(file).read_text() == me
    return True


def mark(folder: Path, number: int) -> str:
    """Give shard ``number`` images of one colour; returns its name."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), MARK).save(buffer, "PNG")
    with tempfile.TemporaryDirectory() as scratch:
        write_shards(Path(scratch), [buffer.getvalue()] * SAMPLES)
        for suffix in ("tar", "parquet"):
            (folder / f"{number:05d}.{suffix}").write_bytes((Path(scratch) / f"00000.{suffix}").read_bytes())
    return f"{number:05d}"


def import_everything() -> None:
    """Called on a worker: it has imported this module, and with it what a run needs, when it answers."""


def embed(folder: Path, output: Path, step: MeanColour) -> RunReport:
    """One run on the current client."""
    return step(ImageTextPairDataset.from_webdataset(str(folder))).save_metadata(str(output), progress=False)


def contents(output: Path) -> dict[str, bytes]:
    """The output's files, without the reports."""
    return {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}


def under_way(dask_worker: Any) -> int:
    """Tasks in a worker's threads, those included that it was told to forget."""
    return len(dask_worker.active_threads)


def check(holds: bool, what: str) -> None:
    """Stop the program where an outcome is not what it must be."""
    if not holds:
        raise AssertionError(what)


@dataclass
class Scene:
    """Shards, how an undisturbed run of them went, and where disturbed ones go.

    Attributes:
        pause: seconds that every image takes, so that there is time for something to happen.
        marked: name of the marked shard.
        whole: the undisturbed output.
        took: seconds the undisturbed run took.
    """

    scratch: Path
    shards: int
    workers: int
    pause: float = 0.0
    marked: str = ""
    whole: dict[str, bytes] = field(default_factory=dict)
    took: float = 0.0
    growth: float = 0.0

    @property
    def folder(self) -> Path:
        """The input."""
        return self.scratch / "in"

    def prepare(self) -> None:
        """Write the shards and run them undisturbed."""
        tiny_shards(self.folder, self.shards, SAMPLES)
        self.marked = mark(self.folder, self.shards // 2)
        with self.cluster():
            before, start = psutil.Process().memory_info().rss, time.perf_counter()
            report = embed(self.folder, self.scratch / "whole", Troubled(self.pause))
            self.took = time.perf_counter() - start
            self.growth = (psutil.Process().memory_info().rss - before) / 2**20
        check(report.shards["done"] == self.shards, str(report))
        self.whole = contents(self.scratch / "whole")

    @contextmanager
    def cluster(self) -> Iterator[Client]:
        """A cluster of local processes, which have imported what they need."""
        with get_client("cpu", n_workers=self.workers, processes=True) as client:
            client.run(import_everything)
            yield client
            client.cluster.close()

    def check_output(self, output: Path) -> None:
        """The output is the undisturbed one, byte for byte."""
        found = contents(output)
        different = [name for name in self.whole if found.get(name) != self.whole[name]]
        check(found.keys() == self.whole.keys(), f"{len(found)} files instead of {len(self.whole)}")
        check(not different, f"{different[:5]} differ")


def undisturbed(scene: Scene) -> dict[str, float]:
    """Overhead a shard and the driver's growth, from the run that ``Scene.prepare`` did."""
    return {
        "ms a shard, wall time times workers": 1000 * scene.took * scene.workers / scene.shards,
        "MB the driver and its scheduler grew by": scene.growth,
    }


def kills(
    scene: Scene, every: tuple[float, float] = (3.0, 6.0), at_most: int = 1000, seed: int = 5
) -> dict[str, float]:
    """Workers get SIGKILL at random moments, one at a time."""
    chosen, over, killed = random.Random(seed), threading.Event(), []
    output = scene.scratch / "kills"
    with scene.cluster() as client:

        def kill() -> None:
            while len(killed) < at_most and not over.wait(chosen.uniform(*every)):
                nannies = [nanny for nanny in client.cluster.workers.values() if nanny.process is not None]
                alive = [nanny.pid for nanny in nannies if nanny.process.status == Status.running]
                if alive:
                    killed.append(chosen.choice(alive))
                    os.kill(killed[-1], signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        start = time.perf_counter()
        try:
            report = embed(scene.folder, output, Troubled(scene.pause))
        finally:
            over.set()
            thread.join()
        took = time.perf_counter() - start
    check(len(killed) > 0, "no worker was killed")
    check(report.shards["done"] == scene.shards and not report.faults, str(report))
    scene.check_output(output)
    return {"workers killed": len(killed), "time / undisturbed": took / scene.took}


class OwnCluster:
    """A scheduler and workers as processes of their own, all of which can be killed."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{self.port}"
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> OwnCluster:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()

    def start(self) -> None:
        """Start the scheduler, always at the same address, and the workers."""
        self._spawn("dask_scheduler", "--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard")
        for _ in range(self.workers):
            self._spawn("dask_worker", self.address, "--nthreads", "2", "--no-dashboard", "--no-nanny")

    def _spawn(self, program: str, *arguments: str) -> None:
        command = [sys.executable, "-m", f"distributed.cli.{program}", *arguments]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.processes.append(subprocess.Popen(command, cwd=REPO, **quiet))

    def kill_scheduler(self) -> None:
        """As a power cut would."""
        self.processes[0].kill()

    def end(self) -> None:
        """Kill what is left of it; without its scheduler a worker finishes what it has before it goes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
        self.processes.clear()


def _lose_scheduler(scene: Scene, own: OwnCluster, output: Path) -> float:
    """A run whose scheduler is killed when a third is done; returns the seconds after which it has ended."""
    killed: list[float] = []

    def kill() -> None:
        while len(list(output.glob("*.parquet"))) < scene.shards // 3:
            time.sleep(0.05)
        own.kill_scheduler()
        killed.append(time.perf_counter())

    with Client(own.address):
        thread = threading.Thread(target=kill)
        thread.start()
        try:
            report = embed(scene.folder, output, Troubled(scene.pause))
            check(False, f"the run did not notice:\n{report}")
        except RunStopped as stopped:
            noticed = time.perf_counter() - killed[0]
            check("lost the Dask scheduler" in str(stopped), str(stopped))
            check(stopped.report.shards["left"] > 0, str(stopped.report))
        thread.join()
    return noticed


def scheduler(scene: Scene) -> dict[str, float]:
    """The scheduler is killed when a third is done; a second cluster goes on from there."""
    output = scene.scratch / "scheduler"
    with OwnCluster(scene.workers) as own:
        noticed = _lose_scheduler(scene, own, output)
        own.end()
        before = {path.name: path.stat().st_mtime_ns for path in output.glob("*.parquet")}
        own.start()
        with Client(own.address):
            report = embed(scene.folder, output, Troubled(scene.pause))
    check(report.shards["skipped"] == len(before), f"{len(before)} were finished: {report}")
    check(report.shards["done"] == scene.shards - len(before), str(report))
    again = [name for name in before if (output / name).stat().st_mtime_ns != before[name]]
    check(not again, f"finished shards were written again: {again[:5]}")
    scene.check_output(output)
    return {
        "seconds until the run ended": noticed,
        "shards finished before / all": len(before) / scene.shards,
        "shards worked on again": len(again),
    }


def survivors(scene: Scene) -> dict[str, float]:
    """The scheduler is killed and its workers are not; the next run begins at once, on another cluster."""
    output = scene.scratch / "survivors"
    with OwnCluster(scene.workers) as old, OwnCluster(scene.workers) as new:
        _lose_scheduler(scene, old, output)
        check(all(process.poll() is None for process in old.processes[1:]), "the old workers are gone")
        with Client(new.address):
            report = embed(scene.folder, output, Troubled(scene.pause))
    check(not report.faults and report.shards["done"] + report.shards["skipped"] == scene.shards, str(report))
    scene.check_output(output)
    return {"shards the next run found open / all": report.shards["done"] / scene.shards}


def slow_shard(scene: Scene, factor: float = 50.0) -> dict[str, float]:
    """One shard takes ``factor`` times as long as a task does; the others go on."""
    output = scene.scratch / "slow-shard"
    alone = factor * max(scene.pause, scene.took * scene.workers / scene.shards)
    with scene.cluster():
        start = time.perf_counter()
        report = embed(scene.folder, output, Troubled(scene.pause, on_mark=alone))
        took = time.perf_counter() - start
    check(report.shards["done"] == scene.shards, str(report))
    scene.check_output(output)
    limit = 1.5 * scene.took + SAMPLES * alone + 5
    check(took < limit, f"{took:.1f} s, at most {limit:.1f} s")
    return {"seconds of the slow image": alone, "time / undisturbed": took / scene.took}


def slow_worker(scene: Scene, factor: float = 50.0) -> dict[str, float]:
    """One worker takes ``factor`` times as long for everything; the others do its share."""
    output = scene.scratch / "slow-worker"
    each = factor * max(scene.pause, scene.took * scene.workers / scene.shards)
    with scene.cluster():
        start = time.perf_counter()
        step = Troubled(scene.pause, slow_worker=(str(scene.scratch / "slow"), each))
        report = embed(scene.folder, output, step)
        took = time.perf_counter() - start
    check(report.shards["done"] == scene.shards, str(report))
    scene.check_output(output)
    without = scene.took * scene.workers / (scene.workers - 1 + 1 / factor)
    limit = 1.5 * without + 24 * each + 5
    check(took < limit, f"{took:.1f} s, at most {limit:.1f} s")
    return {
        "seconds a shard on the slow worker": each,
        "time / undisturbed": took / scene.took,
        "time / the fair share of the others": took / without,
    }


def hanging(scene: Scene) -> dict[str, float]:
    """A worker gets SIGSTOP when the first shard is written, and goes on when the run is over."""
    output = scene.scratch / "hanging"
    with scene.cluster() as client:
        pids = sorted(client.run(os.getpid).values())

        def stop() -> None:
            while not any(output.glob("*.parquet")):
                time.sleep(0.01)
            os.kill(pids[0], signal.SIGSTOP)

        thread = threading.Thread(target=stop)
        thread.start()
        start = time.perf_counter()
        try:
            report = embed(scene.folder, output, Troubled(scene.pause))
        finally:
            thread.join()
            os.kill(pids[0], signal.SIGCONT)
        took = time.perf_counter() - start
        check(report.shards["done"] == scene.shards and report.workers_lost == 0, str(report))
        # It goes on with what it had; killed at that, it would leave a temporary file.
        ends = time.monotonic() + 30
        while any(client.run(under_way).values()) and time.monotonic() < ends:
            time.sleep(0.1)
    scene.check_output(output)
    return {"seconds more than undisturbed": took - scene.took}


def killer(scene: Scene) -> dict[str, float]:
    """One shard kills whoever works on it."""
    output, killed = scene.scratch / "killer", scene.scratch / "killed"
    with scene.cluster():
        start = time.perf_counter()
        try:
            report = embed(scene.folder, output, Troubled(scene.pause, on_mark=str(killed)))
            check(False, f"nobody was killed:\n{report}")
        except RunStopped as stopped:
            report = stopped.report
        took = time.perf_counter() - start
    check(list(report.faults) == [scene.marked], f"{report.faults}, not {scene.marked}")
    check(report.shards == {"done": scene.shards - 1, "skipped": 0, "failed": 1, "left": 0}, str(report))
    found, name = contents(output), f"{scene.marked}.parquet"
    check(name not in found and found == {n: b for n, b in scene.whole.items() if n != name}, "the others differ")
    deaths = len(set(killed.read_text().split()))
    return {"workers it killed": deaths, "time / undisturbed": took / scene.took}


SCENES: dict[str, tuple[Callable[[Scene], dict[str, float]], int]] = {
    "undisturbed": (undisturbed, 10_000),
    "kills": (kills, 10_000),
    "scheduler": (scheduler, 10_000),
    "survivors": (survivors, 2_000),
    "shard": (slow_shard, 2_000),
    "worker": (slow_worker, 2_000),
    "hanging": (hanging, 2_000),
    "killer": (killer, 2_000),
}
"""Name -> what happens, and on how many shards at most."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=list(SCENES), default=list(SCENES))
    arguments = parser.parse_args()
    scenes: dict[int, Scene] = {}
    with ExitStack() as stack:
        for name in arguments.only:
            happens, most = SCENES[name]
            count = min(arguments.shards, most)
            if count not in scenes:
                scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                scenes[count] = Scene(scratch, count, arguments.workers)
                scenes[count].prepare()
            print(f"{name}: {count} shards of {SAMPLES} images, {arguments.workers} workers", flush=True)
            for label, value in happens(scenes[count]).items():
                print(f"  {label:<50} {value:>10.2f}", flush=True)


if __name__ == "__main__":
    from benchmarks import failures  # workers import the step by this name, "__main__" would travel by value

    failures.main()
