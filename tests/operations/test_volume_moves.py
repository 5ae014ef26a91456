"""Volumes that move between pools: what is refused, what is claimed, what a take-over in the middle leaves; pools that are drained."""

import pytest
import sqlalchemy as sa

from tests.operations.examples_snapshots import snapshotted
from tests.operations.examples_storage import accept_move, moved_to, other_pool, stays, stored
from tests.operations.examples_vms import stopped
from tests.operations.invariants import audit_invariants
from tests.operations.kit import GIB, FleetStory
from trimtab_agent.hypervisor import simulated_layers
from trimtab_agent.hypervisor.simulation import Fault, FaultKind
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import Pool, Volume
from trimtab_controller.core.planning import Cause, PlanKind
from trimtab_controller.core.planning.plan import Plan
from trimtab_controller.loops.upkeep import Upkeep
from trimtab_controller.services import plans as plan_service
from trimtab_controller.services.plans import PlanWish
from trimtab_controller.store import describe, pools, schema
from trimtab_protos.errors import Conflict, InvalidRequest, NoCapacity


def vm_with_marks(story: FleetStory, name: str = "web1") -> tuple[str, Volume]:
    vm = story.running_vm(name)
    simulated_layers.write(story.hypervisor(vm.host_id), vm.id, "made")
    return vm.id, story.volumes(vm.id)[0]


def claimed(story: FleetStory, volume_id: str) -> set[str]:
    table = schema.disk_claim
    query = sa.select(table.c.pool_id).where(table.c.volume_id == volume_id)
    return set(story.db.read(lambda session: session.scalars(query).all()))


def upkeep(story: FleetStory) -> Upkeep:
    return Upkeep(db=story.db, clock=story.clock, nudger=story.nudger)


def test_both_pools_are_claimed_until_the_former_is_left(story: FleetStory) -> None:
    vm_id, volume = vm_with_marks(story)
    pool = other_pool(story)
    held = story.hold("move.copying", Fault(FaultKind.HANG))
    operation = accept_move(story, volume.id, pool)
    story.settle(until=held.met.is_set)
    assert claimed(story, volume.id) == {story.shared.id, pool.id}
    held.released.set()
    story.settle()
    assert story.operation(operation.id).state is OperationState.DONE
    assert claimed(story, volume.id) == {pool.id}
    moved_to(story, pool, volume.id)
    assert story.running_on(vm_id), "the guest runs on"
    assert audit_invariants(story) == []


@pytest.mark.parametrize("verb", ["stop", "delete"])
def test_a_forced_end_in_the_middle_leaves_one_truth_which_is_cleaned_up(story: FleetStory, verb: str) -> None:
    vm_id, volume = vm_with_marks(story)
    held = story.hold("move.copying", Fault(FaultKind.HANG))
    operation = accept_move(story, volume.id, other_pool(story))
    story.settle(until=held.met.is_set)
    story.accept_power(story.vm(vm_id), verb, **({"force": True} if verb == "stop" else {}))
    held.released.set()
    story.settle()
    story.wait_for_jobs()
    upkeep(story).settle_moves(story.term)
    story.settle()
    assert story.operation(operation.id).state is not OperationState.DONE
    after = story.db.read(lambda session: describe.get_volume(session, volume.id))
    assert after.move_state == ""
    there = [pool for pool in (story.shared, other_pool(story)) if stored(story, pool, volume.id) is not None]
    assert [pool.id for pool in there] == [after.pool_id], "one side, and SQL says which"
    held_there = stored(story, there[0], volume.id)
    assert held_there is not None
    assert held_there.layers[""].marks == {"made"}
    assert audit_invariants(story) == []
    if verb == "stop":
        story.accept_power(story.vm(vm_id), "start")
        story.settle()
        assert story.running_on(vm_id)


def test_what_was_cut_off_keeps_its_vm_from_being_moved_until_it_is_clean(story: FleetStory) -> None:
    vm_id, volume = vm_with_marks(story)
    held = story.hold("move.copying", Fault(FaultKind.HANG))
    accept_move(story, volume.id, other_pool(story))
    story.settle(until=held.met.is_set)
    story.accept_power(story.vm(vm_id), "stop", force=True)
    held.released.set()
    story.settle()
    story.accept_power(story.vm(vm_id), "start")
    story.settle()
    with pytest.raises(Conflict, match="cut off"):
        story.accept_power(story.vm(vm_id), "migrate")
    upkeep(story).settle_moves(story.term)
    story.settle()
    story.accept_power(story.vm(vm_id), "migrate")
    story.settle()
    assert audit_invariants(story) == []


def test_a_full_target_undoes_the_move_and_the_guest_runs_on(story: FleetStory) -> None:
    vm_id, volume = vm_with_marks(story)
    pool = other_pool(story)
    operation = accept_move(story, volume.id, pool)
    store = story.fleet.store(story.vm(vm_id).host_id, describe.pool_spec(pool))
    store.capacity_bytes = 1
    story.settle()
    ended = story.operation(operation.id)
    assert (ended.state, ended.error.code if ended.error else "") == (OperationState.FAILED, "pool-full")
    stays(story, ended)
    assert story.running_on(vm_id)


def test_what_can_be_known_is_refused_before_anything_changes(story: FleetStory) -> None:
    vm_id, volume = vm_with_marks(story)
    pool = other_pool(story)
    with pytest.raises(InvalidRequest, match="is in pool"):
        accept_move(story, volume.id, story.shared)
    with story_pool_without_room(story, pool), pytest.raises(NoCapacity, match="no room"):
        accept_move(story, volume.id, pool)
    snapshotted(story, story.vm(vm_id), "before")
    with pytest.raises(Conflict, match="kept by snapshot before"):
        accept_move(story, volume.id, pool)
    assert claimed(story, volume.id) == {story.shared.id}


class story_pool_without_room:
    def __init__(self, story: FleetStory, pool: Pool) -> None:
        self._story, self._pool = story, pool

    def __enter__(self) -> None:
        self._set(0)

    def __exit__(self, *_: object) -> None:
        self._set(1 << 40)

    def _set(self, available_bytes: int) -> None:
        table = schema.pool_space
        change = table.update().where(table.c.pool_id == self._pool.id).values(available_bytes=available_bytes)
        self._story.db.write(lambda session: session.execute(change))


# --- draining ----------------------------------------------------------------------------------------------------------------


def drain_plan(story: FleetStory, pool: Pool) -> tuple[str, Plan]:
    wish = PlanWish(kind=PlanKind.DRAIN_POOL, pool=pool.name)
    view = story.db.write(lambda session: plan_service.create(session, wish, actor=story.actor, now=story.clock.now()))
    return view.row.id, view.plan


def apply_plan(story: FleetStory, plan_id: str) -> str:
    return story.db.write(lambda session: plan_service.apply(session, plan_id, actor=story.actor, now=story.clock.now())).id


def test_a_drained_pool_is_empty_and_the_way_back_leads_back(story: FleetStory) -> None:
    """Two guests run, one is stopped: each volume goes, and each guest is as it was."""
    ids, volumes = zip(*(vm_with_marks(story, f"web{number}") for number in range(3)), strict=True)
    stopped(story, story.vm(ids[2]))
    homes = [story.vm(vm_id).host_id for vm_id in ids]
    starts = [story.hypervisor(home).domains[vm_id].starts for vm_id, home in zip(ids, homes, strict=True)]

    def guests_are_as_they_were() -> None:
        assert [story.running_on(vm_id) for vm_id in ids] == [{homes[0]}, {homes[1]}, frozenset()]
        assert [story.vm(vm_id).observed_state.value for vm_id in ids] == ["running", "running", "stopped"]
        now = [story.hypervisor(home).domains[vm_id].starts for vm_id, home in zip(ids, homes, strict=True)]
        assert now == starts, "no guest was started anew"

    target = other_pool(story)
    plan_id, plan = drain_plan(story, story.shared)
    assert {step.volume_id for step in plan.steps} == {volume.id for volume in volumes}
    assert {step.target_pool_id for step in plan.steps} == {target.id}, "shared storage goes to shared storage"
    assert [blocker.cause for blocker in plan.blockers] == [Cause.IMAGE_STAYS]
    operation_id = apply_plan(story, plan_id)
    story.settle()
    assert story.operation(operation_id).result == {"moved": 3, "skipped": 0, "failed": []}
    for volume in volumes:
        moved_to(story, target, volume.id)
        assert claimed(story, volume.id) == {target.id}
    guests_are_as_they_were()
    assert audit_invariants(story) == []
    wish = PlanWish(kind=PlanKind.UNDO, plan_id=plan_id)
    back = story.db.write(lambda session: plan_service.create(session, wish, actor=story.actor, now=story.clock.now()))
    apply_plan(story, back.row.id)
    story.settle()
    for volume in volumes:
        moved_to(story, story.shared, volume.id)
    guests_are_as_they_were()
    story.accept_power(story.vm(ids[2]), "start")
    story.settle()
    assert len(story.running_on(ids[2])) == 1, "the stopped one finds its disk"
    assert audit_invariants(story) == []


def test_what_cannot_leave_is_named_with_its_cure(story: FleetStory) -> None:
    vm_id, volume = vm_with_marks(story)
    snapshotted(story, story.vm(vm_id), "before")
    _other, lone = vm_with_marks(story, "web2")
    pool = other_pool(story)
    with story_pool_without_room(story, pool):
        _plan_id, plan = drain_plan(story, story.shared)
    assert plan.steps == ()
    found = {blocker.vm_name: (blocker.cause, blocker.cure) for blocker in plan.blockers if blocker.vm_id}
    assert found["web1"][0] is Cause.VOLUME_STAYS
    assert "trimtab vm snapshot delete web1 before" in found["web1"][1]
    assert found["web2"][0] is Cause.NO_ROOM
    assert lone.size_bytes >= GIB
    assert volume.id


def test_a_plan_is_refused_when_a_volume_came_to_the_pool_since(story: FleetStory) -> None:
    vm_with_marks(story)
    other_pool(story)
    plan_id, _plan = drain_plan(story, story.shared)
    vm_with_marks(story, "web2")
    with pytest.raises(Conflict, match="came to the pool"):
        apply_plan(story, plan_id)


def test_a_drain_that_is_called_off_moves_nothing_more(story: FleetStory) -> None:
    volumes = [vm_with_marks(story, f"web{number}")[1] for number in range(4)]
    target = other_pool(story)
    plan_id, _plan = drain_plan(story, story.shared)
    held = story.hold("move.copying", Fault(FaultKind.HANG))
    operation_id = apply_plan(story, plan_id)
    story.settle(until=held.met.is_set)
    story.db.write(lambda session: plan_service.cancel(session, plan_id, actor=story.actor, now=story.clock.now()))
    held.released.set()
    story.settle()
    assert story.operation(operation_id).state is OperationState.CANCELLED
    after = [story.db.read(lambda session, one=volume.id: describe.get_volume(session, one)) for volume in volumes]
    assert {one.move_state for one in after} == {""}
    assert {one.pool_id for one in after} <= {story.shared.id, target.id}
    assert any(one.pool_id == story.shared.id for one in after)
    assert audit_invariants(story) == []


# --- where pools are -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/srv/a", "/srv/a/below", "/srv"])
def test_a_path_that_another_pool_has_is_found(story: FleetStory, path: str) -> None:
    def insert(session: object) -> Pool:
        return pools.insert(
            session,  # type: ignore[arg-type]
            pool_id="pool-a",
            name="a",
            kind="dir",
            path="/srv/a",
            is_shared=False,
            is_default=False,
            reserve_permille=50,
            settings={},
            now=story.clock.now(),
        )

    made = story.db.write(insert)
    taken = story.db.read(lambda session: pools.at_path(session, path))
    assert taken is not None
    if path != "/srv":
        assert taken.id == made.id
    assert story.db.read(lambda session: pools.at_path(session, "/srv/ab")) is None
