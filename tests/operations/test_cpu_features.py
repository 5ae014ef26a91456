"""A vm with CPU features starts where what it requires is, and a running guest moves only to where all that it was given is."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.operations.kit import FleetStory
from trimtab_controller.core import cpu_features
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import Vm
from trimtab_controller.store import host_reports, schema


@pytest.fixture
def story(new_story: Callable[..., FleetStory]) -> FleetStory:
    """`node1` has vmx and aes, `node2` aes alone."""
    story = new_story(host_count=2)
    able, other = story.host_ids
    has(story, able, "aes", "vmx")
    has(story, other, "aes")
    return story


def has(story: FleetStory, host_id: str, *features: str, is_heard: bool = True, lacks: frozenset[str] = frozenset()) -> None:
    hypervisor = story.hypervisor(host_id)
    hypervisor.host = replace(hypervisor.host, cpu_features=features, lacks=lacks)
    if is_heard:
        said = hypervisor.inventory()
        story.db.write(lambda session: host_reports.store_inventory(session, host_id, said, now=story.clock.now()))


def vm_with(story: FleetStory, *features: str, name: str = "web1") -> Vm:
    """Return a vm with such features, as an adopted one has them, that runs on node1."""
    vm = story.running_vm(name, to_host_id=story.host_ids[0])
    table = schema.vm
    story.db.write(lambda session: session.execute(table.update().where(table.c.id == vm.id).values(cpu_features=list(features))))
    return story.vm(vm.id)


def did(story: FleetStory, vm: Vm, verb: str, **wishes: str) -> str:
    """Return what refused it; '': nothing."""
    operation = story.accept_power(story.vm(vm.id), verb, **wishes)
    story.settle()
    ended = story.operation(operation.id)
    assert (ended.state is OperationState.DONE) == (ended.error is None)
    return f"{ended.error.code}: {ended.error.message}" if ended.error else ""


@pytest.mark.parametrize("features", [("-vmx",), ("aes", "-vmx"), ("?sha-ni",), ("-svm", "?sha-ni")])
def test_what_is_disabled_or_optional_keeps_a_vm_from_no_host(story: FleetStory, features: tuple[str, ...]) -> None:
    vm = vm_with(story, *features)
    for target in ("node2", "node1"):
        assert did(story, vm, "migrate", to_host=target) == ""
    assert (did(story, vm, "stop"), did(story, vm, "start")) == ("", "")


def test_a_running_guest_moves_only_where_the_optional_features_are_that_it_was_given(story: FleetStory) -> None:
    able, other = story.host_ids
    vm = vm_with(story, "?vmx")
    refusal = did(story, vm, "migrate", to_host="node2")
    assert refusal.startswith("no-host-fits")
    assert "it lacks CPU features vmx" in refusal
    # The host has lost it since it was heard: the two are asked before anything moves.
    has(story, other, "aes", "vmx")
    has(story, other, "aes", is_heard=False)
    refusal = did(story, vm, "migrate", to_host="node2")
    assert refusal.startswith("migration-refused")
    assert "lacks CPU features vmx" in refusal
    assert story.running_on(vm.id) == {able}
    # Stopped it was given nothing, and starts on either.
    has(story, able, "aes")
    assert (did(story, vm, "stop"), did(story, vm, "start"), did(story, vm, "migrate", to_host="node2")) == ("", "", "")


def test_a_vm_with_an_optional_feature_goes_to_no_agent_that_cannot_define_one(story: FleetStory) -> None:
    vm = vm_with(story, "?sha-ni")
    has(story, story.host_ids[1], "aes", lacks=frozenset({cpu_features.OPTIONAL}))
    assert f"its agent cannot do {cpu_features.OPTIONAL}" in did(story, vm, "migrate", to_host="node2")
    assert did(story, vm_with(story, "-vmx", name="web2"), "migrate", to_host="node2") == ""
