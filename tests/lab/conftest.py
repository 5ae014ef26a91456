"""One fleet for all tests that need a whole one: three real libvirt hosts and the control plane."""

import os
from collections.abc import Iterator

import pytest

from tests.lab.fleet_kit import Fleet, fleet_settings, wait_until
from trimtab_lab.controlplane import ControlPlane
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
