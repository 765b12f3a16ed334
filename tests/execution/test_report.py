"""What a run's report says of its stages."""

from __future__ import annotations

import pytest

from curator_embed.errors import MissingExtra, SourceError, UsageError
from curator_embed.execution.job import FailedRows, Fault, FaultKind, NothingReadable, ShardReport, fault_of
from curator_embed.execution.report import RunReport, bottleneck
from curator_embed.pipeline.pipeline import Gauge


def test_a_gauge_weighs_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    gauge = Gauge()
    for moment, level in ((1.0, 4.0), (3.0, 1.0)):
        now[0] = moment
        gauge.move(level, level / 4)
    now[0] = 5.0
    assert gauge.take() == {"seconds": 5.0, "waited": 10.0, "filled": 2.5, "most": 4.0}
    now[0] = 7.0
    assert gauge.take() == {"seconds": 2.0, "waited": 2.0, "filled": 0.5, "most": 1.0}


@pytest.mark.parametrize(
    ("read", "decode", "model", "write", "found"),
    [(0.1, 0.5, 0.9, 0.1, "model"), (0.3, 0.9, 0.5, 0.1, "decode"), (0.6, 0.8, 0.2, 0.3, "read"),
     (0.3, 0.8, 0.2, 0.6, "write"), (0.1, 0.4, 0.0, 0.1, "decode")],
)  # fmt: skip
def test_the_bottleneck_is_where_least_time_is_left(
    read: float, decode: float, model: float, write: float, found: str
) -> None:
    assert bottleneck({"read": read, "decode": decode, "model": model, "write": write}) == found


def test_a_fault_is_a_value_in_python_and_text_in_json() -> None:
    report = RunReport()
    report.add(ShardReport("7", fault=Fault(FaultKind.UNUSABLE, "failed_rows: 7.tar: odd, but its name")))
    report.add(
        ShardReport("8", read=3, failed=1, embedded=2, skipped=True, fault=Fault(FaultKind.FAILED_ROWS, "1 row"))
    )
    assert {shard: fault.kind for shard, fault in report.faults.items()} == {"7": "unusable", "8": "failed_rows"}
    assert report.to_dict()["faults"] == {"7": "failed_rows: 7.tar: odd, but its name", "8": "1 row"}
    assert report.shards == {"done": 0, "skipped": 1, "failed": 1, "left": 0} and report.read == 3
    assert "set aside      7: failed_rows: 7.tar" in str(report)


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (SourceError("a.tar", "is no tar", "Restore it"), FaultKind.UNUSABLE, "a.tar: is no tar. Restore it"),
        (UsageError("id_col= is missing"), FaultKind.UNUSABLE, "id_col= is missing"),
        (MissingExtra("gcsfs", "gcs", "Reading gs://"), FaultKind.UNUSABLE, "b.tar: Reading gs:// needs the package"),
        (FailedRows("2 rows failed"), FaultKind.FAILED_ROWS, "2 rows failed"),
        (NothingReadable("not one image"), FaultKind.NOTHING_READABLE, "not one image"),
        (OSError(5, "Input/output error"), FaultKind.UNUSABLE, "b.tar: cannot be read ([Errno 5] Input/output error)"),
        (KeyError("odd"), FaultKind.UNUSABLE, "b.tar: could not be worked on (KeyError: 'odd'). The log has"),
    ],
)
def test_an_exception_becomes_the_fault_of_the_shard_that_it_met(error: Exception, kind: FaultKind, told: str) -> None:
    fault = fault_of(error, "b.tar")
    assert fault.kind is kind and fault.message.startswith(told)
    assert ShardReport("b", fault=fault).held == (kind is FaultKind.NOTHING_READABLE)
