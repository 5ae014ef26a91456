"""The leader's planning: usage rolled up, the failover proof as metrics, rebalancing by itself."""

from prometheus_client import REGISTRY

from tests.operations.invariants import audit_invariants
from tests.operations.kit import FleetStory
from tests.operations.test_plans import apply, guests_on_one_host, make, remember_use
from tests.operations.test_vm_groups import group
from trimtab_controller.core.model import Actor
from trimtab_controller.core.placement.needs import GroupRule, Relation
from trimtab_controller.core.planning import Estate
from trimtab_controller.core.planning.plan import PlanKind
from trimtab_controller.core.planning.rebalance import RebalanceMode
from trimtab_controller.loops.rebalance import Rebalance
from trimtab_controller.loops.survival import Survival
from trimtab_controller.loops.usage import Usage
from trimtab_controller.operations.estates import BUCKET_S, read_estate
from trimtab_controller.services import plans
from trimtab_controller.services.plans import PlanWish
from trimtab_controller.store import hosts, schema
from trimtab_protos.messages import DomainObservation, DomainState


def rebalance(story: FleetStory, mode: RebalanceMode) -> Rebalance:
    return Rebalance(db=story.db, clock=story.clock, nudger=story.nudger, mode=mode)


def plan_states(story: FleetStory) -> list[str]:
    table = schema.plan
    return story.db.read(lambda session: list(session.scalars(table.select().with_only_columns(table.c.state))))


def test_cpu_time_becomes_the_predicted_load_of_the_vm(story: FleetStory) -> None:
    (vm,) = guests_on_one_host(story, 1)
    usage = Usage(db=story.db, clock=story.clock)
    for look in range(1, 2 * BUCKET_S // 30):
        at = story.clock.now()
        usage.note([DomainObservation(vm_id=vm.id, cpu_time_ns=look * 45 * 10**9)], host_id=vm.host_id, at=at)
        story.clock.advance(30)
    usage.flush(story.term)
    estate = story.db.read(lambda session: read_estate(session, now=story.clock.now()))
    assert estate.vms[vm.id].load_millis == 1500, "45 s of CPU in 30 s are one and a half cores"


def test_a_guest_that_starts_anew_does_not_count_as_if_it_had_run_backwards(story: FleetStory) -> None:
    usage = Usage(db=story.db, clock=story.clock)
    for cpu_time_ns in (10**12, 10**9, 2 * 10**9):
        usage.note([DomainObservation(vm_id="vm-1", cpu_time_ns=cpu_time_ns)], host_id="host-1", at=story.clock.now())
        story.clock.advance(10)
    story.clock.advance(BUCKET_S)
    usage.flush(story.term)
    table = schema.usage_rollup
    query = table.select().with_only_columns(table.c.mean).where(table.c.subject_id == "vm-1")
    (mean,) = story.db.read(lambda session: list(session.scalars(query)))
    assert mean == 100.0


def heard(at_ms: float, **load: int) -> dict[str, object]:
    return {"at_ms": at_ms, "load": load}


def test_a_host_that_is_short_of_processors_has_vms_that_want_more_than_they_use(story: FleetStory) -> None:
    (vm,) = guests_on_one_host(story, 1)
    remember_use(story, {vm.id: 1000.0})
    usage = Usage(db=story.db, clock=story.clock)

    def estate_millis() -> int:
        return story.db.read(lambda session: read_estate(session, now=story.clock.now())).vms[vm.id].load_millis

    assert estate_millis() == 1000
    for _ in range(3):
        at_ms = story.clock.now().timestamp() * 1000
        usage.note_hosts({vm.host_id: heard(at_ms, cpu_used_permille=900, cpu_steal_permille=100)})
        story.clock.advance(30)
    story.clock.advance(BUCKET_S)
    usage.flush(story.term)
    cpus = story.db.read(lambda session: hosts.get(session, vm.host_id)).inventory.cpus  # type: ignore[union-attr]
    assert estate_millis() == 1000 + cpus * 100, "a tenth of the host's processors was waited for"


def test_a_host_says_how_long_tasks_waited_for_memory_and_what_is_available(story: FleetStory) -> None:
    usage = Usage(db=story.db, clock=story.clock)
    first, second, _third = story.host_ids
    for _ in range(3):
        at_ms = story.clock.now().timestamp() * 1000
        usage.note_hosts(
            {
                first: heard(at_ms, memory_pressure=2500, memory_available_mib=100),
                second: heard(at_ms, memory_available_mib=10_000_000),
            }
        )
        story.clock.advance(30)
    story.clock.advance(BUCKET_S)
    usage.flush(story.term)
    estate = story.db.read(lambda session: read_estate(session, now=story.clock.now()))
    free_mib = estate.fleet.free["memory_mib"].item(estate.fleet.row_of[first])
    assert (estate.use[first].memory_pressure, estate.use[first].memory_withheld_mib) == (0.25, free_mib - 100)
    assert (estate.use[second].memory_pressure, estate.use[second].memory_withheld_mib) == (0.0, 0)


def test_what_guests_really_hold_of_their_host_goes_with_them_and_the_rest_stays_where_it_was(story: FleetStory) -> None:
    vm, other = guests_on_one_host(story, 2)
    home, usage = vm.host_id, Usage(db=story.db, clock=story.clock)
    memory_mib = story.db.read(lambda session: hosts.get(session, home)).inventory.memory_mib  # type: ignore[union-attr]
    for held_mib in (200, 400):
        seen = [DomainObservation(vm_id=vm.id, rss_mib=held_mib), DomainObservation(vm_id=other.id, rss_mib=100)]
        stranger = DomainObservation(vm_id="", name="a stranger's", rss_mib=5000)
        usage.note([*seen, stranger], host_id=home, at=story.clock.now())
        at_ms = story.clock.now().timestamp() * 1000
        available_mib = memory_mib - held_mib - 100 - 6000
        usage.note_hosts({home: heard(at_ms, memory_available_mib=available_mib)})
        story.clock.advance(30)
    story.clock.advance(BUCKET_S)
    usage.flush(story.term)

    def estate() -> Estate:
        return story.db.read(lambda session: read_estate(session, now=story.clock.now()))

    assert (estate().vms[vm.id].used_mib, estate().vms[other.id].used_mib) == (300, 100)
    own = estate().use[home]
    assert (own.memory_mib, own.memory_others_mib) == (memory_mib, 6000)
    story.accept_power(vm, "migrate")
    story.settle()
    assert estate().vms[vm.id].host_id != home
    assert estate().use[home].memory_others_mib == 6000, "what the rollups say of its past counts no vm that has left"


def test_nothing_is_known_of_a_hosts_memory_whose_agent_does_not_say_what_its_guests_hold(story: FleetStory) -> None:
    (vm,) = guests_on_one_host(story, 1)
    usage = Usage(db=story.db, clock=story.clock)
    silent = DomainObservation(vm_id=vm.id, state=DomainState.RUNNING, cpu_time_ns=1)
    usage.note([silent], host_id=vm.host_id, at=story.clock.now())
    usage.note_hosts({vm.host_id: heard(story.clock.now().timestamp() * 1000, memory_available_mib=100)})
    story.clock.advance(BUCKET_S)
    usage.flush(story.term)
    estate = story.db.read(lambda session: read_estate(session, now=story.clock.now()))
    assert (estate.use[vm.host_id].memory_mib, estate.vms[vm.id].used_mib) == (0, 0)


def test_a_host_whose_memory_is_nearly_used_up_has_a_plan_that_says_so_and_none_after_it(story: FleetStory) -> None:
    guests = guests_on_one_host(story, 3)
    home, usage = guests[0].host_id, Usage(db=story.db, clock=story.clock)
    memory_mib = story.db.read(lambda session: hosts.get(session, home)).inventory.memory_mib  # type: ignore[union-attr]
    held_mib = round(memory_mib * 0.32)
    for host_id in story.host_ids:
        own = [DomainObservation(vm_id=vm.id, rss_mib=held_mib) for vm in guests if host_id == home]
        usage.note(own, host_id=host_id, at=story.clock.now())
        at_ms = story.clock.now().timestamp() * 1000
        usage.note_hosts({host_id: heard(at_ms, memory_available_mib=memory_mib - sum(one.rss_mib for one in own))})
    story.clock.advance(BUCKET_S)
    usage.flush(story.term)
    view = make(story, PlanKind.REBALANCE)
    (step,) = view.plan.moves
    assert step.why == f"memory: node1 is predicted to use 96% of it, {held_mib} MiB for this vm"
    assert view.plan.summary.startswith("rebalance: 1 move, predicted use of memory node1 96% to 64%, ")
    apply(story, view)
    story.settle()
    assert len({story.vm(vm.id).host_id for vm in guests}) == 2
    assert make(story, PlanKind.REBALANCE).plan.summary.startswith("no beneficial move")


def test_what_a_gateway_heard_long_ago_is_not_counted_as_now(story: FleetStory) -> None:
    usage = Usage(db=story.db, clock=story.clock)
    at_ms = story.clock.now().timestamp() * 1000
    story.clock.advance(120)
    usage.note_hosts({"host-1": heard(at_ms, cpu_used_permille=900)})
    story.clock.advance(BUCKET_S)
    usage.flush(story.term)
    assert story.db.read(lambda session: session.execute(schema.usage_rollup.select()).all()) == []


def test_the_rebalancer_is_off_advises_or_acts_as_it_was_told(story: FleetStory) -> None:
    guests = guests_on_one_host(story, 3)
    remember_use(story, {vm.id: 2500.0 for vm in guests})
    rebalance(story, RebalanceMode.OFF).run(story.term)
    assert plan_states(story) == []
    rebalance(story, RebalanceMode.ADVISE).run(story.term)
    rebalance(story, RebalanceMode.ADVISE).run(story.term)
    assert plan_states(story) == ["open"], "one plan at a time"
    story.settle()
    assert {story.vm(vm.id).host_id for vm in guests} == {story.host_ids[0]}
    story.db.write(lambda session: session.execute(schema.plan.delete()))
    acting = rebalance(story, RebalanceMode.AUTOMATIC)
    acting.run(story.term)
    story.settle()
    assert plan_states(story) == ["applied"]
    assert {story.vm(vm.id).host_id for vm in guests} == set(story.host_ids)
    acting.run(story.term)
    assert plan_states(story) == ["applied"], "the state that it left gives no second plan"
    assert audit_invariants(story) == []


def test_advice_that_nobody_took_in_time_or_that_was_outgrown_makes_room_for_the_next(story: FleetStory) -> None:
    def open_plans() -> dict[str, str]:
        table = schema.plan
        rows = story.db.read(lambda session: session.execute(table.select()).all())
        return {row.id: row.created_by for row in rows if row.state == "open"}

    guests = guests_on_one_host(story, 3)
    remember_use(story, {vm.id: 2500.0 for vm in guests})
    advising = rebalance(story, RebalanceMode.ADVISE)
    advising.run(story.term)
    first = open_plans()
    story.clock.advance(23 * 3600)
    advising.run(story.term)
    assert open_plans() == first, "it still stands"
    story.clock.advance(2 * 3600)
    remember_use(story, {vm.id: 2500.0 for vm in guests})
    advising.run(story.term)
    second = open_plans()
    assert len(second) == 1
    assert not second.keys() & first.keys(), "what is a day old was made anew"
    host = schema.host
    cordoned = host.update().where(host.c.id == story.host_ids[1]).values(is_cordoned=True, version=host.c.version + 1)
    story.db.write(lambda session: session.execute(cordoned))
    advising.run(story.term)
    third = open_plans()
    assert len(third) == 1
    assert not third.keys() & second.keys(), "one of its targets takes no vms any more"


def test_a_plan_that_somebody_made_is_not_replaced(story: FleetStory) -> None:
    guests = guests_on_one_host(story, 3)
    remember_use(story, {vm.id: 2500.0 for vm in guests})
    wish, owner = PlanWish(kind=PlanKind.REBALANCE), Actor(name="user:ada")
    story.db.write(lambda session: plans.create(session, wish, actor=owner, now=story.clock.now()))
    rebalance(story, RebalanceMode.ADVISE).run(story.term)
    assert plan_states(story) == ["open"], "one plan at a time"
    story.clock.advance(25 * 3600)
    rebalance(story, RebalanceMode.ADVISE).run(story.term)
    table = schema.plan
    rows = story.db.read(lambda session: session.execute(table.select()).all())
    assert [row.created_by for row in rows] == ["user:ada"]


def test_the_proof_is_kept_along_and_told_as_metrics(story: FleetStory) -> None:
    def uncovered() -> float | None:
        return REGISTRY.get_sample_value("trimtab_failover_uncovered_vms", {"kind": "host"})

    (vm,) = guests_on_one_host(story, 1)
    table = schema.vm
    story.db.write(lambda session: session.execute(table.update().where(table.c.id == vm.id).values(ha="restart")))
    loop = Survival(db=story.db, clock=story.clock)
    loop.run(story.term)
    assert uncovered() == 0
    hosts = schema.host
    others = hosts.update().where(hosts.c.id != story.host_ids[0])
    story.db.write(lambda session: session.execute(others.values(is_cordoned=True)))
    loop.run(story.term)
    assert uncovered() == 1
    assert REGISTRY.get_sample_value("trimtab_failover_domains", {"kind": "host", "covered": "false"}) == 1


def test_pools_and_the_labels_that_groups_name_are_failure_domains_of_the_metrics(story: FleetStory) -> None:
    def uncovered(kind: str) -> float | None:
        return REGISTRY.get_sample_value("trimtab_failover_uncovered_vms", {"kind": kind})

    story.db.write(lambda session: session.execute(schema.host.update().values(labels={"building": "b1"})))
    group(story, "db", GroupRule(relation=Relation.APART, domain="building", limit=9))
    story.running_vm("db1", group="db", ha="restart")
    loop = Survival(db=story.db, clock=story.clock)
    loop.run(story.term)
    assert uncovered("pool") == 1, "its disk is on that pool alone"
    assert uncovered("building") == 1, "every host is in the one building"
    assert uncovered("host") == 0
    findings = REGISTRY.get_sample_value("trimtab_doctor_findings", {"severity": "warning", "kind": "vm-uncovered"})
    assert findings is None, "a pool's loss is no finding: it would be one in every fleet"


def test_what_the_doctor_finds_is_a_metric_until_it_is_cured(story: FleetStory) -> None:
    def cordoned() -> float | None:
        return REGISTRY.get_sample_value("trimtab_doctor_findings", {"severity": "notice", "kind": "host-cordoned"})

    loop = Survival(db=story.db, clock=story.clock)
    for is_cordoned, found in ((True, len(story.host_ids)), (False, None)):
        values = {"is_cordoned": is_cordoned}
        story.db.write(lambda session, values=values: session.execute(schema.host.update().values(**values)))
        loop.run(story.term)
        assert cordoned() == found


def test_clocks_that_gateways_hear_are_in_the_doctors_metric(story: FleetStory) -> None:
    states = {story.host_ids[0]: {"skew_ms": 2500}}
    Survival(db=story.db, clock=story.clock, host_states=lambda: states).run(story.term)
    assert REGISTRY.get_sample_value("trimtab_doctor_findings", {"severity": "critical", "kind": "clock-skew"}) == 1
