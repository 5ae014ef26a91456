"""A fleet for tests of operations: real database, real engine and placement loop, real agents on simulated hosts, virtual time.

    story = FleetStory(database, workshop, directory)
    vm = story.running_vm("web1")
    operation = story.accept_power(vm, "vm.migrate")
    story.settle()
    assert story.operation(operation.id).state is OperationState.DONE

Nothing runs by itself: `settle` plays the leader and a worker in turns and moves the clock when nothing else can happen.
"""

import random
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tests.operations.clock import VirtualClock
from tests.operations.wire import SimulatedAgents, Wire, Workshop, client_over
from trimtab_agent.hypervisor.simulated import SimulatedHost, SimulatedHypervisor
from trimtab_agent.hypervisor.simulation import Fault, SimulatedFleet
from trimtab_controller.agents.grpc_client import AgentAddress
from trimtab_controller.clock import mint
from trimtab_controller.core.lifecycle import LIVE_STATES, DesiredPower
from trimtab_controller.core.model import Actor, Image, Network, Operation, Pool, Project, Role, Vm, Volume
from trimtab_controller.loops.placement import PlacementLoop
from trimtab_controller.loops.recoveries import RecoveryLoop
from trimtab_controller.nudge import Nudger
from trimtab_controller.operations import engine as engines
from trimtab_controller.operations.accept import accept
from trimtab_controller.operations.engine import Engine
from trimtab_controller.operations.registry import saga_named
from trimtab_controller.operations.saga import Saga
from trimtab_controller.secret_box import SecretBox
from trimtab_controller.services import observations, vm_power
from trimtab_controller.services import vms as vm_service
from trimtab_controller.services.vm_nics import NicWish
from trimtab_controller.services.vms import VmSpec
from trimtab_controller.store import (
    describe,
    host_reports,
    hosts,
    image_replicas,
    images,
    leases,
    networks,
    operations,
    pools,
    schema,
    vms,
    volume_keys,
)
from trimtab_controller.store.database import Database, Session
from trimtab_protos.messages import DiskFormat, HostFileSource, ImageSpec, JobProgress

MIB = 1 << 20
GIB = 1 << 30
ROUNDS_MAX = 600
JOBS_TIMEOUT_S = 20.0
LEASE_TTL_MS = 15_000
# Built once, and without a list of parameters: so the store prepares it.
_LIVE = sa.select(schema.operation.c.next_run, schema.operation.c.lease_until).where(
    sa.or_(*(schema.operation.c.state == one.value for one in sorted(LIVE_STATES)))
)


class NeverCancelled:
    """The job control of an import that a factory does by itself."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def report(self, progress: JobProgress) -> None:
        """Nobody watches."""


class FleetStory:
    """One fleet and what happens to it. Close it: agents and threads are real."""

    def __init__(
        self, database: Database, workshop: Workshop, directory: Path, *, host_count: int = 3, shares_commits: bool = False
    ) -> None:
        """`shares_commits`: as the product's drivers do; else each record is committed alone, so that every boundary is seen."""
        self.db = database
        self.clock = VirtualClock()
        self.wire = Wire()
        self.agents = SimulatedAgents(workshop, directory, self.clock)
        self.agents.on_reboot = self.reboots
        self.rebooted: list[str] = []
        self.directory = directory
        self.secrets = SecretBox(directory)
        self.client = client_over(
            self.wire,
            self._lookup,
            open_seal=lambda sealed, place: self.secrets.open(sealed, place=place),
            seals_of=lambda subject_id: self.db.read(lambda session: volume_keys.of_subject(session, subject_id)),
        )
        self.nudger = Nudger(lambda: None)
        self.actor = Actor(name="user:alice", user_id="user-alice", request_id="req-1", roles={"": Role.ADMIN})
        self.held: list[Fault] = []
        self.shelf: dict[str, Any] = {}
        """What examples of operations keep for the next one on this fleet."""
        self._engines = 0
        self.shares_commits = shares_commits
        self.engine = self.new_engine()
        self.term = self._lead()
        self.recoveries = RecoveryLoop(db=self.db, clock=self.clock, nudger=self.nudger)
        self.placement = PlacementLoop(db=self.db, clock=self.clock, nudger=self.nudger, rng=random.Random(1))
        self.project, self.host_class_id = self.db.write(self._found)
        self.host_ids = [self.add_host(f"node{number}") for number in range(1, host_count + 1)]
        self.shared = self.add_pool("shared", is_shared=True)
        self.local = self.add_pool("local", is_shared=False)
        self.network = self.add_network("default")
        self.image = self.add_image("micro", self.shared)

    def close(self) -> None:
        self.wire.clear()
        for fault in self.held:
            fault.released.set()
        self.nudger.stop()
        self.agents.close()
        self.client.close()

    @property
    def fleet(self) -> SimulatedFleet:
        return self.agents.fleet

    def hypervisor(self, host_id: str) -> SimulatedHypervisor:
        return self.fleet.hosts[host_id]

    # --- what there is -----------------------------------------------------------------------------------------------

    def _lead(self) -> int:
        def work(session: Session) -> int:
            seen = leases.read(session, leases.ENGINE)
            taken = leases.take(session, leases.ENGINE, owner="story", seen=seen, ttl_ms=LEASE_TTL_MS, now=self.clock.now())
            assert taken is not None
            return taken.term

        return self.db.write(work)

    def _found(self, session: Session) -> tuple[Project, str]:
        project_id, class_id = mint("proj"), mint("hc")
        now = self.clock.now()
        session.execute(schema.project.insert().values(id=project_id, name="default", created_at=now))
        hosts.insert_class(session, host_class_id=class_id, name=hosts.DEFAULT_CLASS, now=now)
        return self._project(session, project_id), class_id

    def _project(self, session: Session, project_id: str) -> Project:
        row = session.execute(sa.select(schema.project).where(schema.project.c.id == project_id)).one()
        return Project(**{name: row._mapping[name] for name in Project.__dataclass_fields__})

    def add_host(self, name: str, **machine: Any) -> str:
        """Join a simulated host; it is up, with its inventory, and mapped to every pool and network as unknown."""
        host_id = mint("host")
        agent = self.agents.start(SimulatedHost(host_id=host_id, hostname=name, **machine))
        inventory = agent.inventory.read()

        def work(session: Session) -> None:
            now = self.clock.now()
            hosts.insert(
                session,
                host_id=host_id,
                name=name,
                host_class_id=self.host_class_id,
                agent_address=agent.address,
                migration_address=inventory.migration_address,
                machine_id=inventory.machine_id,
                smbios_uuid=inventory.smbios_uuid,
                now=now,
            )
            host_reports.store_inventory(session, host_id, inventory, now=now)
            hosts.open_session(
                session,
                host_id,
                incarnation=agent.incarnation,
                boot_id=inventory.boot_id,
                agent_address=agent.address,
                now=now,
            )
            host_reports.map_everything(session, host_id)

        self.db.write(work)
        return host_id

    def reboots(self, host_id: str) -> None:
        """What a host's operating system does when it is told to restart: guests end, and it is up again with another boot id."""
        self.rebooted.append(host_id)
        self.hypervisor(host_id).crash()
        self.hypervisor(host_id).boot()
        boot_id = self.hypervisor(host_id).boot_id
        table = schema.host
        self.db.write(lambda session: session.execute(table.update().where(table.c.id == host_id).values(boot_id=boot_id)))

    def add_pool(self, name: str, *, is_shared: bool) -> Pool:
        """Insert a pool that every host reaches."""

        def work(session: Session) -> Pool:
            now = self.clock.now()
            pool = pools.insert(
                session,
                pool_id=mint("pool"),
                name=name,
                kind="dir",
                path=f"/srv/{name}",
                is_shared=is_shared,
                is_default=is_shared,
                now=now,
            )
            if is_shared:
                session.execute(schema.pool.update().where(schema.pool.c.id == pool.id).values(sharing_proven_at=now))
            for host_id in self.host_ids:
                session.execute(
                    schema.pool_host.insert().values(pool_id=pool.id, host_id=host_id, state="ready", observed_at=now)
                )
                seen = self.hypervisor(host_id).ensure_pool(describe.pool_spec(pool))
                host_reports.store_pools(session, [host_reports.PoolReport(host_id, seen)], now=now)
            return describe.get_pool(session, pool.id)

        return self.db.write(work)

    def add_network(self, name: str, *, project_id: str = "") -> Network:
        """Insert a bridge network that every host reaches."""

        def work(session: Session) -> Network:
            now = self.clock.now()
            network = networks.insert(
                session,
                network_id=mint("net"),
                bridges=dict.fromkeys(self.host_ids, "br0"),
                now=now,
                project_id=project_id,
                name=name,
                kind="bridge",
                bridge="br0",
            )
            session.execute(schema.network_host.update().values(state="ready", observed_at=now))
            return network

        return self.db.write(work)

    def add_image(self, name: str, pool: Pool, *, host_id: str = "", kind: str = "disk") -> Image:
        """Insert an image that lies in the pool, on `host_id` where the pool is local."""
        image_id = mint("img")
        at = self.hypervisor(host_id or self.host_ids[0])
        image_format = DiskFormat.ISO if kind == "iso" else DiskFormat.QCOW2
        spec = ImageSpec(image_id=image_id, pool_id=pool.id, format=image_format)
        source = HostFileSource(file_name=f"{name}.qcow2")
        result = at.import_image(spec, describe.pool_spec(pool), source, NeverCancelled())

        def work(session: Session) -> Image:
            now = self.clock.now()
            images.insert(
                session,
                image_id=image_id,
                project_id="",
                name=name,
                kind=kind,
                format=image_format.value,
                source_sha256=result.source_sha256,
                labels={},
                now=now,
            )
            session.execute(
                schema.image.update()
                .where(schema.image.c.id == image_id)
                .values(
                    state="ready",
                    virtual_size_bytes=result.virtual_size_bytes,
                    file_size_bytes=result.file_size_bytes,
                    stored_sha256=result.stored_sha256,
                )
            )
            place = "" if pool.is_shared else host_id
            image_replicas.add(session, image_id=image_id, pool_id=pool.id, host_id=place, now=now)
            return describe.get_image(session, image_id)

        return self.db.write(work)

    # --- vms ---------------------------------------------------------------------------------------------------------

    def accept_create(
        self,
        name: str = "web1",
        *,
        pool: Pool | None = None,
        image: Image | None = None,
        image_id: str | None = None,
        pool_id: str | None = None,
        start: bool = True,
        to_host_id: str = "",
        **shape: Any,
    ) -> tuple[Vm, Operation]:
        """Accept a vm as the service does: rows, quota, names, MAC, operation."""
        values: dict[str, Any] = {
            "name": name,
            "image": (image or self.image).id if image_id is None else image_id,
            "volume": "",
            "vcpus": 2,
            "vcpus_max": None,
            "memory_mib": 1024,
            "memory_max_mib": None,
            "disk_bytes": 2 * GIB,
            "pool": (pool or self.shared).id if pool_id is None else pool_id,
            "networks": (NicWish(network=self.network.id),),
            "firmware": "bios",
            "labels": {},
            "host_selector": {},
            "host_class": "",
            "arch": "x86_64",
            "cpu_model": "",
            "seed": None,
            "start": start,
            "to_host": to_host_id,
        }
        spec = VmSpec(**{**values, **shape})
        _view, operation = self.db.write(
            lambda session: vm_service.create(
                session, spec, project=self.project, actor=self.actor, now=self.clock.now(), box=self.secrets
            )
        )
        return self.vm(operation.subject_id), operation

    def running_vm(self, name: str = "web1", **wishes: Any) -> Vm:
        """Return a vm that was created and runs."""
        vm, operation = self.accept_create(name, **wishes)
        self.settle()
        ended = self.operation(operation.id)
        assert ended.state.value == "done", ended.error
        return self.vm(vm.id)

    def vm(self, vm_id: str) -> Vm:
        return self.db.read(lambda session: vms.get(session, vm_id))

    def volumes(self, vm_id: str) -> tuple[Volume, ...]:
        return self.db.read(lambda session: describe.volumes_of(session, vm_id))

    def fleet_vms(self) -> frozenset[str]:
        """Return the ids of all live vms."""
        table = schema.vm
        query = sa.select(table.c.id).where(table.c.deleted_at.is_(None))
        return self.db.read(lambda session: frozenset(session.scalars(query)))

    def running_on(self, vm_id: str) -> frozenset[str]:
        """Return where the guest's process really is."""
        return self.fleet.running_hosts(vm_id)

    def running_on_host(self, host_id: str) -> frozenset[str]:
        """Return whose processes really are on the host."""
        domains = self.hypervisor(host_id).domains
        return frozenset(vm_id for vm_id in domains if host_id in self.fleet.running_hosts(vm_id))

    # --- operations --------------------------------------------------------------------------------------------------

    def accept(
        self, kind: str, subject_id: str, params: Mapping[str, Any], *, name: str = "", project_id: str = "", **options: Any
    ) -> Operation:
        return self.db.write(
            lambda session: accept(
                session,
                kind,
                subject_id=subject_id,
                subject_name=name or subject_id,
                project_id=project_id,
                params=params,
                actor=self.actor,
                now=self.clock.now(),
                **options,
            )
        )

    def accept_power(self, vm: Vm, verb: str, **wishes: Any) -> Operation:
        """Accept start, stop, reboot, pause, resume, migrate, delete or undelete as the service does."""

        def work(session: Session) -> Operation:
            present = vms.get(session, vm.id)
            caller = vm_power.Caller(actor=self.actor, expected_version=None, now=self.clock.now())
            match verb:
                case "start":
                    return vm_power.start(session, present, caller, **wishes)
                case "stop":
                    return vm_power.stop(session, present, caller, **{"force": False, "timeout_s": 60, **wishes})
                case "reboot":
                    return vm_power.reboot(session, present, caller, **{"force": False, **wishes})
                case "pause":
                    return vm_power.pause(session, present, caller)
                case "resume":
                    return vm_power.resume(session, present, caller)
                case "migrate":
                    defaults = {
                        "to_host": "",
                        "bandwidth_mib_s": 0,
                        "auto_converge": False,
                        "allow_postcopy": False,
                        "timeout_s": 0,
                    }
                    return vm_power.migrate(session, present, caller, vm_power.MigrateSpec(**{**defaults, **wishes}))
                case "delete":
                    return vm_power.delete(session, present, caller)
                case "undelete":
                    return vm_power.undelete(session, present, caller)
                case "purge":
                    return vm_power.purge(session, present, caller)
                case _:
                    raise AssertionError(verb)

        return self.db.write(work)

    def operation(self, operation_id: str) -> Operation:
        return self.db.read(lambda session: operations.get(session, operation_id))

    def journal(self, operation_id: str) -> tuple[str, ...]:
        """Return the journal as `do place`, `undo own`, `failed define`, oldest first."""
        entries = self.db.read(lambda session: operations.journal_of(session, operation_id))
        return tuple(f"{entry.direction.value if entry.has_succeeded else 'failed'} {entry.step}" for entry in entries)

    def cancel(self, operation_id: str) -> None:
        self.db.write(
            lambda session: operations.request_cancel(session, operation_id, actor=self.actor.name, now=self.clock.now())
        )

    def wish(self, vm_id: str, power: DesiredPower) -> None:
        self.db.write(lambda session: vms.set_desired(session, vm_id, power))

    # --- time --------------------------------------------------------------------------------------------------------

    def new_engine(
        self,
        *,
        db: Any = None,
        saga_of: Callable[[str], Saga[Any]] = saga_named,
        on_step: Callable[[str, str, str, float], None] | None = None,
        shares_commits: bool | None = None,
    ) -> Engine:
        """Return another driver; None: one that commits as the story's do."""
        self._engines += 1
        optional = {} if on_step is None else {"on_step": on_step}
        return Engine(
            db=db or self.db,
            agents=self.client,
            clock=self.clock,
            driver=f"driver-{self._engines}",
            rng=random.Random(self._engines),
            saga_of=saga_of,
            shares_commits=self.shares_commits if shares_commits is None else shares_commits,
            **optional,
        )

    def step(self, engine: Engine | None = None) -> int:
        """Let the leader place what is pending and a worker drive what is due, once; return how many were driven."""
        self.placement.run(self.term)
        self.recoveries.run(self.term)
        return (engine or self.engine).drive_due()

    def settle(
        self, engine: Engine | None = None, *, until: Callable[[], bool] = lambda: False, waits_for_jobs: bool = True
    ) -> None:
        """Go on until every operation has ended (or needs attention), or `until` holds."""
        for _ in range(ROUNDS_MAX):
            if until():
                return
            if self.step(engine):
                continue
            if waits_for_jobs:
                self.wait_for_jobs()
            due = self.db.read(self._next_due)
            if due is None:
                return
            self.clock.advance_to(due)
        stuck = self.db.read(lambda session: operations.page(session, limit=20, is_done=False))
        raise AssertionError(f"these operations do not end: {[(one.kind, one.step, one.waiting_for) for one in stuck]}")

    def hear_hosts(self) -> None:
        """Take every host's word for what runs there, as at a new session of its agent."""

        def work(session: Session) -> None:
            for host_id, hypervisor in self.fleet.hosts.items():
                observations.record_all(session, host_id, hypervisor.list_domains(), self.clock.now(), is_complete=True)

        self.db.write(work)

    def _next_due(self, session: Session) -> Any:
        instants = [max(row.next_run, row.lease_until or row.next_run) for row in session.execute(_LIVE)]
        return min(instants, default=None)

    def wait_for_jobs(self) -> None:
        """Let the agents' jobs end, moving the clock for those that sleep; those that a fault holds stay."""
        deadline = time.monotonic() + JOBS_TIMEOUT_S
        while self.agents.jobs_under_way():
            if any(fault.met.is_set() and not fault.released.is_set() for fault in self.held):
                return
            waking = self.clock.next_wake_s()
            if waking is not None:
                self.clock.advance(waking)
            else:
                time.sleep(0.001)
            assert time.monotonic() < deadline, "a job of an agent does not end"

    def hold(self, verb: str, fault: Fault, *, host_id: str = "*") -> Fault:
        """Plan a hang on a simulated host; `settle` does not wait for what it holds."""
        self.held.append(self.fleet.plan_fault(verb, fault, host_id=host_id))
        return fault

    def lose_driver(self) -> None:
        """Let the lease of a driver that died end."""
        self.clock.advance(engines.DRIVER_LEASE_S + 1)

    def _lookup(self, host_id: str) -> AgentAddress:
        return AgentAddress(host_id, *self.db.read(lambda session: hosts.reach_agent(session, host_id)))
