"""The fleet's own decisions under another policy: what would have come of them, beside what did."""

from datetime import timedelta

import sqlalchemy as sa

from tests.operations.kit import FleetStory
from trimtab_controller.core.placement.journal_replay import JournalReport, replay_journal
from trimtab_controller.core.placement.policies import policy_named
from trimtab_controller.release import RELEASE
from trimtab_controller.services import placement_replay
from trimtab_controller.store import schema


def replay(story: FleetStory, policy: str, *, hours: float = 24.0) -> JournalReport:
    since = story.clock.now() - timedelta(hours=hours)
    history = story.db.read(lambda session: placement_replay.read(session, since=since))
    until_s = story.clock.now().timestamp()
    return replay_journal(history.fleet, history.events, policy=policy_named(policy), until_s=until_s, cpu_time_ns=lambda: 0)


def stop(story: FleetStory, vm_id: str) -> None:
    story.accept_power(story.vm(vm_id), "stop", force=True)
    story.settle()


def test_each_decision_is_kept_with_its_inputs_hash_the_release_the_policy_and_what_came_of_it(story: FleetStory) -> None:
    placed, moved = story.running_vm("web1"), story.running_vm("web2")
    story.accept_power(moved, "migrate")
    story.settle()
    story.accept_create("huge", vcpus=1024, memory_mib=1024)
    story.settle()
    rows = story.db.read(lambda session: session.execute(sa.select(schema.decision).order_by(schema.decision.c.id)).all())
    assert [row.kind for row in rows] == ["create", "create", "migrate", "create"]
    assert [row.chosen_host_id for row in rows] == [placed.host_id, moved.host_id, story.vm(moved.id).host_id, ""]
    assert {(row.policy, row.verdicts["revision"], len(row.inputs_sha256)) for row in rows} == {("best-fit", RELEASE, 64)}
    assert len({row.inputs_sha256 for row in rows}) == 4


def test_the_same_policy_gives_the_same_history(story: FleetStory) -> None:
    guests = [story.running_vm(f"web{number}") for number in range(4)]
    story.clock.advance(3600)
    stop(story, guests[0].id)
    story.clock.advance(3600)
    report = replay(story, "best-fit")
    assert (report.placements, report.refused, report.refused_then, report.same_host) == (4, 0, 0, 4)
    assert report.peak_hosts == report.peak_hosts_then == len({story.vm(vm.id).host_id for vm in guests if vm is not guests[0]})
    assert report.time_avg_hosts == report.time_avg_hosts_then


def test_another_policy_gives_another_history_and_leaves_the_fleet_alone(story: FleetStory) -> None:
    guests = [story.running_vm(f"web{number}") for number in range(3)]
    story.clock.advance(3600)
    before = [story.vm(vm.id) for vm in guests]
    report = replay(story, "spread")
    assert (report.peak_hosts_then, report.peak_hosts) == (1, 3)
    assert report.time_avg_hosts > 2.5 > report.time_avg_hosts_then
    assert [story.vm(vm.id) for vm in guests] == before


def test_what_ran_before_stays_where_it_was_and_what_ended_frees_its_room(story: FleetStory) -> None:
    kept, ended = story.running_vm("kept"), story.running_vm("ended")
    stop(story, ended.id)
    story.clock.advance(4 * 3600)
    story.running_vm("fresh")
    report = replay(story, "spread", hours=1)
    assert (report.placements, report.peak_hosts, report.peak_hosts_then) == (1, 2, 1)
    assert story.vm(kept.id).host_id


def test_a_vm_that_was_refused_is_counted_and_what_would_have_fit_is_told(story: FleetStory) -> None:
    _, operation = story.accept_create("huge", vcpus=1024, memory_mib=1024)
    story.settle()
    assert story.operation(operation.id).error is not None
    report = replay(story, "best-fit")
    assert (report.placements, report.refused, report.refused_then) == (0, 1, 1)
