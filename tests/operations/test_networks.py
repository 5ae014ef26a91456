"""A network on a VLAN that hosts cannot reach: refused where none can and nothing is left, avoided where some can."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest

from tests.operations.faults import Behaviour, Misbehaving, StepFault
from tests.operations.invariants import audit_invariants
from tests.operations.kit import FleetStory
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import Operation
from trimtab_controller.loops.upkeep import Upkeep
from trimtab_controller.services import networks as network_service
from trimtab_controller.services import pools as pool_service
from trimtab_controller.services.vm_nics import NicWish
from trimtab_controller.store import networks, reach, schema
from trimtab_protos.errors import Unavailable


def lose_vlans(story: FleetStory, host_ids: Collection[str]) -> None:
    """Let the kernels of these hosts make no VLAN devices."""
    for host_id in host_ids:
        hypervisor = story.hypervisor(host_id)
        hypervisor.host = replace(hypervisor.host, has_vlans=False)


def create(story: FleetStory, **changes: Any) -> Operation:
    wishes = {"name": "lan", "kind": "bridge", "bridge": "br0", "vlan": 20, "bridges": {}, **changes}
    spec = network_service.NetworkSpec(**wishes)
    _view, operation = story.db.write(
        lambda session: network_service.create(session, spec, project=story.project, actor=story.actor, now=story.clock.now())
    )
    story.settle()
    return story.operation(operation.id)


def states(story: FleetStory, network_id: str) -> dict[str, tuple[str, str]]:
    """Return what each host is said to make of the network: state and problem."""
    mapped = story.db.read(lambda session: networks.hosts_of(session, [network_id]))[network_id]
    return {one.host_id: (one.state, one.problem) for one in mapped}


def test_a_vlan_that_no_host_reaches_is_refused_with_each_hosts_reason_and_nothing_is_left(story: FleetStory) -> None:
    lose_vlans(story, story.host_ids)
    before = {host_id: set(story.hypervisor(host_id).networks) for host_id in story.host_ids}
    failed = create(story)
    assert failed.state is OperationState.FAILED
    assert failed.error is not None
    assert failed.error.code == "network-unusable"
    for number in (1, 2, 3):
        assert f"node{number}: this host makes no VLAN 20 on bridge br0" in failed.error.message
    assert story.db.read(lambda session: networks.find(session, story.project.id, "lan")) is None
    assert states(story, failed.subject_id) == {}
    assert {host_id: set(story.hypervisor(host_id).networks) for host_id in story.host_ids} == before
    assert audit_invariants(story) == []
    again = create(story, vlan=0)
    assert again.state is OperationState.DONE, "its name is free"


def test_a_vlan_that_some_hosts_reach_is_made_and_vms_go_there(story: FleetStory) -> None:
    first, *others = story.host_ids
    lose_vlans(story, others)
    made = create(story)
    assert made.state is OperationState.DONE, made.error
    found = states(story, made.subject_id)
    assert found[first] == ("ready", "")
    assert {found[host_id][0] for host_id in others} == {"failed"}
    assert all("makes no VLAN 20" in found[host_id][1] for host_id in others)
    for name in ("web1", "web2", "web3"):
        vm = story.running_vm(name, networks=(NicWish(network="lan"),))
        assert vm.host_id == first
    assert audit_invariants(story) == []


def set_connectivity(story: FleetStory, host_id: str, connectivity: str) -> None:
    host = schema.host
    story.db.write(lambda session: session.execute(host.update().where(host.c.id == host_id).values(connectivity=connectivity)))


def told_by_upkeep(story: FleetStory) -> None:
    """As the leader does each second."""
    Upkeep(db=story.db, clock=story.clock, nudger=story.nudger).prepare_hosts(story.term)
    story.settle()


class Silent:
    """The agents as the controller calls them, of which one does not answer what is asked by these verbs; by any where none are named."""

    def __init__(self, client: Any, host_id: str, *verbs: str) -> None:
        self._client, self._host_id, self._verbs = client, host_id, verbs

    def __getattr__(self, verb: str) -> Any:
        def call(host_id: str, *arguments: Any, **named: Any) -> Any:
            if host_id == self._host_id and (verb in self._verbs or not self._verbs):
                raise Unavailable("peer-unreachable", "it does not answer")
            return getattr(self._client, verb)(host_id, *arguments, **named)

        return call


@pytest.mark.parametrize("way", ["lost", "silent"])
def test_what_is_deleted_while_a_host_does_not_answer_goes_from_it_once_it_does(story: FleetStory, way: str) -> None:
    """A network and a pool: either would stand in the way of the next one with its subnet or its path."""
    network_id = create(story, kind="isolated", bridge="", vlan=0, subnet="10.20.0.0/24", has_dhcp=True).subject_id
    spec = pool_service.PoolSpec(name="more", kind="dir", path="/srv/more", is_shared=False, is_default=False)
    _view, making = story.db.write(lambda session: pool_service.create(session, spec, actor=story.actor, now=story.clock.now()))
    story.settle()
    hypervisors = {host_id: story.hypervisor(host_id) for host_id in story.host_ids}
    assert all(network_id in one.networks and making.subject_id in one.pools for one in hypervisors.values())

    third, engine = story.host_ids[2], story.new_engine()
    if way == "lost":
        set_connectivity(story, third, "lost")
    else:
        engine = replace(engine, agents=Silent(engine.agents, third))
    asked = {"actor": story.actor, "now": story.clock.now(), "expected_version": None}
    ended = [
        story.db.write(lambda session: network_service.delete(session, "lan", project=story.project, **asked)),
        story.db.write(lambda session: pool_service.delete(session, "more", **asked)),
    ]
    story.settle(engine)
    assert [story.operation(one.id).state for one in ended] == [OperationState.DONE] * 2
    there = [host_id for host_id, one in hypervisors.items() if network_id in one.networks or making.subject_id in one.pools]
    assert there == [third]

    set_connectivity(story, third, "up")
    told_by_upkeep(story)
    assert network_id not in hypervisors[third].networks
    assert making.subject_id not in hypervisors[third].pools
    assert states(story, network_id) == {}
    left = story.db.read(lambda session: (reach.deleted_networks(session, third), reach.deleted_pools(session, third)))
    assert left == ((), ()), "it is told once"
    assert audit_invariants(story) == []


def test_what_is_undone_while_a_host_does_not_answer_goes_from_it_once_it_does(story: FleetStory) -> None:
    """A network and a pool that were made on every host and failed afterwards; one host falls silent before it can be told."""
    third = story.host_ids[2]
    faults = [StepFault(kind, "finish", Behaviour.FAIL_BEFORE) for kind in ("network.create", "pool.create")]
    engine = story.new_engine(saga_of=Misbehaving(*faults))
    engine = replace(engine, agents=Silent(engine.agents, third, "remove_network", "remove_pool"))
    network = network_service.NetworkSpec(name="lan", kind="isolated", subnet="10.20.0.0/24", has_dhcp=True, bridges={})
    pool = pool_service.PoolSpec(name="more", kind="dir", path="/srv/more", is_shared=False, is_default=False)
    asked = {"actor": story.actor, "now": story.clock.now()}
    made = [
        story.db.write(lambda session: network_service.create(session, network, project=story.project, **asked))[1],
        story.db.write(lambda session: pool_service.create(session, pool, **asked))[1],
    ]
    story.settle(engine)
    network_id, pool_id = (one.subject_id for one in made)
    assert [story.operation(one.id).state for one in made] == [OperationState.FAILED] * 2
    hypervisors = {host_id: story.hypervisor(host_id) for host_id in story.host_ids}
    assert [host_id for host_id, one in hypervisors.items() if network_id in one.networks] == [third]
    assert [host_id for host_id, one in hypervisors.items() if pool_id in one.pools] == [third]

    told_by_upkeep(story)
    assert network_id not in hypervisors[third].networks
    assert pool_id not in hypervisors[third].pools
    assert states(story, network_id) == {}
    assert audit_invariants(story) == []
