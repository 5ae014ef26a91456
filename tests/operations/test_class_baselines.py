"""A vm's machine type and CPU model are those of its host's class from its first placement on: what all of its hosts can run."""

from collections.abc import Callable

import pytest
import sqlalchemy as sa

from tests.operations.kit import FleetStory
from tests.operations.test_vm_groups import APART, group
from trimtab_controller.core.model import Vm
from trimtab_controller.services import hosts_admin
from trimtab_controller.store import hosts, schema

OLDER = {"machines": ("pc-q35-7.1",), "usable_cpu_models": ("qemu64", "Nehalem", "Haswell")}
"""A host that keeps its class from what the others could do: the newest machine type and Cascadelake-Server."""


@pytest.fixture
def story(new_story: Callable[..., FleetStory]) -> FleetStory:
    story = new_story(host_count=2)
    story.add_host("older", **OLDER)
    return story


def made_of(story: FleetStory, vm: Vm) -> tuple[tuple[str, str], tuple[str, str]]:
    """Return (machine type, CPU model) as they are stored, and as the host was told."""
    stored = story.vm(vm.id)
    spec = story.hypervisor(stored.host_id or "").domains[vm.id].spec
    return (stored.machine, stored.cpu_model), (spec.machine, spec.cpu_model)


def fixed(story: FleetStory) -> tuple[str | None, str | None]:
    """Return what is written down of the class."""
    table = schema.host_class
    row = story.db.read(lambda session: session.execute(sa.select(table).where(table.c.name == hosts.DEFAULT_CLASS)).one())
    return row.machine, row.cpu_model


def test_a_vm_is_given_what_every_host_of_its_class_can_run(story: FleetStory) -> None:
    assert fixed(story) == (None, None)
    vm = story.running_vm("web1")
    assert made_of(story, vm) == (("pc-q35-7.1", "Haswell"),) * 2
    assert fixed(story) == ("pc-q35-7.1", "Haswell")
    # Once a vm has it, a class keeps it: the one host that held the others back may go, and one that can less may come.
    gone = schema.host.update().where(schema.host.c.name == "older").values(deleted_at=story.clock.now())
    story.db.write(lambda session: session.execute(gone))
    story.add_host("oldest", machines=("pc-q35-7.1",), usable_cpu_models=("qemu64",))
    assert made_of(story, story.running_vm("web2")) == (("pc-q35-7.1", "Haswell"),) * 2
    assert fixed(story) == ("pc-q35-7.1", "Haswell")


def test_vms_that_are_placed_together_are_given_it_alike(story: FleetStory) -> None:
    accepted = [story.accept_create(f"web{number}")[0] for number in range(4)]
    story.settle()
    assert {made_of(story, vm) for vm in accepted} == {(("pc-q35-7.1", "Haswell"),) * 2}


def test_a_member_of_a_group_is_placed_by_itself_and_given_it_too(story: FleetStory) -> None:
    group(story, "apart", APART)
    assert made_of(story, story.running_vm("web1", group="apart")) == (("pc-q35-7.1", "Haswell"),) * 2
    assert fixed(story) == ("pc-q35-7.1", "Haswell")


def test_what_an_operator_set_for_the_class_or_asked_for_the_vm_comes_first(story: FleetStory) -> None:
    wishes = {"cpu_model": "Nehalem", "machine": "pc-q35-7.1"}
    story.db.write(
        lambda session: hosts_admin.change_class(
            session, hosts.DEFAULT_CLASS, wishes, expected_version=None, actor=story.actor, now=story.clock.now()
        )
    )
    assert made_of(story, story.running_vm("web1")) == (("pc-q35-7.1", "Nehalem"),) * 2
    assert made_of(story, story.running_vm("web2", cpu_model="Haswell")) == (("pc-q35-7.1", "Haswell"),) * 2
    assert fixed(story) == ("pc-q35-7.1", "Nehalem")
