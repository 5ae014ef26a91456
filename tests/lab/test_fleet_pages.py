"""A real guest on huge pages and on a cpu of its own: the kernel's own books say so, and nothing is given away twice."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.fleet_kit import Fleet, wait_until

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

HOST, PAGE_KIB, KEPT, GUEST_PAGES = "node3", 2048, 64, 48
COUNT = Path("/proc/sys/vm/nr_hugepages")


def pages_free() -> int:
    return next(
        int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("HugePages_Free")
    )


def pages_on(fleet: Fleet, host: str) -> dict[str, int]:
    return dict(fleet.host(host)["inventory"]["numa_cells"][0]["huge_pages"])


def restart(fleet: Fleet) -> None:
    """Let libvirt and the agent see which pages there are; guests stay."""
    fleet.sh(HOST, "systemctl restart libvirtd trimtab-agent")
    fleet.wait_for_host(HOST)


@pytest.fixture
def paged(fleet: Fleet) -> Iterator[None]:
    """Pages kept for guests on one host, and one of its cpus."""
    before = COUNT.read_text()
    COUNT.write_text(str(KEPT))
    assert int(COUNT.read_text()) == KEPT, "the kernel found the memory"
    fleet.sh(HOST, "mkdir -p /dev/hugepages && mount -t hugetlbfs none /dev/hugepages")
    restart(fleet)
    fleet.ok("host", "update", HOST, "--dedicated-cpus", "1")
    wait_until(lambda: pages_on(fleet, HOST) == {str(PAGE_KIB): KEPT}, "the host to tell of its pages")
    yield
    fleet.ok("host", "update", HOST, "--dedicated-cpus", "none")
    fleet.sh(HOST, "umount /dev/hugepages")
    COUNT.write_text(before)
    restart(fleet)


def test_huge_pages_and_a_cpu_of_its_own_are_really_the_guests(fleet: Fleet, paged: None) -> None:
    ask = ("--image", "micro", "--memory", f"{GUEST_PAGES * PAGE_KIB // 1024}MiB", "--pool", "shared", "--hugepages", "2MiB")
    fleet.ok("vm", "create", "paged1", *ask, "--dedicated", "--wait")
    vm = fleet.vm("paged1")
    assert vm["host"] == HOST, "no other host keeps pages"
    assert vm["wishes"] == {"dedicated": True, "hugepages_kib": PAGE_KIB}
    fleet.wait_for_ticks("paged1", 1)
    assert pages_free() == KEPT - GUEST_PAGES
    process = fleet.sh(HOST, f"cat /run/libvirt/qemu/trimtab-{vm['id']}.pid").strip()
    assert set(fleet.sh(HOST, f"sed -n 's/Cpus_allowed_list:.//p' /proc/{process}/task/*/status").split()) == {"1"}

    refused = fleet.trimtab("vm", "create", "paged2", *ask, "--wait")
    assert refused.code == 7
    assert (
        f"{HOST}: needs {GUEST_PAGES} pages of 2048 KiB in one NUMA cell; the most that one has free is 16 pages" in refused.err
    )
    refused = fleet.trimtab(
        "vm", "create", "paged3", "--image", "micro", "--memory", "96MiB", "--pool", "shared", "--dedicated", "--wait"
    )
    assert refused.code == 7
    assert f"{HOST}: needs 1 cpus for pinning" in refused.err
    assert fleet.trimtab("vm", "migrate", "paged1", "--wait").code == 7, "nowhere else are there pages"

    fleet.ok("vm", "stop", "paged1", "--force", "--wait")
    assert pages_free() == KEPT
    fleet.ok("vm", "create", "paged2", *ask, "--wait")
    fleet.delete("paged1", "paged2")
    assert pages_free() == KEPT
