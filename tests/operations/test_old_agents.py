"""A host whose agent is two releases behind, beside one of today: it is used for what it can do, and for nothing else.

What an agent can do it says in its inventory; versions are never compared. The agent here is today's, which announces what those of
2026-11-23 announced: what is shown is how the controller decides, not how an old program behaves.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.operations import examples_snapshots as snaps
from tests.operations.backup_kit import accept_backup, accept_together, made_backup, ready_repo
from tests.operations.kit import FleetStory
from trimtab_agent.hypervisor.simulation import CAPABILITIES
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import Operation
from trimtab_controller.store import host_reports
from trimtab_protos.errors import TrimtabError

ANNOUNCED_THEN = frozenset(
    {
        "console-log", "copy-disks", "image-iso", "image-qcow2", "image-raw", "migrate", "network-bridge", "network-isolated",
        "network-nat", "pool-dir", "seed-nocloud", "simulated", "volume-linked-clone",
    }
)  # fmt: skip


@pytest.fixture
def story(new_story: Callable[..., FleetStory]) -> FleetStory:
    """`node1` has the old agent, `node2` one of today; both reach the same pools and networks."""
    story = new_story(host_count=2)
    old = story.host_ids[0]
    hypervisor = story.hypervisor(old)
    hypervisor.host = replace(hypervisor.host, lacks=frozenset(CAPABILITIES) - ANNOUNCED_THEN)
    said = hypervisor.inventory()
    assert set(said.capabilities) == ANNOUNCED_THEN
    story.db.write(lambda session: host_reports.store_inventory(session, old, said, now=story.clock.now()))
    return story


def ended(story: FleetStory, operation: Operation) -> Operation:
    story.settle()
    return story.operation(operation.id)


def test_a_plain_vm_lives_on_an_old_agents_host_and_moves_there_and_back(story: FleetStory) -> None:
    old, new = story.host_ids
    vm = story.running_vm(to_host_id=old)
    for target in (new, old):
        name = "node2" if target == new else "node1"
        assert ended(story, story.accept_power(story.vm(vm.id), "migrate", to_host=name)).state is OperationState.DONE
        assert story.running_on(vm.id) == {target}
    for verb in ("reboot", "pause", "resume", "stop", "start"):
        assert ended(story, story.accept_power(story.vm(vm.id), verb)).state is OperationState.DONE, verb
    assert story.running_on(vm.id) <= {old, new}


def test_a_vm_that_needs_what_an_old_agent_cannot_do_goes_to_another_host_or_nowhere(story: FleetStory) -> None:
    old, new = story.host_ids
    assert story.running_vm("vault", is_encrypted=True).host_id == new
    _vm, asked = story.accept_create("vault2", is_encrypted=True, to_host_id=old)
    refused = ended(story, asked)
    assert refused.state is OperationState.FAILED
    assert refused.error is not None
    assert "its agent cannot do volume-luks" in refused.error.message


def test_an_old_agent_takes_no_snapshot_and_no_vm_that_has_one(story: FleetStory) -> None:
    old, new = story.host_ids
    there, here = story.running_vm("there", to_host_id=old), story.running_vm("here", to_host_id=new)
    with pytest.raises(TrimtabError) as refused:
        snaps.accept_snapshot(story, there, "before")
    assert refused.value.code == "not-supported-here"
    assert "upgrade it first" in refused.value.message
    assert ended(story, snaps.accept_snapshot(story, here, "before")).state is OperationState.DONE
    moved = ended(story, story.accept_power(story.vm(here.id), "migrate", to_host="node1"))
    assert moved.state is OperationState.FAILED
    assert moved.error is not None
    assert "its agent cannot do layers" in moved.error.message
    assert story.running_on(here.id) == {new}


def test_an_old_agent_makes_backups_and_none_that_demands_what_it_would_not_look_for(story: FleetStory) -> None:
    old, new = story.host_ids
    ready_repo(story)
    there, here = story.running_vm("there", to_host_id=old), story.running_vm("here", to_host_id=new)
    assert made_backup(story, there).consistency == "filesystem"
    for asked in (
        lambda: accept_backup(story, there, needs_application=True),
        lambda: accept_together(story, [there, here], needs_application=True),
    ):
        with pytest.raises(TrimtabError) as refused:
            asked()
        assert refused.value.code == "agent-too-old"
        assert "node1" in refused.value.message
