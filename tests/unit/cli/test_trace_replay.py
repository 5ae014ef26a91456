"""`placement replay --trace`: the figures that it prints, on a trace small enough to count by hand."""

import gzip
import json
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Trimtab
from trimtab_controller.core.placement.replay import Fleet

TRACE = """t_s,op,vm,cpu_millis,memory_mib,batch
0,1,a,2000,1024,x
0,1,b,2000,1024,x
0,1,c,4000,1024,y
10,0,a,2000,1024,x
10,0,b,2000,1024,x
20,0,c,4000,1024,y
"""
KEYS = {
    "placements", "refused", "peak_hosts", "time_avg_hosts", "time_avg_bound", "time_avg_ratio", "peak_ratio", "cpu_s",
    "placements_per_cpu_s", "decision_us_p50", "decision_us_p99",
}  # fmt: skip


@pytest.mark.parametrize("name", ["trace.csv", "trace.csv.gz"])
def test_a_trace_gives_every_figure_plain_or_gzipped(trimtab: Trimtab, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(TRACE.encode()) if name.endswith("gz") else TRACE.encode())
    found = trimtab("placement", "replay", "--trace", str(path), "--host", "4c/8GiB", "-o", "json")
    assert (found.code, found.err) == (0, "")
    report = json.loads(found.out)
    assert report.keys() >= KEYS
    assert (report["placements"], report["refused"], report["peak_hosts"]) == (3, 0, 2)
    assert (report["time_avg_hosts"], report["time_avg_bound"], report["time_avg_ratio"]) == (1.5, 1.5, 1.0)


def test_hosts_that_do_not_suffice_refuse(trimtab: Trimtab, tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    found = trimtab(
        "placement", "replay", "--trace", str(path), "--host", "4c/8GiB", "--hosts", "1", "--policy", "spread", "-o", "json"
    )
    report = json.loads(found.out)
    assert (report["placements"], report["refused"], report["peak_hosts"]) == (2, 1, 1)


def test_the_fleet_of_a_replay_is_placed_on_and_left_by_name() -> None:
    fleet = Fleet(2, 4000, 8192, "pack")
    assert [fleet.place(vm, 2000, 1024, "x", 0.0) for vm in "abcde"] == [0, 0, 1, 1, None]
    fleet.remove("a", 1.0)
    assert fleet.place("e", 2000, 1024, "x", 2.0) == 0
