"""A process that has imported everything and forks a child a job: kill tests without ten seconds of imports each.

Run as ``python -m tests.zygote``: reads a JSON job a line, answers with the child's exit status (negative: the signal).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def run_job(job: dict[str, Any]) -> None:
    """Embed ``job["source"]`` into ``job["output"]`` (null: in place) with the stub, as a user's script would.

    With ``job["images_per_file"]`` the source is a folder of images.
    """
    from curator_embed.datasets import ImageTextPairDataset
    from curator_embed.execution.clients import get_client
    from tests.stub import ColourEmbedder

    if job.get("workers"):
        get_client(n_workers=job["workers"])
    if images_per_file := job.get("images_per_file"):
        dataset = ImageTextPairDataset.from_folder(job["source"], images_per_file)
    else:
        dataset = ImageTextPairDataset.from_webdataset(job["source"])
    options = job.get("options", {})
    if job.get("kind") == "export":
        dataset.metadata["keep"] = dataset.metadata["width"] > 0
        dataset.to_webdataset(job["output"], "keep", samples_per_shard=7, progress=False, **options)
    elif job.get("kind") == "assign":
        dataset.metadata["half"] = dataset.metadata["width"] // 2
        dataset.save_metadata(job["output"], progress=False, **options)
    else:
        ColourEmbedder()(dataset).save_metadata(job["output"], progress=False, **options)


def main() -> None:
    """Serve jobs until standard input ends."""
    import torch  # noqa: F401

    import curator_embed.datasets.export
    import curator_embed.datasets.saving
    import curator_embed.decoding.pillow
    import curator_embed.execution.run  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            os.environ.update(job.get("environment", {}))
            status = 99
            try:
                run_job(job)
                status = 0
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(status)
        kill_after = job.get("kill_after")
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])), flush=True)


class Zygote:
    """The parent's side."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote"],
            cwd=Path(__file__).resolve().parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def run(self, **job: Any) -> int:
        """Run a job in a child; its exit status, or minus the signal that ended it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return int(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


if __name__ == "__main__":
    main()
