"""One fleet for all tests that need a whole one: three real libvirt hosts and the control plane."""

import contextlib
import os
import subprocess
from collections.abc import Generator, Iterator

import pytest

from tests.lab.fleet_kit import HOSTS, Fleet, fleet_settings, wait_until
from trimtab_lab.controlplane import ControlPlane
from trimtab_lab.errors import LabError
from trimtab_lab.guest import build_guest_image
from trimtab_lab.hosts import Lab


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    lab = Lab.named(f"fleet-{os.getpid()}", state_directory=tmp_path_factory.mktemp("fleet"))
    try:
        lab.up(hosts=3)
        plane = ControlPlane(lab, settings=fleet_settings(lab))
        plane.start()
        plane.join_hosts()
        made = Fleet(lab, plane)
        wait_until(lambda: made.ok("host", "list", "-o", "json").out.count('"up"') >= 3, "three hosts to be up")
        made.ok("pool", "create", "shared", "--path", "/srv/trimtab-shared", "--shared", "--default")
        made.ok("pool", "create", "local", "--path", "/srv/trimtab-local")
        made.ok("network", "create", "default", "--bridge", "br-guest")
        made.ok("image", "import", "micro", str(build_guest_image().qcow2), "--pool", "shared", "--wait")
        yield made
    finally:
        lab.down()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure on the whole fleet says which of its hosts is not up and what its agent said last: later tests may fail for that."""
    report = yield
    fleet = getattr(item, "funcargs", {}).get("fleet")
    if report.failed and report.when != "teardown" and isinstance(fleet, Fleet):
        with contextlib.suppress(OSError, ValueError, LabError, subprocess.SubprocessError):
            report.sections.append(("hosts of the fleet", hosts_as_they_are(fleet)))
    return report


def hosts_as_they_are(fleet: Fleet) -> str:
    told = [fleet.trimtab("host", "list").out]
    for host in HOSTS:
        seen = fleet.trimtab("host", "get", host, "-o", "json")
        if seen.code or seen.json()["connectivity"] != "up":
            told.append(fleet.trimtab("host", "get", host).out)
            told.append(
                fleet.sh(host, "tail -n 12 /var/log/trimtab/trimtab-agent.log; systemctl status trimtab-agent", check=False)
            )
    return "\n".join(told)
