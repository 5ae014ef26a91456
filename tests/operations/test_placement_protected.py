"""A vm that shall restart elsewhere is put where the loss of its host could be proven; what proves it is read with the fleet."""

from collections.abc import Callable

import pytest

from tests.operations.kit import FleetStory
from trimtab_controller.store import failover, fleet, hosts, schema


@pytest.fixture
def story(new_story: Callable[..., FleetStory]) -> FleetStory:
    return new_story(host_count=3)


def write_guard(story: FleetStory, host_id: str, *, is_armed: bool) -> None:
    values = {"host_id": host_id, "is_armed": is_armed, "kill_ms": 3000, "beacon_pool_id": "", "updated_at": story.clock.now()}
    story.db.write(lambda session: session.execute(schema.host_guard.insert().values(**values)))


def give_power(story: FleetStory, host_id: str, *, answers: str) -> None:
    now, path = story.clock.now(), {"name": "bmc", "agent": "fence_redfish", "options": {}, "secret_file": "", "secret": ""}

    def work(session: object) -> None:
        failover.set_fence_paths(session, host_id, [path], now=now)  # type: ignore[arg-type]
        message = "" if answers else "it does not answer"
        failover.record_test(session, host_id, "bmc", power=answers or "unknown", message=message, now=now)  # type: ignore[arg-type]

    story.db.write(work)


def unprotected(story: FleetStory) -> frozenset[str]:
    return story.db.read(fleet.read_rows).unprotected


def test_an_armed_warden_or_a_power_device_that_answers_protects(story: FleetStory) -> None:
    first, second, third = story.host_ids
    assert unprotected(story) == {first, second, third}
    write_guard(story, first, is_armed=True)
    write_guard(story, second, is_armed=False)
    give_power(story, second, answers="on")
    give_power(story, third, answers="")
    assert unprotected(story) == {third}
    ready = {path.host_id for path in story.db.read(failover.fence_paths) if path.is_ready}
    assert ready == {second}, "as the row itself says it"
    story.db.write(lambda session: failover.set_fence_paths(session, second, [], now=story.clock.now()))
    assert unprotected(story) == {second, third}


def test_a_host_counts_as_unprotected_where_it_is_home_to_a_vm_that_shall_restart(story: FleetStory) -> None:
    def homes() -> frozenset[str]:
        return story.db.read(lambda session: failover.unprotected(session, with_vms_to_restart=True))

    write_guard(story, story.host_ids[0], is_armed=True)
    assert homes() == frozenset()
    story.running_vm("toy", ha="none", to_host_id=story.host_ids[1])
    assert homes() == frozenset()
    story.running_vm("safe", ha="restart", to_host_id=story.host_ids[0])
    vm = story.running_vm("db", ha="restart", to_host_id=story.host_ids[2])
    assert homes() == {story.host_ids[2]}
    story.accept_power(vm, "delete")
    assert homes() == frozenset()


@pytest.mark.parametrize("number", range(3))
def test_a_kept_vm_goes_to_the_host_that_can_be_proven_off_and_says_so(story: FleetStory, number: int) -> None:
    write_guard(story, story.host_ids[number], is_armed=True)
    assert story.running_vm("db", ha="restart").host_id == story.host_ids[number]


def test_it_is_placed_where_there_is_room_all_the_same(story: FleetStory) -> None:
    write_guard(story, story.host_ids[0], is_armed=True)
    story.db.write(
        lambda session: session.execute(
            schema.host.update().where(schema.host.c.id == story.host_ids[0]).values(is_cordoned=True)
        )
    )
    vm = story.running_vm("db", ha="restart")
    assert vm.host_id in {host.id for host in story.db.read(hosts.live)} - {story.host_ids[0]}
