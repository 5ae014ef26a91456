"""Recovery plans: groups come back in their order, on another fleet too, and a test leaves nothing behind."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from tests.operations.backup_kit import (
    accept_recovery,
    accept_repo,
    content_of,
    made_backup,
    ready_repo,
    repo_spec,
    write_to,
)
from tests.operations.emptied import empty
from tests.operations.invariants import audit_invariants
from tests.operations.kit import FleetStory
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import Operation, RecoveryPlan
from trimtab_controller.core.recovery_plans import Awaits, Group, Mode
from trimtab_controller.services import backup_repos as repo_service
from trimtab_controller.services import recovery_plans as service
from trimtab_controller.store import backups, recovery_plans, vms
from trimtab_protos.errors import AlreadyExists, Conflict, NotFound


def plan_of(story: FleetStory, operation: Operation) -> RecoveryPlan:
    return story.db.read(lambda session: recovery_plans.get(session, operation.subject_id))


def outcomes(story: FleetStory, operation: Operation) -> dict[str, str]:
    run = plan_of(story, operation).last_run
    return {one["vm"]: one["outcome"] for group in run["groups"] for one in group["vms"]}


def site(story: FleetStory, *names: str) -> None:
    """Back vms of these names up, each with its name on its disk."""
    ready_repo(story)
    for name in names:
        vm = story.running_vm(name)
        write_to(story, vm.id, 0, name.encode())
        made_backup(story, vm)


def lose(story: FleetStory, *names: str) -> None:
    for name in names:
        vm = story.db.read(lambda session, name=name: vms.find(session, story.project.id, name))
        assert vm is not None
        story.accept_power(vm, "delete", force=True)
    story.settle()


def test_another_fleet_brings_a_site_back_in_order_from_the_repository_and_its_key_alone(
    new_story: Callable[..., FleetStory],
) -> None:
    story = new_story()
    spec = repo_spec(story, "main")
    accept_repo(story, spec)
    story.settle()
    site(story, "db", "web")
    key = story.secrets.open(spec.wrapped_key, place=spec.repo_id)
    empty(story.db)
    other = new_story()
    (other.directory / "secrets.key").unlink(missing_ok=True)
    accept_repo(other, repo_spec(other, "found", url=spec.url, key=key, fleet_id=spec.fleet_id))
    other.settle()
    other.db.write(lambda session: repo_service.rebuild(session, "found", actor=other.actor, now=other.clock.now()))
    other.settle()

    run = accept_recovery(other, [["db"], ["web"]], mode="real", repo="found", delay_s=60)
    other.settle()

    ended = other.operation(run.id)
    assert ended.state is OperationState.DONE, ended.error
    assert ended.result is not None
    assert (ended.result["state"], ended.result["back"], ended.result["missing"]) == ("done", 2, 0)
    assert outcomes(other, run) == {"db": "back", "web": "back"}
    for name in ("db", "web"):
        vm = other.db.read(lambda session, name=name: vms.find(session, other.project.id, name))
        assert vm is not None
        assert content_of(other, vm.id).startswith(name.encode())
    groups = plan_of(other, run).last_run["groups"]
    begun = [other.operation(group["vms"][0]["operation_id"]).created_at for group in groups]
    ended_at = other.operation(groups[0]["vms"][0]["operation_id"]).ended_at
    assert ended_at is not None
    assert begun[1] - ended_at >= timedelta(seconds=60), "the second group waits for the first, and then for its delay"
    assert audit_invariants(other) == []


def write_plan(story: FleetStory, name: str, groups: list[Group], **fields: Any) -> None:
    spec = service.PlanSpec(name=name, groups=groups, **fields)
    story.db.write(lambda session: service.create(session, spec, project=story.project, now=story.clock.now()))


def take_over(story: FleetStory, name: str, **fields: Any) -> service.PlanView:
    spec = service.PlanSpec(name=name, groups=(), **fields)
    return story.db.write(lambda session: service.import_from(session, spec, project=story.project, now=story.clock.now()))


def test_a_plan_is_read_out_of_the_repository_as_its_newest_backup_says_it(new_story: Callable[..., FleetStory]) -> None:
    story = new_story()
    spec = repo_spec(story, "main")
    accept_repo(story, spec)
    story.settle()
    write_plan(story, "site", [Group(name="data", vms=["db"])], networks={"lan": "lan2"})
    site(story, "db")
    story.db.write(
        lambda session: service.delete(session, "site", project=story.project, expected_version=None, now=story.clock.now())
    )
    newest = [Group(name="data", vms=["db"], tcp=22), Group(name="front", vms=["web"], delay_s=30, awaits=Awaits.AGENT)]
    write_plan(story, "site", newest, networks={"lan": "lan2", "dmz": "dmz2"}, pools={"san": "fast"})
    site(story, "web")
    key = story.secrets.open(spec.wrapped_key, place=spec.repo_id)
    empty(story.db)
    other = new_story()
    (other.directory / "secrets.key").unlink(missing_ok=True)
    accept_repo(other, repo_spec(other, "found", url=spec.url, key=key, fleet_id=spec.fleet_id))
    other.settle()
    with pytest.raises(NotFound) as unread:
        take_over(other, "site", repo="found")
    assert "they know none" in unread.value.message
    other.db.write(lambda session: repo_service.rebuild(session, "found", actor=other.actor, now=other.clock.now()))
    other.settle()
    with pytest.raises(NotFound) as misspelt:
        take_over(other, "sight", repo="found")
    assert "they know site" in misspelt.value.message

    taken = take_over(other, "site", repo="found", networks={"lan": "lan3"})

    assert list(taken.groups) == newest
    assert (taken.plan.networks, taken.plan.pools) == ({"lan": "lan3", "dmz": "dmz2"}, {"san": "fast"})
    with pytest.raises(AlreadyExists):
        take_over(other, "site", repo="found")


@pytest.mark.parametrize(("what", "hint"), [("networks", "--network"), ("pools", "--pool")])
def test_what_has_no_counterpart_here_stops_a_run_and_its_preview_with_what_to_say(
    story: FleetStory, what: str, hint: str
) -> None:
    site(story, "db")
    lose(story, "db")
    [backup] = _all(story)
    settings = backup.manifest["settings"]
    saved = settings["nics"][0]["network"] if what == "networks" else settings["volumes"][0]["pool"]
    write_plan(story, "site", [Group(name="data", vms=["db"])], **{what: {saved: "elsewhere"}})
    _view, seen = story.db.read(
        lambda session: service.preview(session, "site", mode=Mode.REAL, project=story.project, now=story.clock.now())
    )
    run = story.db.write(
        lambda session: service.run(
            session, "site", mode=Mode.REAL, project=story.project, actor=story.actor, now=story.clock.now()
        )
    )
    story.settle()
    ended = story.operation(run.id)
    assert ended.result is not None
    for problem in (seen.groups[0].vms[0].problem, ended.result["problem"]):
        assert "elsewhere" in problem
        assert f"`{hint} {saved}=" in problem
    assert audit_invariants(story) == []


def test_a_test_proves_each_backup_and_leaves_nothing(story: FleetStory) -> None:
    site(story, "db", "web")
    before = story.fleet_vms()
    run = accept_recovery(story, [["db"], ["web"]], mode="test", awaits=Awaits.AGENT)
    story.settle()
    assert outcomes(story, run) == {"db": "back", "web": "back"}
    assert story.fleet_vms() == before
    proven = story.db.read(lambda session: backups.of_repo(session, plan_of(story, run).repo_id))
    assert [one.level for one in proven] == [3, 3]
    assert audit_invariants(story) == []


def test_a_test_asks_each_guest_at_its_groups_port_and_says_what_did_not_answer(story: FleetStory) -> None:
    site(story, "db")
    run = accept_recovery(story, [["db"]], mode="test", tcp=22)
    story.settle()
    assert outcomes(story, run) == {"db": "back"}
    assert [one.level for one in _all(story)] == [3], "it was asked, a start alone proves less"
    run = accept_recovery(story, [["db"]], mode="test", tcp=5432, timeout_s=4)
    story.settle()
    ended = story.operation(run.id)
    assert ended.result is not None
    assert (outcomes(story, run), ended.result["state"]) == ({"db": "failed"}, "stopped")
    assert "refuses connections to TCP port 5432" in ended.result["problem"]
    assert audit_invariants(story) == []


def test_where_an_agent_is_awaited_a_port_that_answers_is_not_enough(story: FleetStory) -> None:
    site(story, "db")
    for host_id in story.host_ids:
        story.hypervisor(host_id).has_guest_agents = False
    run = accept_recovery(story, [["db"]], mode="test", awaits=Awaits.AGENT, tcp=22, timeout_s=4)
    story.settle()
    ended = story.operation(run.id)
    assert ended.result is not None
    assert "the guest did not show the guest agent" in ended.result["problem"]


def test_a_real_run_does_not_ask_for_the_port_and_a_preview_of_a_test_says_who_has_no_card(story: FleetStory) -> None:
    site(story, "db")
    lose(story, "db")
    run = accept_recovery(story, [["db"]], mode="real", tcp=5432)
    story.settle()
    assert outcomes(story, run) == {"db": "back"}, "it is on its own networks, where nobody of ours is"
    plan = plan_of(story, run)
    [backup] = _all(story)
    bare = {**backup.manifest, "settings": {**backup.manifest["settings"], "nics": []}}
    story.db.write(lambda session: backups.update(session, backup.id, manifest=bare))
    _view, found = story.db.read(
        lambda session: service.preview(session, plan.name, mode=Mode.TEST, project=story.project, now=story.clock.now())
    )
    [db] = found.groups[0].vms
    assert (db.outcome.value, "had no network card" in db.problem) == ("failed", True)


def test_a_group_that_does_not_come_back_stops_what_relies_on_it_and_the_next_run_goes_on_there(story: FleetStory) -> None:
    site(story, "db", "web")
    lose(story, "db", "web")
    damaged = next(one for one in _all(story) if one.vm_name == "db")
    story.db.write(lambda session: backups.update(session, damaged.id, state="damaged"))
    run = accept_recovery(story, [["db"], ["web"]], mode="real")
    story.settle()
    ended = story.operation(run.id)
    assert ended.result is not None
    assert ended.result["state"] == "stopped"
    assert "no whole backup" in ended.result["problem"]
    assert outcomes(story, run) == {"db": "failed", "web": "waiting"}

    story.db.write(lambda session: backups.update(session, damaged.id, state="ready"))
    plan = plan_of(story, run)
    again = story.db.write(
        lambda session: service.run(
            session, plan.name, mode=Mode.REAL, project=story.project, actor=story.actor, now=story.clock.now()
        )
    )
    story.settle()
    assert outcomes(story, again) == {"db": "back", "web": "back"}
    third = story.db.write(
        lambda session: service.run(
            session, plan.name, mode=Mode.REAL, project=story.project, actor=story.actor, now=story.clock.now()
        )
    )
    story.settle()
    assert outcomes(story, third) == {"db": "present", "web": "present"}, "what is here is left as it is"
    assert audit_invariants(story) == []


def _all(story: FleetStory) -> Any:
    repo = ready_repo(story)
    return story.db.read(lambda session: backups.of_repo(session, repo.id))


def test_a_cancel_ends_what_is_under_way_and_keeps_what_is_back(story: FleetStory) -> None:
    site(story, "db", "web")
    lose(story, "db", "web")
    run = accept_recovery(story, [["db"], ["web"]], mode="real")
    story.settle(until=lambda: outcomes_or_none(story, run).get("web") == "running")
    story.cancel(run.id)
    story.settle()
    assert story.operation(run.id).state is OperationState.CANCELLED
    assert story.db.read(lambda session: vms.find(session, story.project.id, "db")) is not None
    web = story.db.read(lambda session: vms.find(session, story.project.id, "web"))
    ids = [one["operation_id"] for group in plan_of(story, run).last_run["groups"] for one in group["vms"]]
    states = [story.operation(one).state for one in ids]
    assert states[0] is OperationState.DONE
    assert (web is None) == (states[1] is OperationState.CANCELLED), "its restore was undone, or was over by then"
    assert audit_invariants(story) == []


def outcomes_or_none(story: FleetStory, operation: Operation) -> dict[str, str]:
    return outcomes(story, operation) if plan_of(story, operation).last_run else {}


def test_a_preview_tells_the_loss_and_what_stands_against_it_and_changes_nothing(story: FleetStory) -> None:
    site(story, "db")
    lose(story, "db")
    run = accept_recovery(story, [["db"], ["nobody"]], mode="real")
    story.cancel(run.id)
    story.settle()
    plan = plan_of(story, run)
    later = story.clock.now() + timedelta(hours=2)
    before = story.fleet_vms()
    _view, found = story.db.read(
        lambda session: service.preview(session, plan.name, mode=Mode.REAL, project=story.project, now=later)
    )
    (db,), (nobody,) = found.groups[0].vms, found.groups[1].vms
    assert (db.outcome.value, db.problem) == ("waiting", "")
    assert db.loss_window_s >= 7200
    assert (nobody.outcome.value, nobody.problem) == ("failed", "the repository lists no whole backup of it")
    assert story.fleet_vms() == before


def test_two_runs_of_a_plan_do_not_go_beside_each_other(story: FleetStory) -> None:
    site(story, "db")
    run = accept_recovery(story, [["db"]], mode="test")
    plan = plan_of(story, run)
    with pytest.raises(Conflict) as busy:
        story.db.write(
            lambda session: service.run(
                session, plan.name, mode=Mode.TEST, project=story.project, actor=story.actor, now=story.clock.now()
            )
        )
    assert busy.value.code == "operation-in-progress"
    story.settle()
