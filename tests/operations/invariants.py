"""What must hold whenever nothing is under way (I4 to I8 of the safety argument), asked of SQL and of the simulated hosts.

`audit_invariants` returns every violation as a sentence, so that a test shows all of them at once.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

from tests.operations.kit import FleetStory
from trimtab_agent.hypervisor.simulated import ACTIVE
from trimtab_controller.core.lifecycle import ENDED_STATES, LIVE_STATES, OperationState
from trimtab_controller.store import schema
from trimtab_controller.store.database import Session
from trimtab_protos.messages import PoolSpec

_LIVE = tuple(state.value for state in LIVE_STATES)
_ENDED = tuple(state.value for state in ENDED_STATES - {OperationState.NEEDS_ATTENTION})
RUNNING_STATES = frozenset({"running", "paused", "stopping"})

Rows = list[Any]
_ROWS_OF = {table: sa.select(table) for table in schema.metadata.sorted_tables}
"""Built once: the store prepares a statement that it sees again, and an audit follows every operation of the matrices."""


class _Facts:
    """Every row that the audit looks at, as of one snapshot."""

    def __init__(self, session: Session) -> None:
        def rows(table: sa.Table) -> Rows:
            return list(session.execute(_ROWS_OF[table]).all())

        self.vms = {row.id: row for row in rows(schema.vm)}
        self.hosts = {row.id: row for row in rows(schema.host)}
        self.pools = {row.id: row for row in rows(schema.pool)}
        self.networks = {row.id: row for row in rows(schema.network)}
        self.images = {row.id: row for row in rows(schema.image)}
        self.volumes = {row.id: row for row in rows(schema.volume)}
        self.projects = rows(schema.project)
        self.claims = rows(schema.claim)
        self.disk_claims = rows(schema.disk_claim)
        self.spaces = rows(schema.pool_space)
        self.nics = rows(schema.nic)
        self.addresses = rows(schema.nic_address)
        self.replicas = rows(schema.image_replica)
        self.migrations = rows(schema.migration)
        self.requests = rows(schema.placement_request)
        self.operations = {row.id: row for row in rows(schema.operation)}
        self.journal = rows(schema.journal)
        self.slots = rows(schema.slot)
        self.events = rows(schema.event)
        self.pool_hosts = rows(schema.pool_host)
        self.layers = rows(schema.volume_layer)
        self.snapshots = rows(schema.snapshot)
        self.network_hosts = rows(schema.network_host)


def audit_invariants(story: FleetStory) -> list[str]:
    """Return what is wrong; operations that are still live or need attention excuse nothing but themselves (I4)."""
    facts = story.db.read(_Facts)
    checks = (_operations, _claims, _space, _moves, _quotas, _addresses, _migrations, _reach, _replicas)
    found = [violation for check in checks for violation in check(facts)]
    return [*found, *_domains(facts, story), *_files(facts, story), *_layers(facts, story), *_guests(story)]


# --- SQL against itself ------------------------------------------------------------------------------------------------------


def _operations(facts: _Facts) -> Iterator[str]:
    for row in facts.operations.values():
        if row.state in _LIVE or row.state == OperationState.NEEDS_ATTENTION.value:
            yield f"{row.kind} {row.id} has not ended: {row.state} at {row.step}, waiting for {row.waiting_for!r}, {row.error}"
        elif row.driver or row.ended_at is None:
            yield f"{row.kind} {row.id} is {row.state} and still has a driver or no end"
    ends = Counter(row.operation_id for row in facts.events if row.kind.removeprefix("operation.") in _ENDED and row.operation_id)
    for row in facts.operations.values():
        if row.state in _ENDED and ends[row.id] != 1:
            yield f"{row.kind} {row.id} ended with {ends[row.id]} events that say so"
    turns: dict[str, int] = defaultdict(int)
    for row in sorted(facts.journal, key=lambda row: (row.operation_id, row.position)):
        if row.turn < turns[row.operation_id]:
            yield f"{row.operation_id}: the turn fell at {row.step}"
        turns[row.operation_id] = row.turn
    for row in facts.slots:
        if facts.operations[row.operation_id].state in _ENDED:
            yield f"slot {row.host_id}/{row.kind} is held by an ended operation"
    for row in facts.requests:
        if row.state == "pending" and facts.operations[row.operation_id].state in _ENDED:
            yield f"a placement is still asked for by {row.operation_id}, which ended"


def _claims(facts: _Facts) -> Iterator[str]:
    vcpus: Counter[str] = Counter()
    memory: Counter[str] = Counter()
    for row in facts.claims:
        vcpus[row.host_id] += row.vcpus
        memory[row.host_id] += row.memory_mib
        vm = facts.vms[row.vm_id]
        if vm.deleted_at is not None:
            yield f"deleted vm {vm.name} holds a claim on {row.host_id}"
        elif vm.observed_state not in RUNNING_STATES and vm.desired_power == "stopped":
            yield f"vm {vm.name} is {vm.observed_state} and holds a claim on {row.host_id}"
        elif row.role != "home" or row.host_id != vm.host_id:
            yield f"vm {vm.name} lives on {vm.host_id} and has a {row.role} claim on {row.host_id}"
    for host in facts.hosts.values():
        counted = (host.vcpus_claimed, host.memory_claimed_mib)
        if counted != (vcpus[host.id], memory[host.id]):
            yield f"host {host.name} counts {counted} as claimed, its claims sum to {(vcpus[host.id], memory[host.id])}"
    claimed = {row.vm_id for row in facts.claims}
    for vm in facts.vms.values():
        if vm.deleted_at is None and vm.observed_state in RUNNING_STATES and vm.id not in claimed:
            yield f"vm {vm.name} is {vm.observed_state} and holds no claim"


def _holds_bytes(volume: Any) -> bool:
    """A deleted volume does until it is purged."""
    return volume.deleted_at is None or volume.purge_after is not None


def _place(facts: _Facts, volume: Any) -> tuple[str, str, str]:
    return volume.id, volume.pool_id, "" if facts.pools[volume.pool_id].is_shared else volume.host_id


def _space(facts: _Facts) -> Iterator[str]:
    sums: Counter[tuple[str, str]] = Counter()
    for row in facts.disk_claims:
        sums[(row.pool_id, row.host_id)] += row.size_bytes
        volume = facts.volumes[row.volume_id]
        if volume.deleted_at is not None and volume.purge_after is None:
            yield f"deleted volume {volume.name} still claims space in {row.pool_id}"
        elif (row.volume_id, row.pool_id, row.host_id) != _place(facts, volume):
            yield f"volume {volume.name} claims space at {row.host_id or 'the shared pool'}, where it is not"
    for row in facts.spaces:
        if row.claimed_bytes != sums[(row.pool_id, row.host_id)]:
            yield f"pool {row.pool_id} on {row.host_id!r} counts {row.claimed_bytes}, claims sum to {sums[(row.pool_id, row.host_id)]}"
    known = {(row.volume_id, row.pool_id, row.host_id) for row in facts.disk_claims}
    for volume in facts.volumes.values():
        # A LUN was there before it was a volume, and takes room from nobody.
        if volume.unit:
            if _place(facts, volume) in known:
                yield f"LUN {volume.name} claims space"
        elif volume.deleted_at is None and volume.observed_state == "present" and _place(facts, volume) not in known:
            yield f"volume {volume.name} is present and claims no space"


def _moves(facts: _Facts) -> Iterator[str]:
    for volume in facts.volumes.values():
        if volume.move_state:
            yield f"volume {volume.name} is {volume.move_state} and nobody works on its move"


def _quotas(facts: _Facts) -> Iterator[str]:
    for project in facts.projects:
        own = [vm for vm in facts.vms.values() if vm.project_id == project.id and vm.purged_at is None]
        volumes = [one for one in facts.volumes.values() if one.project_id == project.id and _holds_bytes(one)]
        used = (project.vms_used, project.vcpus_used, project.memory_mib_used, project.disk_bytes_used)
        there = (
            len(own),
            sum(max(vm.vcpus, vm.next_vcpus) for vm in own),
            sum(max(vm.memory_mib, vm.next_memory_mib) for vm in own),
            sum(volume.size_bytes for volume in volumes),
        )
        if used != there:
            yield f"project {project.name} counts {used} as used, there are {there}"


def _addresses(facts: _Facts) -> Iterator[str]:
    nics = {nic.id: nic for nic in facts.nics}
    for nic in facts.nics:
        vm = facts.vms[nic.vm_id]
        if vm.purged_at is not None:
            yield f"MAC {nic.mac} is held by vm {vm.name}, which is gone"
    for row in facts.addresses:
        if row.nic_id not in nics:
            yield f"address {row.address} is held by a nic that is gone"


def _migrations(facts: _Facts) -> Iterator[str]:
    for row in facts.migrations:
        if facts.operations[row.operation_id].state in _ENDED:
            yield f"vm {facts.vms[row.vm_id].name} is being migrated by {row.operation_id}, which ended"


def _reach(facts: _Facts) -> Iterator[str]:
    for noun, rows, things in (
        ("pool", facts.pool_hosts, facts.pools),
        ("network", facts.network_hosts, facts.networks),
    ):
        for row in rows:
            thing = things[getattr(row, f"{noun}_id")]
            if thing.deleted_at is not None:
                yield f"deleted {noun} {thing.name} is still mapped to a host"
            if facts.hosts[row.host_id].deleted_at is not None:
                yield f"{noun} {thing.name} is still mapped to a removed host"
    for space in facts.spaces:
        if facts.pools[space.pool_id].deleted_at is not None:
            yield f"deleted pool {space.pool_id} still has space"


def _replicas(facts: _Facts) -> Iterator[str]:
    ready = {row.image_id for row in facts.replicas if row.state == "ready"}
    for row in facts.replicas:
        if facts.images[row.image_id].deleted_at is not None:
            yield f"deleted image {facts.images[row.image_id].name} still has a replica"
    for image in facts.images.values():
        if image.deleted_at is None and image.state != "ready":
            yield f"image {image.name} is {image.state} and nobody works on it"
        if image.deleted_at is None and image.id not in ready:
            yield f"image {image.name} is nowhere"


# --- SQL against the hosts -------------------------------------------------------------------------------------------------------


def _domains(facts: _Facts, story: FleetStory) -> Iterator[str]:
    seen: dict[str, list[str]] = defaultdict(list)
    for host_id, hypervisor in story.fleet.hosts.items():
        if facts.hosts[host_id].deleted_at is not None:
            continue  # what runs there is none of ours any more
        for vm_id, domain in hypervisor.domains.items():
            vm = facts.vms.get(vm_id)
            if vm is None or vm.deleted_at is not None:
                yield f"{facts.hosts[host_id].name} has a domain of {vm_id}, which is deleted"
            elif vm.host_id != host_id:
                yield f"{facts.hosts[host_id].name} has a domain of {vm.name}, which lives elsewhere"
            elif domain.stamp.epoch > vm.epoch or (domain.state in ACTIVE and domain.stamp.epoch != vm.epoch):
                yield f"the domain of {vm.name} has epoch {domain.stamp.epoch}, the vm {vm.epoch}"
            elif domain.state.value != vm.observed_state:
                yield f"{vm.name} is {domain.state.value} and shown as {vm.observed_state}"
            seen[vm_id].append(host_id)
        for vm_id in hypervisor.prepared:
            yield f"{facts.hosts[host_id].name} is still prepared for a migration of {vm_id}"
    for vm in facts.vms.values():
        if vm.deleted_at is None and vm.observed_state in RUNNING_STATES and seen[vm.id] != [vm.host_id]:
            yield f"{vm.name} is shown as {vm.observed_state} on {vm.host_id}, its domains are on {seen[vm.id]}"


def _layers(facts: _Facts, story: FleetStory) -> Iterator[str]:
    """Every layer of a live volume is noted, every noted one is there and lies where it is noted to lie."""
    noted: dict[str, dict[str, str]] = defaultdict(dict)
    for row in facts.layers:
        noted[row.volume_id][row.id] = row.parent_layer_id
    for volume in facts.volumes.values():
        pool = facts.pools[volume.pool_id]
        host_id = volume.host_id or next(iter(story.fleet.hosts))
        store = story.fleet.store(host_id, PoolSpec(pool_id=pool.id, path=pool.path, is_shared=pool.is_shared))
        stored = store.volumes.get(volume.id)
        if volume.deleted_at is not None or stored is None:
            continue
        there = {layer_id: layer.below for layer_id, layer in stored.layers.items() if layer_id}
        expected = {layer_id: (volume.id, below) for layer_id, below in noted[volume.id].items()}
        if there != expected:
            yield f"volume {volume.name} has layers {there}, SQL notes {expected}"
    for row in facts.snapshots:
        if row.deleted_at is None and row.state != "ready" and facts.vms[row.vm_id].deleted_at is None:
            yield f"snapshot {row.name} is {row.state} and nobody works on it"


def _files(facts: _Facts, story: FleetStory) -> Iterator[str]:
    """Every file has a live row, every row its file."""
    released = {row.id for row in facts.vms.values() if row.observed_reason == "released"}
    for pool in facts.pools.values():
        spec = PoolSpec(pool_id=pool.id, path=pool.path, is_shared=pool.is_shared)
        for host_id in facts.hosts:
            if facts.hosts[host_id].deleted_at is not None or pool.deleted_at is not None:
                continue
            store = story.fleet.store(host_id, spec)
            place = "" if pool.is_shared else host_id
            expected = {
                one.id: one
                for one in facts.volumes.values()
                if _holds_bytes(one) and one.pool_id == pool.id and (pool.is_shared or one.host_id == host_id)
            }
            for volume_id in store.volumes:
                volume = facts.volumes.get(volume_id)
                if volume_id not in expected and not (volume is not None and released):
                    yield f"pool {pool.name} on {host_id} holds volume {volume_id}, which nobody knows"
            for volume in expected.values():
                if volume.observed_state == "present" and volume.id not in store.volumes:
                    yield f"volume {volume.name} is present in SQL and not in pool {pool.name}"
            for vm_id in store.state_files:
                if vm_id not in facts.vms or (facts.vms[vm_id].purged_at is not None and vm_id not in released):
                    yield f"pool {pool.name} on {host_id} holds state files of {vm_id}, which is gone"
            noted = {row.image_id for row in facts.replicas if row.pool_id == pool.id and row.host_id == place}
            ready = {
                row.image_id for row in facts.replicas if row.pool_id == pool.id and row.host_id == place and row.state == "ready"
            }
            yield from (
                f"pool {pool.name} on {host_id} holds image {one}, which no row notes" for one in set(store.images) - noted
            )
            yield from (
                f"image {one} is noted in pool {pool.name} on {host_id} and is not there" for one in ready - set(store.images)
            )
    live_pools = {pool.id for pool in facts.pools.values() if pool.deleted_at is None}
    live_networks = {network.id for network in facts.networks.values() if network.deleted_at is None}
    for host_id, hypervisor in story.fleet.hosts.items():
        if facts.hosts[host_id].deleted_at is None:
            yield from (f"{host_id} still knows pool {one}" for one in set(hypervisor.pools) - live_pools)
            yield from (f"{host_id} still has network {one}" for one in set(hypervisor.networks) - live_networks)


def _guests(story: FleetStory) -> Iterator[str]:
    for at_s, vm_id, hosts in story.fleet.double_runs:
        yield f"vm {vm_id} ran twice at {at_s}: on {hosts}"
    for hypervisor in story.fleet.hosts.values():
        for vm_id, domain in hypervisor.domains.items():
            is_running = hypervisor.host_id in story.fleet.running_hosts(vm_id)
            if is_running != (domain.state in ACTIVE):
                yield f"the process of {vm_id} on {hypervisor.host_id} and its domain disagree"
    if story.agents.jobs_under_way():
        yield "an agent still works on a job that nobody waits for"
