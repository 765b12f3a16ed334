"""Ask the tests of pure modules whether they see small faults: ``python -m tests.mutation.run [NAME ...]``.

Every mutant (`mutants.py`) is written into a copy of the checkout, and the module's own tests run there with ``-x``. A
mutant that no test fails for is a survivor: either a test is missing, or the change makes no difference, and then
`equivalent.txt` says why. The status is 1 when a survivor is not explained, or an explanation fits no mutant.

Python and the packages are imported once. Each mutant runs in a fork of that process, in a folder of its own; children
of the tests find the copy too, by ``PYTHONPATH``. More CPU time than four times what the tests need counts as killed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.mutation.mutants import Mutant, mutants_of

ROOT = Path(__file__).resolve().parents[2]
EQUIVALENT = Path(__file__).with_name("equivalent.txt")
OURS = ("curator_embed", "tests")


@dataclass(frozen=True)
class Target:
    """A module, and the test files that must see its faults: the fastest first. Paths from the root.

    Attributes:
        without: parts of names of tests in these files that take long and test something else.
    """

    module: str
    tests: tuple[str, ...]
    without: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """For pytest."""
        names = " and ".join(f"not {name}" for name in self.without)
        return ["-m", "not slow and not gpu and not slurm", *(["-k", names] if names else []), *self.tests]


TARGETS = {
    "geometry": Target("curator_embed/decoding/geometry.py", ("tests/decoding/test_geometry.py",)),
    "pairing": Target("curator_embed/tables/pairing.py", ("tests/tables/test_pairing.py",)),
    "provenance": Target("curator_embed/tables/provenance.py", ("tests/tables/test_provenance.py",)),
    "judge": Target("curator_embed/tables/judge.py", ("tests/tables/test_judge.py",)),
    "conflicts": Target("curator_embed/tables/conflicts.py", ("tests/tables/test_judge.py",)),
    "bookkeeping": Target("curator_embed/tables/bookkeeping.py", ("tests/tables/test_bookkeeping.py",)),
    "nulls": Target("curator_embed/tables/nulls.py", ("tests/tables/test_nulls.py",)),
    "thrift": Target(
        "curator_embed/tables/thrift.py", ("tests/tables/test_thrift.py", "tests/tables/test_fidelity.py")
    ),
    "splicing": Target("curator_embed/tables/splicing.py", ("tests/tables/test_fidelity.py",)),
    "rewriting": Target("curator_embed/tables/rewriting.py", ("tests/tables/test_fidelity.py",)),
    "writing": Target(
        "curator_embed/tables/writing.py", ("tests/tables/test_writing.py", "tests/tables/test_fidelity.py")
    ),
    "fitting": Target("curator_embed/sources/fitting.py", ("tests/sources/test_fitting.py",)),
    "blame": Target(
        "curator_embed/execution/blame.py",
        ("tests/execution/test_blame.py",),
        without=("breaks_the_model", "breaks_on_everything_ends"),
    ),
    "stragglers": Target(
        "curator_embed/execution/stragglers.py",
        ("tests/execution/test_stragglers.py",),
        without=("does_not_wait", "somebody_else", "keeps_what_is_through"),
    ),
}


@dataclass
class Slot:
    """A copy of the checkout, in which one mutant runs at a time."""

    folder: Path
    mutant: Mutant | None = None
    deadline: float = field(default=0.0)

    @classmethod
    def made(cls, folder: Path) -> Slot:
        """Copy the package and its tests; what else lies at the root is linked."""
        folder.mkdir()
        for path in ROOT.iterdir():
            if path.name in OURS:
                shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            elif path.name == "pyproject.toml":
                shutil.copy(path, folder)
            elif not path.name.startswith("."):
                (folder / path.name).symlink_to(path)
        return cls(folder)

    def write(self, module: str, source: str) -> None:
        """Put a source in the module's place; what was compiled from another one goes."""
        path = self.folder / module
        path.write_text(source, encoding="utf-8")
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
            compiled.unlink()


def run_tests(slot: Slot, arguments: Sequence[str], cpu_seconds: float | None) -> int:
    """Fork; the child runs the tests in the slot and ends with pytest's status. Returns its process id.

    The child leaves in ``modules.json`` which modules of others it has imported, in their order.
    """
    process = os.fork()
    if process:
        return process
    status = 70
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if cpu_seconds is not None:
            resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_seconds) + 1, int(cpu_seconds) + 2))
        log = os.open(slot.folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = _in_child(slot.folder, arguments)
    finally:
        os._exit(status)


def _in_child(folder: Path, arguments: Sequence[str]) -> int:
    for name in list(sys.modules):
        if name.partition(".")[0] in OURS:
            del sys.modules[name]
    os.chdir(folder)
    sys.path = [str(folder), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ |= {"PYTHONPATH": str(folder), "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis")}

    import hypothesis
    import pytest

    # The same examples in every run, no time limits that a busy machine breaks, and no search for a smaller failure.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutation", derandomize=True, deadline=None, phases=phases)
    hypothesis.settings.load_profile("mutation")
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:warnings", "--basetemp", str(folder / "temporary")]
    status = int(pytest.main([*options, *arguments]))
    package = sys.modules.get("curator_embed")
    assert package is not None and Path(str(package.__file__)).is_relative_to(folder), "the tests ran elsewhere"
    theirs = [name for name in sys.modules if name.partition(".")[0] not in (*OURS, "__main__", "conftest")]
    (folder / "modules.json").write_text(json.dumps(theirs))
    return status


def baseline(slot: Slot, target: Target) -> float:
    """Run the tests against the module as it is, import what they needed, and run them again.

    Returns the CPU seconds of the second run, which is what a mutant's run costs.
    """
    needed = 0.0
    for round in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        _, status = os.waitpid(run_tests(slot, target.arguments(), None), 0)
        if status:
            print((slot.folder / "output.txt").read_text()[-3000:])
            raise SystemExit(f"{target.module}: its tests fail without any change; correct that first")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        needed = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        if round == 0:
            for name in json.loads((slot.folder / "modules.json").read_text()):
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
    return needed


def verdicts(target: Target, mutants: Sequence[Mutant], slots: Sequence[Slot]) -> Iterator[tuple[Mutant, str]]:
    """Run every mutant; yields it with ``killed``, ``timed out`` or ``survived``, as they end."""
    needed = baseline(slots[0], target)
    allowed = 4 * needed + 5
    waiting = list(reversed(mutants))
    running: dict[int, Slot] = {}
    try:
        yield from _run_all(target, waiting, running, slots, allowed)
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)


def _run_all(
    target: Target, waiting: list[Mutant], running: dict[int, Slot], slots: Sequence[Slot], allowed: float
) -> Iterator[tuple[Mutant, str]]:
    while waiting or running:
        for slot in slots:
            if slot.mutant is None and waiting:
                slot.mutant = waiting.pop()
                slot.write(target.module, slot.mutant.source)
                slot.deadline = time.monotonic() + 20 * allowed
                running[run_tests(slot, target.arguments(), allowed)] = slot
        for process, slot in list(running.items()):
            ended, status = os.waitpid(process, os.WNOHANG)
            late = time.monotonic() > slot.deadline
            if not ended and not late:
                continue
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)  # and what its tests have started
            if not ended:
                os.waitpid(process, 0)
            del running[process]
            mutant, slot.mutant = slot.mutant, None
            assert mutant is not None
            if late or os.WIFSIGNALED(status):
                yield mutant, "timed out"
            else:
                yield mutant, "killed" if os.WEXITSTATUS(status) else "survived"
        time.sleep(0.01)


@dataclass(frozen=True)
class Explained:
    """Why a change makes no difference."""

    module: str
    before: str
    after: str
    reason: str


def read_explanations(text: str) -> list[Explained]:
    """Read `equivalent.txt`: a module's path, then blocks of ``- before``, ``+ after``, ``# reason``.

    Several ``+`` lines share a reason. Blank lines are for the eye.
    """
    found: list[Explained] = []
    module, before, after = "", "", []
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("- "):
            before, after = line[2:], []
        elif line.startswith("+ "):
            after.append(line[2:])
        elif line.startswith("# "):
            found += [Explained(module, before, one, line[2:]) for one in after]
            after = []
        else:
            module = line
    return found


def examine(name: str, slots: Sequence[Slot], lines: range | None) -> Counter[str]:
    """Run one target's mutants, print survivors as they are found, and count the verdicts."""
    target = TARGETS[name]
    mutants = [m for m in mutants_of((ROOT / target.module).read_text()) if lines is None or m.line in lines]
    explained = {(e.before, e.after) for e in read_explanations(EQUIVALENT.read_text()) if e.module == target.module}
    counts: Counter[str] = Counter()
    for done, (mutant, verdict) in enumerate(verdicts(target, mutants, slots), 1):
        if verdict == "survived":
            if (mutant.before, mutant.after) in explained:
                verdict = "equivalent"
            else:
                print(f"{target.module}:{mutant.line}\n  - {mutant.before}\n  + {mutant.after}", flush=True)
        counts[verdict] += 1
        if sys.stderr.isatty():
            print(f"\r{name}: {done} of {len(mutants)} ", end="", file=sys.stderr, flush=True)
    there = {(mutant.before, mutant.after) for mutant in mutants}
    for before, after in sorted(explained - there) if lines is None else ():
        counts["explained, not there"] += 1
        print(f"{EQUIVALENT.name} explains a change that {target.module} no longer has:\n  - {before}\n  + {after}")
    return counts


COLUMNS = ("killed", "timed out", "equivalent", "survived", "explained, not there")


def main() -> None:
    """Run the named targets, or all, and print a table."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to examine, of: {', '.join(TARGETS)}")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="mutants that run at a time")
    parser.add_argument("--lines", metavar="FIRST-LAST", help="only changes on these lines")
    options = parser.parse_args()
    if unknown := set(options.names) - TARGETS.keys():
        parser.error(f"no target is called {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is under way is ended, and the copies go
    lines = None
    if options.lines:
        first, _, last = options.lines.partition("-")
        lines = range(int(first), int(last or first) + 1)
    table = []
    for name in options.names or TARGETS:
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
            slots = [Slot.made(Path(folder) / str(number)) for number in range(options.workers)]
            counts = examine(name, slots, lines)
        table.append((name, counts, time.monotonic() - started))
    print(f"\n{'module':16}" + "".join(f"{column:>22}" for column in COLUMNS) + f"{'seconds':>10}")
    for name, counts, seconds in table:
        print(f"{name:16}" + "".join(f"{counts[column]:22}" for column in COLUMNS) + f"{seconds:10.0f}")
    if any(counts["survived"] or counts["explained, not there"] for _, counts, _ in table):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
