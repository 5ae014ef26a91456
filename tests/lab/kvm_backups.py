"""Backups of guests on a lab's host, made there by `backup_in_host.py`, which says what it did."""

import json
import subprocess
import sys
from pathlib import Path

from tests.contract.kvm_fixture import KvmHost
from trimtab_lab.hosts import Lab

PROGRAM = Path(__file__).with_name("backup_in_host.py")
Told = dict[str, object]


def command(lab: Lab, host: str, *arguments: str) -> list[str]:
    return lab.command(host, [sys.executable, str(PROGRAM), *arguments])


def told_by(lab: Lab, host: KvmHost, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(lab, host.name, *arguments),
        capture_output=True,
        text=True,
        timeout=120,
        env=lab.environment(host.name),
        check=False,
    )


def run(lab: Lab, host: KvmHost, *arguments: str) -> Told:
    finished = told_by(lab, host, *arguments)
    assert finished.returncode == 0, finished.stderr[-3000:]
    told: Told = json.loads(finished.stdout.splitlines()[-1])
    return told
