"""The report of the long tests on real hosts: what failed is told, and nothing that did not run passes for a success."""

from datetime import UTC, datetime
from pathlib import Path

from tests.soak import real_hosts

RESULTS = """<testsuites><testsuite name="pytest">
<testcase classname="tests.lab.test_fleet" name="test_it_counts[two]" time="12.6"/>
<testcase classname="tests.lab.test_fleet" name="test_it_dies" time="3.2"><failure message="assert 1 == 2&#10;more">...</failure></testcase>
<testcase classname="tests.contract.test_hypervisor" name="test_set_up[kvm]" time="0.4"><error message="no lab">...</error></testcase>
<testcase classname="tests.lab.test_snapshots" name="test_left_out" time="0.0"><skipped message="no room"/></testcase>
</testsuite></testsuites>"""
BEGAN = datetime(2026, 11, 27, 20, 0, tzinfo=UTC)


def test_what_failed_and_what_was_skipped_is_told_by_name(tmp_path: Path) -> None:
    results = tmp_path / "results.xml"
    results.write_text(RESULTS)
    tests = real_hosts.played(results)
    assert [(test.file, test.seconds, test.problem) for test in tests] == [
        ("tests/lab/test_fleet.py", 13, ""),
        ("tests/lab/test_fleet.py", 3, "assert 1 == 2\nmore"),
        ("tests/contract/test_hypervisor.py", 0, "no lab"),
        ("tests/lab/test_snapshots.py", 0, "no room"),
    ]
    told = real_hosts.write_report(tests, tmp_path, began=BEGAN, commit="abc1234", seconds=180).read_text()
    assert "Commit `abc1234`, two labs at a time: 4 tests in 3 minutes." in told
    assert "**3 failed:**" in told
    assert "- `tests/lab/test_fleet.py::test_it_dies`: assert 1 == 2\n" in told


def test_only_a_run_without_any_problem_says_that_all_passed(tmp_path: Path) -> None:
    test = real_hosts.Played("tests/lab/test_fleet.py", "test_it_counts", 1, "")
    told = real_hosts.write_report([test], tmp_path, began=BEGAN, commit="abc1234", seconds=60).read_text()
    assert "**All passed.**" in told
    assert "| `test_fleet` it counts | 1 |" in told
    nothing = real_hosts.write_report([], tmp_path, began=BEGAN, commit="abc1234", seconds=60).read_text()
    assert "passed" not in nothing
