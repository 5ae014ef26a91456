"""What holds for every plan, every proof and every count of what fits."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.properties.estates import LOCAL, SHARED, estates, host_ids, nothing_is_overcommitted, vms
from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.placement import Books, FleetSnapshot, PlacementKind, PlacementRequest, explain
from trimtab_controller.core.placement.engine import decide
from trimtab_controller.core.placement.policies import BEST_FIT
from trimtab_controller.core.planning import (
    ConsolidatePolicy,
    Estate,
    History,
    Plan,
    Power,
    RebalancePolicy,
    Slots,
    Step,
    StepKind,
    Terms,
    VmSnapshot,
    changes,
    plan_consolidate,
    plan_drain,
    plan_evacuate,
    plan_rebalance,
    plan_upgrade,
    undo_steps,
)
from trimtab_controller.core.planning.admission import Admission
from trimtab_controller.core.planning.capacity import fit
from trimtab_controller.core.planning.domains import domains_of
from trimtab_controller.core.planning.load import HostUse
from trimtab_controller.core.planning.proof import Coverage, FailoverProof
from trimtab_controller.core.planning.what_if import request_for

# A busy machine is not a failed property.
fewer = settings(max_examples=40)

EAGER = RebalancePolicy(start_spread=0.0, least_worth=0.005)
TERMS = Terms()


@st.composite
def plans(draw: st.DrawFn) -> tuple[Estate, Plan]:
    estate = draw(estates())
    scope = draw(st.lists(st.sampled_from(list(host_ids(estate))), min_size=1, max_size=3, unique=True))
    maker = draw(st.sampled_from(["drain", "upgrade", "rebalance", "consolidate", "evacuate"]))
    match maker:
        case "drain":
            return estate, plan_drain(estate, scope, TERMS)
        case "upgrade":
            return estate, plan_upgrade(estate, scope, TERMS)
        case "evacuate":
            dead = with_hosts(estate, {host_id: {"connectivity": HostConnectivity.FENCED} for host_id in scope})
            return dead, plan_evacuate(dead, scope, TERMS)
        case "rebalance":
            return estate, plan_rebalance(estate, EAGER, TERMS)
        case _:
            return estate, plan_consolidate(estate, ConsolidatePolicy(load_ceiling=0.9), TERMS)


def with_hosts(estate: Estate, changed: dict[str, dict[str, Any]]) -> Estate:
    hosts = [replace(host, **changed.get(host.host_id, {})) for host in estate.fleet.hosts]
    fleet = FleetSnapshot.of(hosts, estate.fleet.pools.values(), groups=estate.fleet.groups)
    known = {"host_versions": estate.host_versions, "cpu_millis": estate.cpu_millis, "use": estate.use}
    return Estate.of(fleet, estate.vms.values(), **known)  # type: ignore[arg-type]


class Run:
    """Carries a plan out in any order that `after` allows, several steps at once, on books that refuse what does not fit."""

    def __init__(self, estate: Estate, steps: tuple[Step, ...]) -> None:
        self.estate, self.steps = estate, steps
        self.books = Books(estate.fleet)
        self.host_of = {vm.vm_id: vm.host_id for vm in estate.vms.values()}
        self.done: set[int] = set()
        self.running: dict[int, Step] = {}

    def ready(self) -> list[Step]:
        begun = self.done | self.running.keys()
        return [step for step in self.steps if step.position not in begun and set(step.after) <= self.done]

    def begin(self, step: Step) -> None:
        if step.moves_vm:
            assert self.host_of[step.vm_id] == step.host_id
            vm = self.estate.vms[step.vm_id]
            request = replace(request_for(vm, step.kind), excluded_host_ids=(step.host_id,), required_host_id=step.target_host_id)
            assert decide(self.books, request, policy=BEST_FIT).chosen_host_id == step.target_host_id
            self.books.claim(request, step.target_host_id)
            assert nothing_is_overcommitted(self.books) or not nothing_is_overcommitted(Books(self.estate.fleet))
        self.running[step.position] = step

    def end(self, step: Step) -> None:
        if step.moves_vm:
            self.books.release(request_for(self.estate.vms[step.vm_id], step.kind), step.host_id)
            self.host_of[step.vm_id] = step.target_host_id
        del self.running[step.position]
        self.done.add(step.position)

    def whole(self, rng: Any) -> None:
        while len(self.done) < len(self.steps):
            ready = self.ready()
            assert ready or self.running, "the plan waits for itself"
            if ready and (not self.running or rng.random() < 0.7):
                self.begin(rng.choice(ready))
            else:
                self.end(rng.choice(list(self.running.values())))

    def estate_after(self) -> Estate:
        moved = [replace(vm, host_id=self.host_of[vm.vm_id]) for vm in self.estate.vms.values()]
        hosts = {
            host.host_id: {
                "vcpus_claimed": host.vcpus_limit - int(self.books.free["vcpus"][row]),
                "memory_claimed_mib": host.memory_limit_mib - int(self.books.free["memory_mib"][row]),
            }
            for row, host in enumerate(self.estate.fleet.hosts)
        }
        local = self.estate.fleet.pools[LOCAL]
        places = {
            host_id: replace(place, claimed_bytes=place.claimed_bytes + taken, available_bytes=place.available_bytes - taken)
            for host_id, place in local.places.items()
            for taken in [local.free_bytes(host_id) - int(self.books.free[f"space:{LOCAL}"][self.estate.fleet.row_of[host_id]])]
        }
        members = [replace(host, **hosts[host.host_id]) for host in self.estate.fleet.hosts]
        groups = [
            replace(group, members={vm_id: self.host_of[vm_id] for vm_id in group.members}) for group in self.estate.fleet.groups
        ]
        fleet = FleetSnapshot.of(members, [replace(local, places=places), self.estate.fleet.pools[SHARED]], groups=groups)
        homed = [_at_home(vm) for vm in moved]
        return Estate.of(fleet, homed, cpu_millis=self.estate.cpu_millis, use=self.estate.use)


def _at_home(vm: VmSnapshot) -> VmSnapshot:
    """Return the vm with its local disks where it is."""
    disks = tuple(replace(disk, host_id=vm.host_id) if disk.pool_id == LOCAL else disk for disk in vm.request.disks)
    return replace(vm, request=replace(vm.request, disks=disks))


@fewer
@given(plans(), st.randoms(use_true_random=False))
def test_a_plan_applies_cleanly_in_every_order_that_it_allows(made: tuple[Estate, Plan], rng: Any) -> None:
    estate, plan = made
    Run(estate, plan.steps).whole(rng)


@fewer
@given(plans())
def test_a_plan_fits_the_state_it_was_made_from_and_survives_its_stored_form(made: tuple[Estate, Plan]) -> None:
    estate, plan = made
    assert changes(plan, estate) == ()
    assert Plan.from_json(plan.as_json()) == plan
    assert [step.position for step in plan.steps] == list(range(len(plan.steps)))
    assert all(position < step.position for step in plan.steps for position in step.after)


def may_live_at_home(estate: Estate, step: Step) -> bool:
    empty = {"vcpus_claimed": 0, "memory_claimed_mib": 0, "is_cordoned": False}
    vm = estate.vms[step.vm_id]
    request = replace(request_for(vm, step.kind), required_host_id=vm.host_id)
    books = Books(with_hosts(estate, dict.fromkeys(host_ids(estate), empty)).fleet)
    return decide(books, request, policy=BEST_FIT).chosen_host_id == vm.host_id


@fewer
@given(estates(), st.data(), st.randoms(use_true_random=False))
def test_equal_estates_give_equal_plans_and_proofs_in_whatever_order_their_objects_come(
    estate: Estate, drawn: st.DataObject, rng: Any
) -> None:
    hosts, known = list(estate.fleet.hosts), list(estate.vms.values())
    groups = [replace(group, members=dict(_shuffled(group.members.items(), rng))) for group in estate.fleet.groups]
    fleet = FleetSnapshot.of(_shuffled(hosts, rng), _shuffled(estate.fleet.pools.values(), rng), groups=_shuffled(groups, rng))
    again = Estate.of(fleet, _shuffled(known, rng), host_versions=estate.host_versions, cpu_millis=estate.cpu_millis)
    scope = drawn.draw(st.lists(st.sampled_from([host.host_id for host in hosts]), min_size=1, max_size=3, unique=True))
    for make in (
        lambda one: plan_drain(one, scope, TERMS),
        lambda one: plan_upgrade(one, scope, TERMS),
        lambda one: plan_rebalance(one, EAGER, TERMS),
        lambda one: plan_consolidate(one, ConsolidatePolicy(load_ceiling=0.9), TERMS),
        lambda one: FailoverProof(one, domains_of(one, ["host", "rack"])).results(),
    ):
        assert make(again) == make(estate)


def _shuffled(items: Iterable[Any], rng: Any) -> list[Any]:
    known = list(items)
    return rng.sample(known, len(known))


@fewer
@given(plans(), st.randoms(use_true_random=False))
def test_undo_restores_where_every_vm_was(made: tuple[Estate, Plan], rng: Any) -> None:
    estate, plan = made
    assume(plan.kind != "evacuate")
    # A vm that stands where its own rules forbid it (they changed since) may leave and not come back.
    assume(all(may_live_at_home(estate, step) for step in plan.steps if step.moves_vm))
    run = Run(estate, plan.steps)
    run.whole(rng)
    opened = with_hosts(run.estate_after(), {key: {"is_cordoned": False} for key in host_ids(estate)})
    back = Run(opened, undo_steps(plan.steps))
    back.whole(rng)
    assert back.host_of == {vm.vm_id: vm.host_id for vm in estate.vms.values()}


@fewer
@given(estates(), st.data())
def test_the_state_that_a_rebalance_leaves_gives_no_second_plan(estate: Estate, data: st.DataObject) -> None:
    uses = st.builds(
        HostUse, memory_pressure=st.sampled_from([0.0, 0.05, 0.3]), memory_withheld_mib=st.sampled_from([0, 2048, 1 << 20])
    )
    estate = replace(estate, use={host_id: data.draw(uses, label=host_id) for host_id in host_ids(estate)})
    plan = plan_rebalance(estate, EAGER, TERMS)
    run = Run(estate, plan.steps)
    for step in plan.steps:
        run.begin(step)
        run.end(step)
    again = plan_rebalance(run.estate_after(), EAGER, TERMS)
    assert again.steps == ()
    assert again.summary.startswith("no beneficial move")
    assert plan.expected["cpu_spread"] <= plan.before["cpu_spread"] + 0.2 * plan.before["memory_spread"] + 1e-9


@fewer
@given(estates(), st.data(), st.sampled_from([EAGER, RebalancePolicy()]))
def test_no_rebalance_fills_the_memory_of_a_host_by_what_was_measured_and_none_comes_after_it(
    estate: Estate, data: st.DataObject, policy: RebalancePolicy
) -> None:
    uses = st.builds(
        HostUse,
        memory_pressure=st.sampled_from([0.0, 0.0, 0.3]),
        memory_mib=st.sampled_from([0, 4096, 8192, 16384]),
        memory_others_mib=st.sampled_from([0, 700, 3000]),
    )
    held = [replace(vm, used_mib=data.draw(st.integers(0, vm.request.memory_mib), label=vm.vm_id)) for vm in estate.vms.values()]
    use = {host_id: data.draw(uses, label=host_id) for host_id in host_ids(estate)}
    estate = replace(estate, vms={vm.vm_id: vm for vm in held}, use=use)

    def used_mib(one: Estate, host_id: str) -> int:
        own = sum(vm.used_mib for vm in one.on(host_id) if vm.power is not Power.STOPPED)
        return use[host_id].memory_others_mib + own

    plan = plan_rebalance(estate, policy, TERMS)
    run = Run(estate, plan.steps)
    for step in plan.steps:
        run.begin(step)
        run.end(step)
    after = run.estate_after()
    for host_id in host_ids(estate):
        before_mib, after_mib = used_mib(estate, host_id), used_mib(after, host_id)
        assert after_mib <= before_mib or after_mib <= (use[host_id].memory_mib or 1 << 60) * policy.relieved_memory
        has_come = set(after.by_host[host_id]) - set(estate.by_host[host_id])
        assert not has_come or use[host_id].memory_pressure <= policy.hot_memory
    assert plan_rebalance(after, policy, TERMS).steps == ()


@fewer
@given(estates())
def test_the_state_that_a_consolidation_leaves_gives_no_second_plan(estate: Estate) -> None:
    policy = ConsolidatePolicy(load_ceiling=0.9)
    plan = plan_consolidate(estate, policy, TERMS)
    run = Run(estate, plan.steps)
    for step in plan.steps:
        run.begin(step)
        run.end(step)
    after = run.estate_after()
    assert all(after.by_host[host_id] == () for host_id in plan.scope)
    assert plan_consolidate(after, policy, TERMS).steps == ()


@fewer
@given(estates(), st.data())
def test_a_drain_moves_every_vm_or_says_why_it_stays(estate: Estate, drawn: st.DataObject) -> None:
    host_id = drawn.draw(st.sampled_from(list(host_ids(estate))))
    plan = plan_drain(estate, [host_id], TERMS)
    told = {step.vm_id for step in plan.moves} | {blocker.vm_id for blocker in plan.blockers}
    assert told == {vm.vm_id for vm in estate.on(host_id) if vm.power is not Power.STOPPED}
    assert {step.vm_id for step in plan.moves}.isdisjoint(blocker.vm_id for blocker in plan.blockers)
    assert all(blocker.message and blocker.cure for blocker in plan.blockers)
    assert all(step.target_host_id not in ("", host_id) for step in plan.moves)


@fewer
@given(estates(), st.integers(1, 3), st.integers(1, 4))
def test_no_host_and_no_network_runs_more_moves_at_once_than_it_has_slots(
    estate: Estate, per_host: int, per_network: int
) -> None:
    slots = Slots(per_host=per_host, per_network=per_network)
    plan = plan_drain(estate, list(host_ids(estate))[:2], Terms(slots=slots))
    for step in plan.moves:
        together = [other for other in plan.moves if other.starts_s <= step.starts_s < other.ends_s]
        assert len(together) <= per_network
        for host_id in (step.host_id, step.target_host_id):
            assert sum(1 for other in together if host_id in (other.host_id, other.target_host_id)) <= per_host


@fewer
@given(estates(), st.data())
def test_the_proof_kept_along_changes_equals_the_proof_from_scratch(estate: Estate, drawn: st.DataObject) -> None:
    kinds = ["host", "rack", "zone", "pool"]
    proof = FailoverProof(estate, domains_of(estate, kinds))
    for _ in range(drawn.draw(st.integers(1, 4))):
        estate = drawn.draw(changed(estate))
        proof.update(estate, domains_of(estate, kinds))
        assert proof.results() == FailoverProof(estate, domains_of(estate, kinds)).results()


@st.composite
def changed(draw: st.DrawFn, estate: Estate) -> Estate:
    """Return the estate after one change: a vm came, moved, went, grew, stopped or changed its mind, or a host did."""
    known = list(estate.vms.values())
    hosts = list(host_ids(estate))
    host_id = draw(st.sampled_from(hosts))
    what = draw(st.sampled_from(["add", "move", "remove", "grow", "power", "protect", "host", "label", "host-gone"]))
    if what == "add":
        # A number that no vm of `estates` has: this one may come twice, and then it is changed.
        return estate.changed(vms=[draw(vms(200, len(hosts)))])
    if what == "host" or not known:
        return with_hosts(estate, {host_id: draw(st.sampled_from([{"is_cordoned": True}, {"is_cordoned": False}]))})
    if what == "label":
        return with_hosts(estate, {host_id: {"labels": {"zone": draw(st.sampled_from("12")), "rack": "2"}}})
    if what == "host-gone" and len(hosts) > 1:
        kept = [host for host in estate.fleet.hosts if host.host_id != host_id]
        fleet = FleetSnapshot.of(kept, estate.fleet.pools.values(), groups=estate.fleet.groups)
        return Estate.of(fleet, known)
    vm = draw(st.sampled_from(known))
    if what == "remove":
        return estate.changed(removed=[vm.vm_id])
    if what == "protect":
        return estate.changed(vms=[replace(vm, is_protected=not vm.is_protected)])
    if what == "grow":
        size = {"vcpus": draw(st.integers(1, 6)), "memory_mib": draw(st.sampled_from([1, 3, 6])) * 1024}
        return estate.changed(vms=[replace(vm, request=replace(vm.request, **size))])
    if what == "power":
        return estate.changed(vms=[replace(vm, power=draw(st.sampled_from(list(Power))))])
    return estate.changed(vms=[replace(vm, host_id=host_id)])


@fewer
@given(estates())
def test_what_is_told_of_each_vm_is_what_is_told_of_each_domain(estate: Estate) -> None:
    proof = FailoverProof(estate, domains_of(estate, ["host", "rack", "zone", "pool"]))
    told = proof.vms()
    for result in proof.results():
        stopped = [one for one in told if result.domain in one.domains]
        lost = {one.vm_id for one in stopped if result.domain in one.uncovered}
        unprotected = [one for one in stopped if one.coverage is Coverage.UNPROTECTED]
        assert lost == set(result.uncovered)
        assert (len(stopped) - len(lost) - len(unprotected), len(unprotected)) == (result.covered_count, result.unprotected_count)
    for one in told:
        assert (one.coverage is Coverage.UNCOVERED) == bool(one.uncovered)
        assert (one.coverage is Coverage.UNPROTECTED) == (not estate.vms[one.vm_id].is_protected)


@fewer
@given(estates())
def test_the_vms_that_the_proof_calls_covered_really_fit_on_the_survivors(estate: Estate) -> None:
    """A host whose vms are all covered: each alone has a place by the scheduler; and one that is uncovered alone has none."""
    for result in FailoverProof(estate, domains_of(estate, ["host"])).results():
        (host_id,) = result.domain.host_ids
        victims = [vm for vm in estate.on(host_id) if vm.is_protected and vm.power is not Power.STOPPED]
        assert result.covered_count + len(result.uncovered) == len(victims)
        # Members of one group that are lost together are restarted together.
        survivors = estate.changed(removed=[vm.vm_id for vm in victims]).fleet
        for vm in victims:
            fits = explain(survivors, replace(vm.restart_request(), excluded_host_ids=(host_id,))).chosen_host_id is not None
            if vm.vm_id not in result.uncovered or len(victims) == 1:
                assert fits == (vm.vm_id not in result.uncovered)


@fewer
@given(estates(), st.integers(1, 4), st.integers(1, 4))
def test_as_many_fit_as_the_scheduler_can_place_and_not_one_more(estate: Estate, vcpus: int, memory_gib: int) -> None:
    request = PlacementRequest(
        request_id="op-new",
        vm_id="vm-new",
        vm_name="new",
        project_id="proj-a",
        kind=PlacementKind.CREATE,
        vcpus=vcpus,
        memory_mib=memory_gib * 1024,
    )
    books, placed = Books(estate.fleet), 0
    while (chosen := decide(books, request, policy=BEST_FIT).chosen_host_id) is not None:
        books.claim(request, chosen)
        placed += 1
    assert fit(estate, request).count == placed


@fewer
@given(estates())
def test_vms_at_rest_do_not_move_and_a_spent_budget_moves_nothing(estate: Estate) -> None:
    resting = History(moved_ago_s=dict.fromkeys(estate.vms, 60.0))
    assert plan_rebalance(estate, EAGER, TERMS, history=resting).steps == ()


@pytest.mark.parametrize("kind", [StepKind.MIGRATE, StepKind.RESTART])
def test_request_of_a_step_names_its_kind(kind: StepKind) -> None:
    request = PlacementRequest(
        request_id="plan-1", vm_id="vm-1", vm_name="a", project_id="p", kind=PlacementKind.MIGRATE, vcpus=1, memory_mib=1024
    )
    vm = VmSnapshot(vm_id="vm-1", name="a", host_id="host-1", request=request)
    assert request_for(vm, kind).kind is (PlacementKind.MIGRATE if kind is StepKind.MIGRATE else PlacementKind.START)


@fewer
@given(estates(), st.data())
def test_what_admission_accepts_leaves_everything_as_well_covered_as_it_was(estate: Estate, drawn: st.DataObject) -> None:
    gate, known = Admission(estate), estate
    for number in range(drawn.draw(st.integers(1, 4))):
        vm = drawn.draw(vms(100 + number, len(known.fleet)))
        row = known.fleet.row_of.get(vm.host_id)
        if row is None or not Books(known.fleet).free["vcpus"][row] >= vm.request.vcpus:
            continue
        before = FailoverProof(known, domains_of(known, ["host"])).uncovered()
        after = known.changed(vms=[vm])
        proven = FailoverProof(after, domains_of(after, ["host"])).uncovered()
        is_worse = any(set(keys) - set(before.get(vm_id, ())) for vm_id, keys in proven.items())
        objection = gate.add(vm)
        assert (objection is not None) == is_worse
        if objection is None:
            known = after
        else:
            assert objection.vm_ids
            assert set(objection.vm_ids) <= set(proven)


@fewer
@given(estates(), st.data())
def test_vms_that_are_asked_about_together_leave_everything_as_well_covered_as_it_was(
    estate: Estate, drawn: st.DataObject
) -> None:
    books, asked = Books(estate.fleet), []
    for number in range(drawn.draw(st.integers(1, 6))):
        vm = drawn.draw(vms(100 + number, len(estate.fleet)))
        if vm.host_id in estate.fleet.row_of and books.available("vcpus", estate.fleet.row_of[vm.host_id]) >= vm.request.vcpus:
            asked.append(vm)
    gate = Admission(estate)
    objections = gate.add_all(asked)
    before = FailoverProof(estate, domains_of(estate, ["host"])).uncovered()
    after = estate.changed(vms=[vm for vm in asked if vm.vm_id not in objections])
    proven = FailoverProof(after, domains_of(after, ["host"])).uncovered()
    assert not any(set(keys) - set(before.get(vm_id, ())) for vm_id, keys in proven.items())
    # What was refused is refused again as things are now: nothing was refused for a vm that was not accepted itself.
    for vm in asked:
        if vm.vm_id in objections:
            again = estate.changed(vms=[one for one in asked if one.vm_id not in objections or one.vm_id == vm.vm_id])
            gate.follow(estate.changed(vms=[one for one in asked if one.vm_id not in objections]))
            is_worse = gate.add(vm) is not None
            proven_again = FailoverProof(again, domains_of(again, ["host"])).uncovered()
            assert is_worse == any(set(keys) - set(proven.get(vm_id, ())) for vm_id, keys in proven_again.items())
