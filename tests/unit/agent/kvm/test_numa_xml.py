"""Huge pages, NUMA cells and dedicated cpus in a definition, and what becomes of them on the target of a migration."""

from typing import Any
from xml.etree import ElementTree

import pytest

from tests.unit.agent.kvm import factories as make
from trimtab_agent.hypervisor.base import Stamp
from trimtab_agent.hypervisor.kvm.domain_xml import HostTraits, build
from trimtab_agent.hypervisor.kvm.migration_xml import retarget
from trimtab_protos.errors import InvalidRequest

HOST = HostTraits(accelerator="kvm", console_log="/var/log/libvirt/qemu/x.log", console_socket="/run/trimtab/console-x.sock")
STAMP = Stamp(epoch=1, turn=1)
PINNED: dict[str, Any] = {"memory_mib": 1024, "memory_max_mib": 1024, "page_kib": 2048, "numa_cells": (1, 0), "cpuset": "4-7,12"}


def placed(xml: str) -> tuple[str | None, dict[str, str], str | None]:
    root = ElementTree.fromstring(xml)
    vcpu, page, memory = root.find("vcpu"), root.find("memoryBacking/hugepages/page"), root.find("numatune/memory")
    assert vcpu is not None
    return vcpu.get("cpuset"), {} if page is None else page.attrib, None if memory is None else memory.get("nodeset")


def test_a_guest_gets_its_pages_from_its_cells_and_runs_on_its_cpus() -> None:
    xml = build(make.domain(**PINNED), STAMP, HOST)
    assert placed(xml) == ("4-7,12", {"size": "2048", "unit": "KiB"}, "0,1")
    memory = ElementTree.fromstring(xml).find("numatune/memory")
    assert memory is not None
    assert memory.get("mode") == "strict", "pages of other cells are other guests'"


def test_a_guest_that_asks_for_none_of_it_has_none_of_it() -> None:
    assert placed(build(make.domain(), STAMP, HOST)) == (None, {}, None)


def test_on_the_target_of_a_migration_the_cells_and_cpus_are_those_claimed_there() -> None:
    live = build(make.domain(**PINNED), STAMP, HOST)
    target = make.domain(**PINNED | {"numa_cells": (3,), "cpuset": "40-44"})
    moved = retarget(live, target, Stamp(epoch=2, turn=2))
    assert placed(moved) == ("40-44", {"size": "2048", "unit": "KiB"}, "3")
    assert len(ElementTree.fromstring(moved).findall("numatune")) == 1


def test_a_guest_is_given_the_devices_that_are_named() -> None:
    root = ElementTree.fromstring(build(make.domain(host_devices=("0000:41:00.0", "0001:02:1f.7")), STAMP, HOST))
    found = root.findall("devices/hostdev")
    assert [device.get("managed") for device in found] == ["yes", "yes"]
    place = found[1].find("source/address")
    assert place is not None
    assert place.attrib == {"domain": "0x0001", "bus": "0x02", "slot": "0x1f", "function": "0x7"}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"host_devices": ("41:00.0",)}, "host_devices"),
        ({"host_devices": ("0000:41:00.0", "0000:41:00.0")}, "host_devices"),
        ({"cpuset": "4-7;rm"}, "cpuset"),
        ({"cpuset": "4 7"}, "cpuset"),
        ({"numa_cells": (-1,)}, "numa_cells"),
        ({"page_kib": 1 << 20, "memory_mib": 1500, "memory_max_mib": 1500}, "page_kib"),
    ],
)
def test_what_libvirt_could_not_be_told_is_refused_by_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        build(make.domain(**changes), STAMP, HOST)
    assert refused.value.context["field"] == field
