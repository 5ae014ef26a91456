"""The lines that an operator is shown for their own networks, storage, systems and guests, each as it is written, against the real API.

None of them may be refused as usage or as a request that is wrong: what the fleet of this test cannot do is refused by its name.
"""

import asyncio
import json
import shlex
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.api.kit import GIB
from tests.api.test_vm_adoption import LEGACY
from tests.unit.cli.conftest import Trimtab
from tests.unit.cli.test_against_the_api import START_TIMEOUT_S, Served, served
from trimtab_controller import osinfo
from trimtab_controller.store import host_reports, schema
from trimtab_protos.adoption_messages import Described

__all__ = ["served"]

SHOWN = """
host check --all                     # each pair: ports, TLS, MTU by do-not-fragment ping, rate, clock
pool create fast --type lvm-thin --vg vg0 ; pool create share --type nfs --server nas --path /vms ; pool list
network create lan --bridge br0 --vlan 20 --mtu 9000 ; network create lab1 --isolated --subnet 10.30.0.0/24 --dhcp
image import debian ./debian-12.iso --kind iso ; vm create win1 --iso win11 --os windows --disk 60GiB --tpm --secure-boot
vm console win1 --vnc ; vm ssh web1
vm resize web1 --vcpus 4 --memory 2GiB ; vm resize web1 --vcpus 4 --memory 2GiB --live
volume resize web1-root 40GiB ; vm attach web1 --volume data1 --network lan
vm adopt node1/legacy-db --dry-run ; vm adopt node1/legacy-db ; vm release web1 ; vm diff web1
vm reconcile web1 --accept ; vm reconcile web1 --revert
volume move web1-root --to fast ; pool drain old --plan
secgroup create web --allow tcp/443 --allow tcp/22@10.0.0.0/8 ; vm update web1 --secgroup web
doctor                               # one screen
"""
LINES = [part.strip() for line in SHOWN.strip().splitlines() for part in line.partition("#")[0].split(";")]

# What the fleet of this test has no answer to: its guests do not really run, and nobody drives operations.
REFUSED = {
    "vm console win1 --vnc": "vm-not-running",
    "vm ssh web1": "address-unknown",
    "vm reconcile web1 --accept": "cannot-be-accepted",
    "volume move web1-root --to fast": "pool-without-files",
    "doctor": "not-healthy",
}
# Neither waits for an operation, or has no document to print.
PRINTS = ("vm console", "pool list", "vm ssh", "vm diff", "pool drain", "secgroup create", "doctor")


class Fleet:
    """The API's small fleet, of which this test says what hosts would have observed."""

    def __init__(self, served: Served) -> None:
        assert served.api is not None
        self.api, self._loop = served.api, served.loop

    def write(self, *statements: Any) -> None:
        for statement in statements:
            self.run(self.api.write(lambda session, statement=statement: session.execute(statement)))  # type: ignore[misc]

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(START_TIMEOUT_S)

    def observe(self) -> None:
        """Let every operation be done: volumes and images are there, `web1` runs on node1, which reaches every network."""
        node1 = self.api.ids["node1"]
        self.run(self.api.end_operations())
        self.run(self.api.write(lambda session: host_reports.map_everything(session, node1)))
        self.write(
            schema.volume.update().values(observed_state="present", host_id=node1),
            schema.image.update().values(state="ready", virtual_size_bytes=GIB, file_size_bytes=GIB // 4),
            schema.vm.update().where(schema.vm.c.name == "web1").values(observed_state="running", host_id=node1),
            schema.network_host.update().where(schema.network_host.c.host_id == node1).values(state="ready"),
        )


@pytest.fixture
def fleet(served: Served, trimtab: Trimtab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    """A running vm `web1`, a volume `data1`, an ISO `win11`, a pool `old`, a domain of somebody else's, and a file to import."""
    monkeypatch.chdir(tmp_path)
    Path("debian-12.iso").write_bytes(bytes(32768) + b"\x01CD001\x01" + bytes(4096))
    fleet = Fleet(served)
    disks = tuple(replace(disk, path=disk.path.replace("/srv/trimtab", "/var/lib/trimtab/local")) for disk in LEGACY.disks)
    legacy = replace(LEGACY, disks=disks, nics=())
    fleet.api.consoles.domains["legacy-db"] = Described(legacy, legacy)
    fleet.write(
        schema.pool.update().values(settings={"is_default": True}), schema.image.update().values(name=schema.image.c.name + "-11")
    )
    for line in (
        "vm create web1 --image debian-11 --memory 1GiB --vcpus-max 4 --memory-max 2GiB --no-wait",
        "volume create data1 --size 1GiB --no-wait",
        "pool create old --path /srv/old --no-wait",
        "image import win11 ./debian-12.iso --kind iso --no-wait",
    ):
        made = trimtab(*line.split())
        assert made.code == 0, (line, made.err)
    fleet.observe()
    vm_id = json.loads(trimtab("vm", "get", "web1", "-o", "json").out)["id"]
    fleet.api.consoles.domains[vm_id] = Described(legacy, legacy)
    return fleet


def code_of(err: str) -> str:
    """Return the code of a refusal, as JSON or as a person reads it."""
    return str(json.loads(err)["code"]) if err.startswith("{") else err.partition("code: ")[2].split()[0]


def test_each_line_is_understood_as_it_is_shown(fleet: Fleet, trimtab: Trimtab) -> None:
    refused: dict[str, str] = {}
    for line in LINES:
        waits = [] if line.startswith(PRINTS) else ["--no-wait"]
        found = trimtab(*shlex.split(line), *waits, *([] if line.startswith("vm console") else ["-o", "json"]))
        if found.code != 0:
            refused[line] = code_of(found.err)
        fleet.observe()
    assert refused == REFUSED


def test_a_system_that_is_named_brings_its_memory(fleet: Fleet, trimtab: Trimtab) -> None:
    line = "vm create {} --iso win11 --disk 60GiB --no-wait"
    for name, more, memory_mib in (
        ("win1", "--os windows", 4096),
        ("win2", "--os windows --memory 6GiB", 6144),
        ("lin1", "--os debian11", osinfo.find("debian11").memory_mib),
    ):
        made = trimtab(*line.format(name).split(), *more.split())
        assert made.code == 0, made.err
        assert json.loads(trimtab("vm", "get", name, "-o", "json").out)["shape"]["memory_mib"] == memory_mib
    unnamed = trimtab(*line.format("other").split())
    assert (unnamed.code, "--memory" in unnamed.err, "--os" in unnamed.err) == (2, True, True)
