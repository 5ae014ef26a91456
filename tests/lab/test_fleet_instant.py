"""A guest that runs on its backup, through the death of all that serves it, at the moments that nothing in the guest could bear."""

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab.fleet_kit import HOSTS, Fleet, wait_until

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

URL = "file:///srv/trimtab-shared/backup-instant"
HOME = HOSTS[1]


@pytest.fixture(scope="module")
def backups(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """By firmware the backup of a guest that boots with it."""
    key_file: Path = tmp_path_factory.mktemp("instant") / "main.key"
    fleet.ok("backup", "repo", "create", "instant", "--url", URL, "--key-file", str(key_file))
    made = {}
    for firmware, memory in (("bios", "96MiB"), ("uefi", "256MiB")):
        name = f"booted-{firmware}"
        fleet.ok(
            "vm", "create", name, "--image", "micro", "--memory", memory, "--pool", "local", "--network", "default",
            "--firmware", firmware, "--wait",
        )  # fmt: skip
        fleet.wait_for_ticks(name, 2)
        made[firmware] = str(fleet.ok("backup", "run", name, "--repo", "instant", "-o", "json").json()["id"])
        fleet.delete(name)
    yield made
    fleet.ok("backup", "repo", "delete", "instant", "--yes")


def has_read(fleet: Fleet, domain: str) -> bool:
    """Tell whether firmware or boot loader have read anything yet."""
    told = fleet.sh(HOME, f"virsh domblkstat {domain} vda 2>/dev/null", check=False)
    return any(int(count) > 0 for count in re.findall(r"rd_req (\d+)", told))


def is_filled(fleet: Fleet, domain: str) -> bool:
    """Tell whether QEMU copies into the disk under the guest now: its reads go through QEMU's copy-on-read filter then."""
    command = '{"execute": "query-block-jobs"}'
    return "fill-vol-" in fleet.sh(HOME, f"virsh qemu-monitor-command {domain} '{command}' 2>/dev/null", check=False)


@pytest.mark.parametrize(
    ("firmware", "moment"),
    [
        ("bios", has_read),
        pytest.param("bios", is_filled, marks=pytest.mark.soak),
        pytest.param("uefi", has_read, marks=pytest.mark.soak),
    ],
)
def test_a_guest_in_its_boot_loader_counts_though_agent_and_export_die_at_once(
    fleet: Fleet, backups: dict[str, str], firmware: str, moment: Callable[[Fleet, str], bool]
) -> None:
    begun = fleet.begin(
        "backup",
        "restore",
        backups[firmware],
        "--as",
        "early",
        "--to",
        HOME,
        "--pool",
        "local=shared",
        "--instant",
        "--bandwidth",
        "1",
    )
    vm = fleet.vm("early")
    domain = f"trimtab-{vm['id']}"
    wait_until(lambda: moment(fleet, domain), "the guest to have read")
    fleet.sh(HOME, "pkill -KILL -f '[b]ackup.export.process'")
    fleet.lab.signal_service(HOME, "trimtab-agent", signal.SIGKILL)

    fleet.wait_for_ticks("early", 3)

    assert fleet.end_of(begun)["state"] == "done"
    fills = fleet.ok("op", "list", "--filter", "kind=vm.fill", "-o", "json").json()
    [fill] = [one for one in fills if one["subject"]["id"] == vm["id"]]
    assert fleet.end_of(fill["id"])["state"] == "done"
    fleet.wait_for_ticks("early", fleet.ticks("early")[0] + 2)
    assert fleet.vm("early")["problem"] == ""
    fleet.delete("early")
