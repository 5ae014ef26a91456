"""What the guest of a boot test has to show, and what becomes of one that does not show it."""

import dataclasses
from typing import Any

import pytest

from tests.operations.backup_kit import made_backup, ready_repo
from tests.operations.invariants import audit_invariants
from tests.operations.kit import FleetStory
from trimtab_agent.hypervisor.simulation import Fault, FaultKind
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import Backup, Nic, Operation, Vm
from trimtab_controller.loops.backups import BackupLoop
from trimtab_controller.services import backup_policies, backup_restore
from trimtab_controller.services.backup_policies import PolicySpec
from trimtab_controller.store import backups, describe, operations, vms
from trimtab_protos.errors import Conflict, InvalidRequest
from trimtab_protos.messages import NetworkKind


def nics_of(story: FleetStory, vm: Vm) -> tuple[Nic, ...]:
    return story.db.read(lambda session: vms.nics_of(session, [vm.id])[vm.id])


def boot_for_port(story: FleetStory, backup: Backup, port: int) -> Operation:
    return story.db.write(
        lambda session: backup_restore.boot_test(
            session,
            backup,
            project=story.project,
            pattern="",
            tcp_port=port,
            timeout_s=4,
            actor=story.actor,
            now=story.clock.now(),
        )
    )


def test_a_backup_that_boots_and_answers_at_its_port_is_proven_on_no_network(story: FleetStory) -> None:
    ready_repo(story)
    vm = story.running_vm("db")
    own = nics_of(story, vm)
    backup = made_backup(story, vm)
    operation = boot_for_port(story, backup, 22)
    spec = story.db.read(
        lambda session: describe.domain_spec(session, describe.read_vm(session, operation.subject_id), story.host_ids[0])
    )
    assert [(nic.mac, nic.addresses) for nic in spec.nics] == [(nic.mac, nic.addresses) for nic in own]
    assert {network.kind for network in spec.networks} == {NetworkKind.WIRE}
    story.settle()
    assert story.operation(operation.id).state is OperationState.DONE
    shown = story.db.read(lambda session: backups.get(session, backup.id))
    assert (shown.level, shown.booted_at is not None, shown.problem) == (3, True, "")
    assert story.vm(operation.subject_id).deleted_at is not None
    assert [nic.mac for nic in nics_of(story, vm)] == [nic.mac for nic in own], "the vm itself keeps its cards"
    assert audit_invariants(story) == []


def test_a_port_that_refuses_is_why_a_backup_is_not_shown_as_booted(story: FleetStory) -> None:
    ready_repo(story)
    backup = made_backup(story, story.running_vm("db"))
    operation = boot_for_port(story, backup, 5432)
    story.settle()
    assert story.operation(operation.id).state is OperationState.DONE
    shown = story.db.read(lambda session: backups.get(session, backup.id))
    assert (shown.level, shown.booted_at) == (2, None)
    assert "did not show an answer at TCP port 5432 within 4 s" in shown.problem
    assert "refuses connections to TCP port 5432" in shown.problem


def test_a_port_of_a_vm_without_a_card_is_refused_by_name(story: FleetStory) -> None:
    ready_repo(story)
    backup = made_backup(story, story.running_vm("db"))
    settings = {**backup.manifest["settings"], "nics": []}
    bare = dataclasses.replace(backup, manifest={**backup.manifest, "settings": settings})
    with pytest.raises(Conflict) as refused:
        boot_for_port(story, bare, 22)
    assert (refused.value.code, refused.value.context["field"]) == ("no-card-to-answer", "boot_tcp")
    assert f"trimtab backup verify {backup.id} --boot --boot-pattern REGEX" in refused.value.message


def make_policy(story: FleetStory, **wishes: Any) -> None:
    spec = PolicySpec(name="proven", schedule="0 2 * * *", repo="main", **wishes)
    story.db.write(lambda session: backup_policies.create(session, spec, project=story.project, now=story.clock.now()))


def a_night_of(story: FleetStory, vm: Vm) -> Backup:
    """Let the vm's policy back it up, read the backup back and boot it; return the backup."""
    story.db.write(
        lambda session: vms.update(session, vm.id, **backup_policies.values_for(session, vm, "proven", now=story.clock.now()))
    )
    loop = BackupLoop(db=story.db, clock=story.clock, nudger=story.nudger)
    story.clock.advance(86400)
    for job in (loop.ask, loop.verify, loop.verify):  # made, read back, booted
        job(story.term)
        story.settle()
    [made] = story.db.read(lambda session: backups.of_vms(session, [vm.id]))[vm.id]
    return made


def test_a_policy_says_which_port_its_boot_tests_wait_for(story: FleetStory) -> None:
    ready_repo(story)
    make_policy(story, verify="boot", verify_tcp=22)
    made = a_night_of(story, story.running_vm("db"))
    assert (made.level, made.problem) == (3, "")
    [test] = story.db.read(lambda session: operations.page(session, limit=5, kind="backup.boot"))
    assert test.params["tcp_port"] == 22


def test_a_boot_test_that_cannot_begin_is_told_at_the_backup(story: FleetStory) -> None:
    ready_repo(story)
    make_policy(story, verify="boot", verify_tcp=22)
    made = a_night_of(story, story.running_vm("db", networks=()))
    assert (made.state, made.level) == ("ready", 1)
    assert made.problem.startswith("boot test not begun: boot_tcp: vm db had no network card")


def test_a_boot_test_that_lost_its_host_is_told_and_asked_for_again(story: FleetStory) -> None:
    ready_repo(story)
    make_policy(story, verify="boot", verify_tcp=22)
    vm = story.running_vm("db")
    lost = Conflict("host-lost", "its host lost power")
    story.fleet.plan_fault("open_wire", Fault(FaultKind.FAIL_BEFORE, error=lost))
    made = a_night_of(story, vm)
    assert (made.level, made.problem) == (1, "boot test came to nothing: its host lost power")
    [test] = story.db.read(lambda session: operations.page(session, limit=5, kind="backup.boot"))
    assert test.state is OperationState.FAILED
    assert story.running_on(test.subject_id) == frozenset(), "nothing of it is left"
    assert audit_invariants(story) == []

    loop = BackupLoop(db=story.db, clock=story.clock, nudger=story.nudger)
    loop.verify(story.term)
    story.settle()
    again = story.db.read(lambda session: backups.get(session, made.id))
    assert (again.level, again.problem) == (3, "")


@pytest.mark.parametrize(
    ("wishes", "field", "code"),
    [
        ({"verify": "read", "verify_tcp": 22}, "verify_tcp", "proof-without-boot"),
        ({"verify_pattern": "login:"}, "verify_pattern", "proof-without-boot"),
        ({"verify": "boot", "verify_pattern": "("}, "verify_pattern", "pattern-malformed"),
    ],
)
def test_a_policy_that_cannot_be_kept_is_refused_by_field(
    story: FleetStory, wishes: dict[str, Any], field: str, code: str
) -> None:
    ready_repo(story)
    with pytest.raises(InvalidRequest) as refused:
        make_policy(story, **wishes)
    assert (refused.value.code, refused.value.context["field"]) == (code, field)
