"""`make demo` does what it says: the program that it runs, from the first host to the farewell, and what is left afterwards."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from trimtab_lab import quorum
from trimtab_lab.commands import own_programs
from trimtab_lab.demo import GUESTS
from trimtab_lab.hosts import Lab

pytestmark = [pytest.mark.lab, pytest.mark.soak, pytest.mark.timeout(1500)]


@pytest.fixture
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    name, directory = f"demo-{os.getpid()}", tmp_path_factory.mktemp("demo")
    try:
        yield Lab.named(name, state_directory=directory)
    finally:
        Lab.named(name, state_directory=directory).down()  # as the program that brought it up has recorded it


def test_the_demo_shows_all_that_it_promises_and_leaves_a_fleet_that_works(lab: Lab) -> None:
    at = ["--name", lab.spec.name, "--state-dir", str(lab.spec.state_directory)]
    command = [str(own_programs() / "trimtab-lab"), "demo", *at]
    shown = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1400)
    told = shown.stdout
    assert shown.returncode == 0, told[-4000:] + shown.stderr[-4000:]

    for name in GUESTS:
        explained = told.partition(f"$ trimtab vm explain {name}\n")[2].partition("$ trimtab")[0]
        assert re.search(r"\bnode[123]\b", explained), f"{name} is placed without a reason"
    moves = re.findall(
        r"== (\w+) counted (\d+) before and (\d+) after the move, up for ([\d.]+) s and then ([\d.]+) s: it never restarted", told
    )
    assert [move[0] for move in moves] == ["web1", "db1"], "one on shared storage, one with its disk"
    assert all(int(after) > int(before) and float(later) > float(up) for _, before, after, up, later in moves)
    for verb in ("stop", "start", "delete"):
        assert f"$ trimtab vm {verb} web2 " in told
    restored = re.search(
        r"== db2 counted (\d+) when its increment was taken; as db2-again on (node\d) it went on with (\d+)", told
    )
    assert restored is not None
    assert int(restored[3]) > int(restored[1])

    (home,) = re.findall(r"^\$ trimtab-lab crash (node\d)$", told, re.MULTILINE)
    elsewhere = re.findall(r"^ +(\w+) counts on at (node\d): (\d+) \(it had said (\d+) before the cut\)", told, re.MULTILINE)
    assert "web1" in [name for name, _, _, _ in elsewhere]
    assert all(host != home and int(counter) > 0 for _, host, counter, _ in elsewhere)
    # Its lists, as an operator would see them: the host fenced, and up again in the end.
    standings = re.findall(rf"^{home} +(\w+)", told.partition("$ trimtab-lab crash")[2], re.MULTILINE)
    assert (standings[0], standings[-1]) == ("fenced", "up")
    assert quorum.judge(quorum.writes(lab.spec.quorum_log)) == []

    figures = told.partition("== Three figures from the metrics")[2]
    for name in ("trimtab_hosts", "trimtab_vms", "trimtab_operations_ended_total"):
        assert re.search(rf"^ +{name}\{{[^}}]*\}} [1-9]", figures, re.MULTILINE), figures[:1200]
    exported = dict(re.findall(r"^export (\w+)=(\S+)$", figures, re.MULTILINE))
    listed = subprocess.run(
        [str(own_programs() / "trimtab"), "vm", "list", "-o", "name"],
        env=os.environ | exported, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert {"web1", "web3", "web4", "db1", "db2-again"} <= set(listed.stdout.split()), "what it says to type works"
    assert Path(exported["TRIMTAB_CA"]).exists()
