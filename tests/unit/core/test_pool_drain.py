"""Plans that empty a pool, and what becomes of vms whose pool is not usable."""

from dataclasses import replace

import pytest

from trimtab_controller.core.planning import Cause, Rates, Slots
from trimtab_controller.core.planning.plan import Plan, StepKind, undo_steps
from trimtab_controller.core.planning.pool_drain import PoolContents, PoolRoom, PoolVolume, changes, plan_pool_drain
from trimtab_controller.core.way_back import way_back

GIB = 1 << 30
OLD = PoolRoom(pool_id="pool-old", name="old", is_shared=False, is_proven=True, hosts=frozenset({"h1", "h2"}), free_bytes={})
FAST = replace(OLD, pool_id="pool-fast", name="fast", free_bytes={"h1": 10 * GIB, "h2": 10 * GIB})
SAN = replace(OLD, pool_id="pool-san", name="san", is_shared=True, free_bytes={"": 100 * GIB})


def volume(name: str, *, gib: int = 1, hosts: tuple[str, ...] = ("h1",), **changes: object) -> PoolVolume:
    made = PoolVolume(volume_id=f"vol-{name}", name=name, size_bytes=gib * GIB, version=1, host_ids=hosts)
    return replace(made, **changes)  # type: ignore[arg-type]


def contents(
    *volumes: PoolVolume, pool: PoolRoom = OLD, others: tuple[PoolRoom, ...] = (FAST, SAN), **changes: object
) -> PoolContents:
    return replace(PoolContents(pool=pool, volumes=volumes, others=others), **changes)  # type: ignore[arg-type]


def drained(found: PoolContents) -> Plan:
    return plan_pool_drain(found, Slots(), Rates())


def targets(plan: Plan) -> dict[str, str]:
    return {step.volume_name: step.target_pool_id for step in plan.steps}


def test_what_is_local_goes_to_its_hosts_own_storage_first_and_large_ones_choose_first() -> None:
    plan = drained(contents(volume("small", gib=3), volume("large", gib=9), volume("other", gib=3, hosts=("h2",))))
    assert targets(plan) == {"large": "pool-fast", "small": "pool-san", "other": "pool-fast"}
    assert [step.volume_name for step in plan.steps] == ["large", "other", "small"]
    assert {step.kind for step in plan.steps} == {StepKind.MOVE_VOLUME}
    assert plan.duration_s > 0
    assert plan.blockers == ()
    assert plan.summary.startswith("drain pool old: 3 volumes, about ")
    assert Plan.from_json(plan.as_json()) == plan


def test_what_is_shared_goes_to_proven_shared_storage_only() -> None:
    shared = replace(SAN, pool_id="pool-old", name="old", free_bytes={})
    unproven = replace(SAN, pool_id="pool-new", name="new", is_proven=False)
    plan = drained(contents(volume("root"), pool=shared, others=(FAST, unproven)))
    (blocker,) = plan.blockers
    assert (plan.steps, blocker.cause) == ((), Cause.NO_ROOM)
    assert "no other shared pool" in blocker.message
    assert targets(drained(contents(volume("root"), pool=shared, others=(FAST, SAN)))) == {"root": "pool-san"}


def test_what_stays_is_named_with_its_cure() -> None:
    plan = drained(
        contents(
            volume("kept", refusal="volume kept is kept by a snapshot; `trimtab vm snapshot delete web1 a` first"),
            volume("merging", refusal="layers are still being merged"),
            volume("lost", hosts=()),
            volume("huge", gib=500),
            image_names=("debian",),
        )
    )
    found = {blocker.vm_name: (blocker.cause, blocker.cure) for blocker in plan.blockers}
    assert found["kept"] == (Cause.VOLUME_STAYS, "`trimtab vm snapshot delete web1 a` first")
    assert found["merging"] == (Cause.VOLUME_STAYS, "trimtab volume get merging")
    assert found["lost"] == (Cause.STATE_UNKNOWN, "trimtab pool get old")
    assert found["huge"][0] is Cause.NO_ROOM
    assert found["debian"][0] is Cause.IMAGE_STAYS
    assert "5 blockers" in plan.summary


def test_an_empty_pool_needs_nothing_and_one_of_each_is_said_so() -> None:
    assert drained(contents()).summary == "drain pool old: nothing to move"
    plan = drained(contents(volume("root"), volume("lost", hosts=())))
    assert ": 1 volume, " in plan.summary
    assert plan.summary.endswith("1 blocker")


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (contents(volume("root")), ()),
        (contents(), ()),
        (contents(volume("root"), volume("new")), ("volume new came to the pool",)),
        (contents(volume("root", gib=2)), ("volume root was resized",)),
        (contents(volume("root"), others=()), ("volume root has no place in the pool that the plan chose",)),
        (
            contents(volume("root"), others=(replace(FAST, free_bytes={"h1": 1}),)),
            ("volume root has no place in the pool that the plan chose",),
        ),
        (
            contents(volume("root"), others=(replace(FAST, hosts=frozenset({"h2"})),)),
            ("volume root has no place in the pool that the plan chose",),
        ),
        (contents(volume("root", refusal="it moves")), ("volume root cannot move now: it moves",)),
    ],
)
def test_a_plan_is_stale_only_where_it_matters(now: PoolContents, said: tuple[str, ...]) -> None:
    assert changes(drained(contents(volume("root"))), now) == said


def test_the_way_back_leads_to_the_pool_that_was_left() -> None:
    (step,) = drained(contents(volume("root"))).steps
    (back,) = undo_steps([step])
    assert (back.pool_id, back.target_pool_id) == ("pool-fast", "pool-old")


@pytest.mark.parametrize(
    ("state", "reason", "pool_state", "elsewhere", "said"),
    [
        ("running", "", "ready", True, ""),
        ("running", "", "", True, ""),
        ("paused", "io_error", "ready", True, "resumes by itself"),
        ("running", "", "unresponsive", False, "it waits for the storage and goes on when that answers"),
        ("running", "", "unresponsive", True, "`trimtab vm stop web1 --force`"),
        ("running", "", "failed", False, "until the pool is back"),
        (
            "running",
            "",
            "failed",
            True,
            "open still, and does not start here again until the pool is back; sooner: `trimtab vm stop web1",
        ),
        ("stopped", "", "failed", True, "starts it on a host that reaches the pool"),
        ("stopped", "", "failed", False, "a backup restores it elsewhere"),
    ],
)
def test_each_vm_of_a_pool_that_is_not_usable_has_a_way_back(
    state: str, reason: str, pool_state: str, elsewhere: bool, said: str
) -> None:
    sentence = way_back("web1", state=state, reason=reason, pool_state=pool_state, is_usable_elsewhere=elsewhere)
    assert said in sentence if said else sentence == ""


def test_a_guest_that_an_operator_wants_paused_is_not_said_to_resume_by_itself() -> None:
    said = way_back(
        "web1", state="paused", reason="io_error", pool_state="ready", is_usable_elsewhere=True, is_wished_paused=True
    )
    assert ("by itself" in said, "`trimtab vm resume web1`" in said) == (False, True)
