"""What holds for every fleet and every batch of requests."""

from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.placement import (
    POLICIES,
    Books,
    CellSnapshot,
    Decision,
    DiskNeed,
    FleetSnapshot,
    GroupNeed,
    GroupRule,
    GroupSnapshot,
    HostSnapshot,
    NetworkNeed,
    NetworkReach,
    PlacementKind,
    PlacementRequest,
    PoolPlace,
    PoolSnapshot,
    Relation,
    Stock,
    Taint,
    TaintEffect,
    Toleration,
    explain,
    explain_host,
    in_fair_order,
    place,
)
from trimtab_controller.core.placement.books import Trial
from trimtab_controller.core.placement.filters import FILTERS
from trimtab_controller.core.placement.fleet import ALL
from trimtab_protos.messages import Firmware

# A busy machine is not a failed property.

Fleet = tuple[list[HostSnapshot], list[PoolSnapshot]]

LOCAL, SHARED, NETWORK = "pool-local", "pool-shared", "net-1"


def cell(number: int, *, cpus: int, pages: int) -> CellSnapshot:
    return CellSnapshot(cell=number, cpus_limit=cpus, pages={2048: Stock(pages), 1024: Stock(pages)})


# Most hosts lack little and most requests ask little, or nothing would ever be placed and every property would hold idly.
DEFECTS: list[dict[str, Any]] = [
    {"labels": {"zone": "2"}},
    {"labels": {}},
    {"host_class": "gold", "class_machine": "q9"},
    {"class_cpu_model": "C"},
    {"is_cordoned": True},
    {"connectivity": HostConnectivity.LOST},
    {"arch": "aarch64"},
    {"accelerator": "tcg"},
    {"qemu_series": (7, 0)},
    {"qemu_series": ()},
    {"usable_cpu_models": frozenset({"B"})},
    {"cpu_features": frozenset()},
    {"machines": frozenset({"q2"})},
    {"has_uefi": False},
    {"capabilities": frozenset()},
    {"pools": {LOCAL: False, SHARED: True}},
    {"pools": {LOCAL: True}},
    {"networks": {}},
    {"networks": {NETWORK: NetworkReach(False, 1500)}},
    {"networks": {NETWORK: NetworkReach(True, 1000)}},
    {"image_ids": frozenset()},
    {"unmanaged_vcpus": 3, "unmanaged_memory_mib": 2},
    {"taints": frozenset({Taint("gpu", "a100"), Taint("old", effect=TaintEffect.AVOID)})},
    {"taints": frozenset({Taint("gpu", effect=TaintEffect.AVOID)})},
    {"can_be_proven_off": False},
    {"exclusive_project_id": "proj-a"},
    {"devices": {"gpu": Stock(2), "nic": Stock(1, 1)}, "resources": {"licence": Stock(3, 1)}},
    {"cells": (cell(0, cpus=2, pages=2), cell(1, cpus=4, pages=1))},
    {"cells": (cell(0, cpus=3, pages=8), cell(1, cpus=3, pages=8)), "devices": {"gpu": Stock(1)}},
]
WISHES: list[dict[str, Any]] = [
    {"kind": PlacementKind.START},
    {"kind": PlacementKind.MIGRATE, "excluded_host_ids": ("host-0",), "accelerator": "kvm"},
    {"excluded_host_ids": ("host-gone", "host-1")},
    {"arch": "x86_64"},
    {"cpu_model": "A"},
    {"cpu_model": "B"},
    {"cpu_features": ("x",)},
    {"cpu_features": ("-x", "?y")},
    {"cpu_features": ("x", "-y", "?x", "z")},
    {"machine": "q1"},
    {"qemu_series": (7, 2)},
    {"firmware": Firmware.UEFI},
    {"capabilities": ("tpm",)},
    {"host_selector": {"zone": "1"}},
    {"host_selector": {"zone": "1", "rack": "2"}},
    {"host_class": "gold"},
    {"required_host_id": "host-1"},
    {"required_host_id": "host-gone"},
    {"preferred_host_id": "host-2"},
    {"preferred_host_id": "host-gone"},
    {"image_ids": ("img-1", "img-2")},
    {"tolerations": (Toleration("gpu"),)},
    {"tolerations": (Toleration("gpu", "a100"), Toleration("old"))},
    {"restarts_elsewhere": True},
    {"devices": {"gpu": 1}},
    {"devices": {"gpu": 2, "nic": 1}},
    {"resources": {"licence": 2}},
    {"is_dedicated": True, "vcpus": 2},
    {"is_dedicated": True, "vcpus": 2, "page_kib": 2048, "memory_mib": 4, "cell_count": 2},
    {"page_kib": 1024, "memory_mib": 4},
    {"group": GroupNeed(group_id="grp-1", name="g", rules=(GroupRule(relation=Relation.APART),))},
    {"group": GroupNeed(group_id="grp-1", name="g", rules=(GroupRule(relation=Relation.APART, domain="rack", limit=2),))},
    {"group": GroupNeed(group_id="grp-2", name="h", rules=(GroupRule(relation=Relation.TOGETHER, domain="zone"),))},
    {"group": GroupNeed(group_id="grp-2", name="h", rules=(GroupRule(relation=Relation.TOGETHER, is_must=False),))},
    {"group": GroupNeed(group_id="grp-1", name="g", rules=(GroupRule(relation=Relation.APART, is_must=False, domain="rack"),))},
]


def changes(of: list[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Return up to two of these, one upon the other; often none."""
    merged = st.lists(st.sampled_from(of), max_size=2).map(lambda drawn: {k: v for one in drawn for k, v in one.items()})
    return st.one_of(st.just({}), merged)


@st.composite
def hosts(draw: st.DrawFn, number: int) -> HostSnapshot:
    vcpus_limit, memory_limit_mib = draw(st.integers(0, 12)), draw(st.integers(4, 12))
    capable = HostSnapshot(
        host_id=f"host-{number}",
        name=draw(st.sampled_from("abc")) + str(number % 4),  # names may clash: the id decides then
        vcpus_limit=vcpus_limit,
        memory_limit_mib=memory_limit_mib,
        vcpus_claimed=draw(st.integers(0, vcpus_limit)),
        memory_claimed_mib=draw(st.integers(0, memory_limit_mib)),
        labels={"zone": "1", "rack": draw(st.sampled_from("12"))},
        host_class="default",
        class_cpu_model="A",
        class_machine="q1",
        arch="x86_64",
        accelerator="kvm",
        usable_cpu_models=frozenset({"A", "B"}),
        cpu_features=frozenset({"x"}),
        machines=frozenset({"q1", "q2"}),
        qemu_series=(7, 2),
        has_uefi=True,
        capabilities=frozenset({"tpm"}),
        pools={LOCAL: True, SHARED: True},
        networks={NETWORK: NetworkReach(True, draw(st.sampled_from([0, 1500])))},
        image_ids=draw(st.sampled_from([frozenset({"img-1"}), frozenset({"img-1", "img-2"})])),
    )
    return replace(capable, **draw(changes(DEFECTS)))


@st.composite
def places(draw: st.DrawFn) -> PoolPlace:
    capacity = draw(st.sampled_from([0, 10, 20, 20, 40]))
    return PoolPlace(capacity, draw(st.integers(capacity // 2, capacity)), draw(st.integers(0, capacity // 2)))


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    members = [draw(hosts(number)) for number in range(draw(st.integers(0, 6)))]
    local = {host.host_id: draw(places()) for host in members if draw(st.integers(0, 4))}
    shared = {"": draw(places())}
    proven = draw(st.integers(0, 4)) > 0
    reserve_permille = draw(st.sampled_from([0, 100]))
    pools = [
        PoolSnapshot(pool_id=LOCAL, name="local", is_shared=False, places=local, reserve_permille=reserve_permille),
        PoolSnapshot(pool_id=SHARED, name="shared", is_shared=True, is_sharing_proven=proven, places=shared),
    ]
    return members, pools


disks = st.builds(
    DiskNeed,
    name=st.just("disk"),
    pool_id=st.sampled_from([LOCAL, SHARED, LOCAL, SHARED, LOCAL, SHARED, "pool-gone"]),
    size_bytes=st.integers(0, 4),
    host_id=st.sampled_from(["", "", "", "host-0", "host-1", "host-gone"]),
    is_claimed=st.booleans(),
)
networks = st.builds(NetworkNeed, network_id=st.just(NETWORK), name=st.just("n"))


@st.composite
def requests(draw: st.DrawFn, number: int) -> PlacementRequest:
    plain = PlacementRequest(
        request_id=f"op-{number}",
        vm_id=f"vm-{number}",
        vm_name=f"vm{number}",
        project_id=draw(st.sampled_from(["proj-a", "proj-b"])),
        kind=PlacementKind.CREATE,
        vcpus=draw(st.integers(0, 4)),
        memory_mib=draw(st.integers(1, 4)),
        disks=tuple(draw(st.lists(disks, max_size=2))),
        networks=tuple(draw(st.lists(networks, max_size=1))),
        priority=draw(st.integers(0, 2)),
        order=draw(st.integers(0, 3)),
    )
    return replace(plain, **draw(changes(WISHES)))


@st.composite
def batches(draw: st.DrawFn) -> list[PlacementRequest]:
    return [draw(requests(number)) for number in range(draw(st.integers(1, 8)))]


def policy_of(request: PlacementRequest) -> Any:
    """Return another policy for other requests, so that every policy meets every rule."""
    return list(POLICIES.values())[(4 * request.priority + request.order) % len(POLICIES)]


class SeparateBooks:
    """Adds up what was decided without using anything of `books.py`."""

    def __init__(self, members: list[HostSnapshot], pools: list[PoolSnapshot]) -> None:
        self.hosts = {host.host_id: host for host in members}
        self.pools = {pool.pool_id: pool for pool in pools}
        self.vcpus: Counter[str] = Counter()
        self.memory_mib: Counter[str] = Counter()
        self.space: defaultdict[tuple[str, str], int] = defaultdict(int)
        self.devices: Counter[tuple[str, str]] = Counter()
        self.resources: Counter[tuple[str, str]] = Counter()
        self.cell_cpus: Counter[tuple[str, int]] = Counter()
        self.cell_pages: Counter[tuple[str, int, int]] = Counter()
        self.groups: defaultdict[str, dict[str, str]] = defaultdict(dict)

    def book(self, decision: Decision) -> None:
        request, host_id = decision.request, decision.chosen_host_id
        assert host_id is not None
        self.vcpus[host_id] += 0 if request.is_dedicated else request.vcpus
        self.memory_mib[host_id] += 0 if request.page_kib else request.memory_mib
        for disk in request.disks:
            is_shared = self.pools[disk.pool_id].is_shared
            is_copied = request.kind is PlacementKind.MIGRATE and disk.host_id != "" and not is_shared
            if is_copied or not disk.is_claimed:
                self.space[disk.pool_id, "" if is_shared else host_id] += disk.size_bytes
        for kind, count in request.devices.items():
            self.devices[host_id, kind] += count
        for name, amount in request.resources.items():
            self.resources[host_id, name] += amount
        if request.is_dedicated or request.page_kib:
            assert len(decision.cells) == len(set(decision.cells)) == request.cell_count
        for number in decision.cells:
            self.cell_cpus[host_id, number] += request.vcpus // request.cell_count if request.is_dedicated else 0
            if request.page_kib:
                pages = request.memory_mib * 1024 // request.page_kib
                self.cell_pages[host_id, number, request.page_kib] += pages // request.cell_count
        if request.group is not None:
            self.groups[request.group.group_id][request.vm_id] = host_id

    def check(self) -> None:
        for (pool_id, host_id), size_bytes in self.space.items():
            pool = self.pools[pool_id]
            claimed_bytes = pool.places[host_id].claimed_bytes if host_id in pool.places else 0
            assert size_bytes == 0 or claimed_bytes + size_bytes <= pool.claim_limit_bytes(host_id)
        for host in self.applied()[0]:
            touched = self.vcpus[host.host_id] or self.memory_mib[host.host_id]
            assert not touched or host.vcpus_claimed + host.unmanaged_vcpus <= host.vcpus_limit or not self.vcpus[host.host_id]
            memory_mib = host.memory_claimed_mib + host.unmanaged_memory_mib
            assert memory_mib <= host.memory_limit_mib or not self.memory_mib[host.host_id]
            stocks = [*host.devices.values(), *host.resources.values(), *(one for c in host.cells for one in c.pages.values())]
            assert all(stock.claimed <= stock.limit for stock in stocks)
            assert all(c.cpus_claimed <= c.cpus_limit for c in host.cells)
        for (host_id, kind), count in self.devices.items():
            assert count == 0 or kind in self.hosts[host_id].devices
        for (host_id, name), count in self.resources.items():
            assert count == 0 or name in self.hosts[host_id].resources

    def applied(self) -> Fleet:
        """Return the fleet as the database would give it after these claims."""
        members = [
            replace(
                host,
                vcpus_claimed=host.vcpus_claimed + self.vcpus[host.host_id],
                memory_claimed_mib=host.memory_claimed_mib + self.memory_mib[host.host_id],
                devices={
                    kind: Stock(stock.limit, stock.claimed + self.devices[host.host_id, kind])
                    for kind, stock in host.devices.items()
                },
                resources={
                    name: Stock(stock.limit, stock.claimed + self.resources[host.host_id, name])
                    for name, stock in host.resources.items()
                },
                cells=tuple(
                    replace(
                        own,
                        cpus_claimed=own.cpus_claimed + self.cell_cpus[host.host_id, own.cell],
                        pages={
                            kib: Stock(stock.limit, stock.claimed + self.cell_pages[host.host_id, own.cell, kib])
                            for kib, stock in own.pages.items()
                        },
                    )
                    for own in host.cells
                ),
            )
            for host in self.hosts.values()
        ]
        pools = [
            replace(
                pool,
                places={
                    host_id: PoolPlace(
                        space.capacity_bytes,
                        # As if the volume's file were written in full at once: the books count it so.
                        space.available_bytes - self.space[pool.pool_id, host_id],
                        space.claimed_bytes + self.space[pool.pool_id, host_id],
                    )
                    for host_id, space in pool.places.items()
                },
            )
            for pool in self.pools.values()
        ]
        return members, pools

    def snapshot(self) -> FleetSnapshot:
        groups = [GroupSnapshot(group_id=group_id, members=members) for group_id, members in self.groups.items()]
        return FleetSnapshot.of(*self.applied(), groups=groups)

    def domain(self, host_id: str, label: str) -> str | None:
        return host_id if label == "host" else self.hosts[host_id].labels.get(label)

    def check_rules(self, decision: Decision) -> None:
        """Hold the choice against every rule that must not be broken, with the members as they were before it."""
        request, host_id = decision.request, decision.chosen_host_id
        assert host_id is not None
        host = self.hosts[host_id]
        assert host.connectivity is HostConnectivity.UP
        assert not host.is_cordoned
        assert host.exclusive_project_id in ("", request.project_id)
        assert request.host_selector.items() <= host.labels.items()
        for taint in host.taints:
            tolerated = [one for one in request.tolerations if one.key == taint.key and one.value in ("", taint.value)]
            assert tolerated or taint.effect is TaintEffect.AVOID
        for rule in request.group.rules if request.group else ():
            own = self.domain(host_id, rule.domain)
            others = [
                self.domain(at, rule.domain) for vm, at in self.groups[request.group.group_id].items() if vm != request.vm_id
            ]
            if not rule.is_must:
                continue
            assert own is not None
            assert others.count(own) < rule.limit or rule.relation is Relation.TOGETHER
            assert own in others or not others or rule.relation is Relation.APART


@given(fleets(), batches())
def test_nothing_is_ever_overcommitted_and_no_rule_broken(fleet: Fleet, batch: list[PlacementRequest]) -> None:
    books = SeparateBooks(*fleet)
    for decision in place(FleetSnapshot.of(*fleet), batch, policy_of=policy_of):
        if decision.chosen_host_id is not None:
            books.check_rules(decision)
            books.book(decision)
    books.check()


@given(fleets(), requests(0))
def test_every_host_is_named_and_either_scored_or_refused_with_a_reason(fleet: Fleet, request: PlacementRequest) -> None:
    decision = explain(FleetSnapshot.of(*fleet), request)
    assert sorted(verdict.host_id for verdict in decision.verdicts) == sorted(host.host_id for host in fleet[0])
    for verdict in decision.verdicts:
        assert (verdict.score is not None and 0 <= verdict.score <= 1) == (verdict.refusals == ())
    assert len(decision.fitting) == decision.fit_count
    if decision.chosen is not None:
        assert decision.chosen.refusals == ()
        assert decision.chosen.score == max(decision.fitting.totals)
    else:
        assert decision.fit_count == 0


@given(fleets(), requests(0))
def test_each_filter_masks_out_exactly_the_hosts_that_it_has_a_reason_against(fleet: Fleet, request: PlacementRequest) -> None:
    snapshot = FleetSnapshot.of(*fleet)
    trial = Trial.of(Books(snapshot), request)
    counted = explain(snapshot, request).refused_by
    for each in FILTERS:
        mask = each.fitting(trial, ALL)
        refusals = [each.refusals(trial, row) for row in range(len(snapshot))]
        assert [not reasons for reasons in refusals] == ([True] * len(snapshot) if mask is None else mask.tolist())
        assert {reason.filter for reasons in refusals for reason in reasons} <= {each.name}
        assert counted.get(each.name, 0) == sum(1 for reasons in refusals if reasons)


@given(fleets(), batches(), st.randoms(use_true_random=False))
def test_decisions_do_not_depend_on_the_order_of_hosts_pools_or_requests(
    fleet: Fleet, batch: list[PlacementRequest], rng: Any
) -> None:
    members, pools = fleet
    expected = place(FleetSnapshot.of(members, pools), batch, policy_of=policy_of)
    shuffled = [rng.sample(each, len(each)) for each in (members, pools, batch)]
    assert place(FleetSnapshot.of(shuffled[0], shuffled[1]), shuffled[2], policy_of=policy_of) == expected


@given(fleets(), batches())
def test_a_batch_decides_as_if_each_claim_had_been_stored_before_the_next_decision(
    fleet: Fleet, batch: list[PlacementRequest]
) -> None:
    decisions = place(FleetSnapshot.of(*fleet), batch, policy_of=policy_of)
    books = SeparateBooks(*fleet)
    for request, decision in zip(in_fair_order(batch), decisions, strict=True):
        alone = explain(books.snapshot(), request, policy=policy_of(request))
        assert (alone.fitting, alone.refused_by, alone.cells) == (decision.fitting, decision.refused_by, decision.cells)
        assert [verdict.host_id for verdict in alone.refused] == [verdict.host_id for verdict in decision.refused]
        if decision.chosen_host_id is not None:
            books.book(decision)


@given(fleets(), requests(0))
def test_one_host_asked_alone_gets_the_verdict_that_the_decision_lists(fleet: Fleet, request: PlacementRequest) -> None:
    snapshot = FleetSnapshot.of(*fleet)
    for verdict in explain(snapshot, request).verdicts:
        assert explain_host(snapshot, request, verdict.host_id) == verdict


@given(fleets(), requests(0))
def test_a_large_fleets_short_answer_agrees_with_the_complete_one(fleet: Fleet, request: PlacementRequest) -> None:
    snapshot = FleetSnapshot.of(*fleet)
    complete, short = explain(snapshot, request), explain(snapshot, request, listed_hosts=-1)
    assert (short.chosen, short.fit_count, short.refused_by) == (complete.chosen, complete.fit_count, complete.refused_by)
    assert short.fitting == complete.fitting
    assert short.refused == (() if complete.fitting else complete.refused)


@given(fleets(), batches())
def test_releasing_what_was_claimed_restores_the_books(fleet: Fleet, batch: list[PlacementRequest]) -> None:
    snapshot = FleetSnapshot.of(*fleet)
    books = Books(snapshot)
    placed = []
    for request in batch:
        chosen = explain(snapshot, request).chosen_host_id
        if chosen is not None and explain_fits(books, request, chosen):
            books.claim(request, chosen)
            placed.append((request, chosen))
    for request, host_id in placed:
        books.release(request, host_id)
    for resource, column in snapshot.free.items():
        assert books.free[resource].tolist() == column.tolist()
    assert books.shared_free_bytes == snapshot.shared_free_bytes


def explain_fits(books: Books, request: PlacementRequest, host_id: str) -> bool:
    trial, row = Trial.of(books, request), books.fleet.row_of[host_id]
    return not any(each.refusals(trial, row) for each in FILTERS)


@given(fleets(), requests(0))
def test_every_decision_survives_its_stored_form(fleet: Fleet, request: PlacementRequest) -> None:
    decision = explain(FleetSnapshot.of(*fleet), request)
    assert Decision.from_json(decision.as_json()) == decision
