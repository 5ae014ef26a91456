"""What a guest is told that is a copy of another: its documents for cloud-init, parsed as cloud-init parses them."""

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.operations.backup_kit import accept_restore, made_backup, ready_repo
from tests.operations.examples_snapshots import accept_clone, accept_template, accept_vms
from tests.operations.kit import FleetStory
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import Operation, Vm
from trimtab_controller.services import networks as network_service
from trimtab_controller.services.seeds import SeedWish
from trimtab_controller.services.vm_nics import NicWish
from trimtab_controller.store import vms

USER_DATA = """#cloud-config
hostname: db
fqdn: db.example.org
preserve_hostname: true
packages: [postgresql]
bootcmd:
- [sh, -c, echo early]
ssh_authorized_keys: [ssh-ed25519 AAAA ann]
"""
NEW_MACHINE_ID = [
    "cloud-init-per",
    "instance",
    "trimtab-machine-id",
    "sh",
    "-c",
    "rm -f /etc/machine-id /var/lib/dbus/machine-id && systemd-machine-id-setup",
]


@pytest.fixture
def story(matrix_story: FleetStory) -> FleetStory:
    return matrix_story


def source(story: FleetStory, user_data: str = USER_DATA) -> Vm:
    seed = SeedWish(hostname="db", user_data=user_data, ssh_keys=("ssh-ed25519 BBBB bob",))
    return story.running_vm("db", seed=seed, networks=(NicWish(network=story.network.id, ip="10.9.0.7/24"),))


def ended(story: FleetStory, operation: Operation) -> Operation:
    story.settle()
    found = story.operation(operation.id)
    assert found.state is OperationState.DONE, found.error
    return found


def as_clone(story: FleetStory, vm: Vm, name: str) -> None:
    ended(story, accept_clone(story, vm, name, is_linked=True))


def as_restored(story: FleetStory, vm: Vm, name: str) -> None:
    ready_repo(story)
    ended(story, accept_restore(story, made_backup(story, vm), name))


def as_one_of_a_template(story: FleetStory, vm: Vm, name: str) -> None:
    ended(story, accept_template(story, vm, "template"))
    ended(story, accept_vms(story, "template", name.replace("2", "{n}"), 2))


WAYS: dict[str, Callable[[FleetStory, Vm, str], None]] = {
    "vm clone": as_clone,
    "backup restore --as": as_restored,
    "vm create --template": as_one_of_a_template,
}


def copied(story: FleetStory, vm: Vm, way: str, name: str = "db2") -> Vm:
    WAYS[way](story, vm, name)
    found = story.db.read(lambda session: vms.find(session, story.project.id, name))
    assert found is not None
    return found


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_is_told_another_instance_name_machine_id_and_to_make_host_keys_anew(story: FleetStory, way: str) -> None:
    vm = source(story)
    own = yaml.safe_load(vm.seed["meta_yaml"])
    copy = copied(story, vm, way)
    meta = yaml.safe_load(copy.seed["meta_yaml"])
    assert meta == {"instance-id": copy.id, "local-hostname": "db2", "public-keys": ["ssh-ed25519 BBBB bob"]}
    assert (own["instance-id"], own["local-hostname"]) == (vm.id, "db")
    assert copy.seed["user_yaml"].startswith("#cloud-config\n")
    user = yaml.safe_load(copy.seed["user_yaml"])
    # Without a domain where no name was known when it was written: what the seed itself says counts then.
    fqdn = {} if way == "vm create --template" else {"fqdn": "db2.example.org"}
    assert user == {
        "packages": ["postgresql"],
        "bootcmd": [NEW_MACHINE_ID, ["sh", "-c", "echo early"]],
        "ssh_authorized_keys": ["ssh-ed25519 AAAA ann"],
        "ssh_deletekeys": True,
        **fqdn,
    }
    assert story.vm(vm.id).seed == vm.seed, "its source is told what it was told"


def cards(story: FleetStory, vm: Vm) -> dict[str, dict[str, Any]]:
    """Return what its seed says of each of its cards, by their MACs; none of another vm's."""
    told = (yaml.safe_load(vm.seed["network_yaml"] or "{}") or {}).get("ethernets", {})
    found = {one["match"]["macaddress"]: {key: value for key, value in one.items() if key != "match"} for one in told.values()}
    assert found.keys() <= {nic.mac for nic in story.db.read(lambda session: vms.nics_of(session, [vm.id])[vm.id])}
    return found


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_beside_its_source_does_not_take_its_address(story: FleetStory, way: str) -> None:
    vm = source(story)
    assert list(cards(story, vm).values()) == [{"addresses": ["10.9.0.7/24"]}]
    copy = copied(story, vm, way)
    assert "10.9.0.7" not in copy.seed["network_yaml"]
    assert list(cards(story, copy).values()) == ([] if way == "vm create --template" else [{"dhcp4": True}])


def lan(story: FleetStory) -> None:
    """Have network `lan`, whose router and DNS server are known."""
    spec = network_service.NetworkSpec(
        name="lan", kind="bridge", bridge="br0", bridges={}, subnet="192.0.2.0/24", gateway="192.0.2.1", dns=("192.0.2.53",)
    )
    story.db.write(
        lambda session: network_service.create(session, spec, project=story.project, actor=story.actor, now=story.clock.now())
    )
    story.settle()


@pytest.mark.parametrize("way", ["vm clone", "backup restore --as"])
def test_a_copy_is_told_the_way_out_of_its_lan_with_the_address_that_it_is_given(story: FleetStory, way: str) -> None:
    lan(story)
    vm = story.running_vm("db", networks=(NicWish(network="lan"),))
    copy = copied(story, vm, way)
    lans = {"routes": [{"to": "0.0.0.0/0", "via": "192.0.2.1"}], "nameservers": {"addresses": ["192.0.2.53"]}}
    assert list(cards(story, vm).values()) == [{"addresses": ["192.0.2.2/24"], **lans}]
    assert list(cards(story, copy).values()) == [{"addresses": ["192.0.2.3/24"], **lans}]


OWN_NETWORKS = [
    "version: 1\nconfig:\n- {type: physical, name: eth0, subnets: [{type: dhcp}]}\n",
    "network: {version: 2, ethernets: {nic0: {dhcp4: true}}}\n",
    "version: 2\nethernets: {all: {match: {name: '*'}, dhcp4: true}}\n",
    "network: {config: disabled}\n",
]


@pytest.mark.parametrize("own", OWN_NETWORKS, ids=["version 1", "wrapped", "other names", "disabled"])
def test_what_the_user_said_of_the_network_is_told_to_a_restored_copy_as_it_was(story: FleetStory, own: str) -> None:
    lan(story)
    ready_repo(story)
    vm = story.running_vm("db", seed=SeedWish(network_config=own), networks=(NicWish(network="lan"),))
    restored = ended(story, accept_restore(story, made_backup(story, vm), "db2"))
    assert [story.vm(one).seed["network_yaml"] for one in (vm.id, restored.subject_id)] == [own, own]


def test_a_vm_that_is_restored_in_the_place_of_one_that_is_gone_keeps_its_address(story: FleetStory) -> None:
    ready_repo(story)
    vm = source(story)
    backup = made_backup(story, vm)
    ended(story, story.accept_power(story.vm(vm.id), "delete"))
    restored = ended(story, accept_restore(story, backup, "db2"))
    assert list(cards(story, story.vm(restored.subject_id)).values()) == [{"addresses": ["10.9.0.7/24"]}]


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_of_a_copy_draws_its_machine_id_once(story: FleetStory, way: str) -> None:
    first = copied(story, source(story), "vm clone", "middle")
    again = copied(story, first, way)
    commands = yaml.safe_load(again.seed["user_yaml"])["bootcmd"]
    assert commands == [NEW_MACHINE_ID, ["sh", "-c", "echo early"]]


@pytest.mark.parametrize("way", WAYS)
def test_a_script_is_told_to_a_copy_as_it_was_written(story: FleetStory, way: str) -> None:
    script = "#!/bin/sh\necho hello > /dev/ttyS0\n"
    copy = copied(story, source(story, script), way)
    assert copy.seed["user_yaml"] == script
    assert yaml.safe_load(copy.seed["meta_yaml"])["instance-id"] == copy.id


@pytest.mark.parametrize("way", ["vm clone", "backup restore --as"])
def test_a_vm_that_is_told_nothing_has_a_copy_that_is_told_what_it_can_be(story: FleetStory, way: str) -> None:
    copy = copied(story, story.running_vm("plain"), way)
    if way == "backup restore --as":
        assert copy.seed == {}
    else:
        assert yaml.safe_load(copy.seed["meta_yaml"])["instance-id"] == copy.id
