"""A fault campaign: a random load on a whole control plane while its processes are killed, frozen and robbed of their queue.

    prepare ─► load and faults ─► everything up again ─► every operation ends ─► verdict

The verdict asks the client's own record (what was accepted), SQL, the hosts and the oracle: nothing lost, nothing done twice, all
ended, nothing left behind.
"""

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import sqlalchemy as sa

from tests.operations.invariants import audit_invariants
from tests.soak import starts
from tests.soak.controlplane import DRIVER_LEASE_S, LEASE_TTL_S, ControlPlane, Process
from trimtab_agent.hypervisor.simulation import SimulatedFleet
from trimtab_controller.clock import SystemClock, mint
from trimtab_controller.core.lifecycle import ENDED_STATES, ObservedState, OperationState
from trimtab_controller.core.model import Actor, Operation, Project, Role, Vm
from trimtab_controller.services import images as image_service
from trimtab_controller.services import networks as network_service
from trimtab_controller.services import pools as pool_service
from trimtab_controller.services import vm_power
from trimtab_controller.services import vms as vm_service
from trimtab_controller.services import volumes as volume_service
from trimtab_controller.services.vm_nics import NicWish
from trimtab_controller.services.vms import VmSpec
from trimtab_controller.store import operations, schema, vms
from trimtab_controller.store.database import Session
from trimtab_controller.store.rows import build, columns_of
from trimtab_protos.errors import TrimtabError

GIB = 1 << 30
TICK_S = 0.05
UP_TIMEOUT_S = 120.0
PREPARE_TIMEOUT_S = 120.0
STUCK_TIMEOUT_S = 300.0
CLEAN_TIMEOUT_S = 90.0
RETRIES_OF_STUCK_MAX = 3
FAULTS = {
    **{f"kill {process}": 3 for process in ("worker", "engine", "gateway", "agents")},
    **{f"freeze {process}": 2 for process in ("worker", "engine", "gateway", "agents")},
    "kill redis": 1,
    "flush redis": 2,
    "down redis": 1,
    "freeze redis": 1,
}
"""What may be done to a control plane, and how often beside the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a campaign shall be."""

    seed: int
    operations: int
    vms: int = 14
    in_flight: int = 12
    # Seconds between two requests at least, so that faults have time to meet them.
    pace_s: float = 0.3
    fault_every_s: tuple[float, float] = (0.3, 1.5)
    redis_down_s: float = 20.0


@dataclass(slots=True, eq=False)
class Verdict:
    """What came of it; empty `violations` is a success."""

    accepted: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    died_by_themselves: Counter[str] = field(default_factory=Counter)
    retried_by_hand: int = 0
    cancels: int = 0
    takeovers: int = 0
    seconds_under_load: float = 0.0
    seconds_to_quiesce: float = 0.0
    violations: list[str] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Later:
    at_s: float
    act: Callable[[], None]


class Campaign:
    """One run. `plane` is founded and not started."""

    def __init__(self, plane: ControlPlane, fleet: SimulatedFleet, wishes: Wishes) -> None:
        self.plane, self.fleet, self.wishes = plane, fleet, wishes
        self.db = plane.db
        self.rng = random.Random(wishes.seed)
        self.verdict = Verdict()
        self.clock = SystemClock()
        self.actor = Actor(name="user:chaos", user_id="user-chaos", request_id="req-chaos", roles={"": Role.ADMIN})
        self.accepted: dict[str, tuple[str, str]] = {}
        self.agents = self
        self._later: list[_Later] = []
        self._disturbed: set[str] = set()
        self._names = 0
        # Of each kind of fault there is one, first of all, whatever is drawn afterwards.
        self._unmet = sorted(FAULTS, key=lambda _kind: self.rng.random())
        # How long a process is left alone after its start: as long as the whole plane took to come up on this machine. One that is
        # killed before it ever worked shows nothing, and a busy machine would never get any work done.
        self._peace_s = 0.0

    def jobs_under_way(self) -> int:
        """Return how many migrations the hosts still work on; for the audit."""
        return sum(len(host.migrations) for host in self.fleet.hosts.values())

    def run(self) -> Verdict:
        started = time.monotonic()
        self.plane.start()
        self._wait(lambda: self.plane.up_hosts() == len(self.plane.host_ids), UP_TIMEOUT_S, "every host to be up")
        self._peace_s = time.monotonic() - started
        self.prepare()
        started = time.monotonic()
        self.disturb()
        self.verdict.seconds_under_load = time.monotonic() - started
        started = time.monotonic()
        self.calm_down()
        self.quiesce()
        self.verdict.seconds_to_quiesce = time.monotonic() - started
        self.judge()
        return self.verdict

    # --- what the load works on -----------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make a project, pools, a network and an image, as an operator would."""
        self.project = self.db.write(self._found_project)
        now = self.clock.now()
        for name, is_shared in (("shared", True), ("local", False)):
            spec = pool_service.PoolSpec(name=name, kind="dir", path=f"/srv/{name}", is_shared=is_shared, is_default=is_shared)
            self._accept(lambda session, spec=spec: pool_service.create(session, spec, actor=self.actor, now=now)[1])  # type: ignore[misc]
        network = network_service.NetworkSpec(name="default", kind="bridge", bridge="br0", bridges={})
        self._accept(lambda session: network_service.create(session, network, project=None, actor=self.actor, now=now)[1])
        self._wait(self._all_ended, PREPARE_TIMEOUT_S, "pools and networks")
        self._import("micro")
        self._wait(self._all_ended, PREPARE_TIMEOUT_S, "the image")
        failed = [(state, error) for state, error in self._ends().values() if state != OperationState.DONE.value]
        assert failed == [], failed

    def _import(self, name: str) -> bool:
        image = image_service.ImageSpec(
            name=name,
            kind="disk",
            format="qcow2",
            source=image_service.FromHost(host="node1", file_name="micro.qcow2"),
            pool="shared",
            is_shared=True,
            labels={},
        )
        now = self.clock.now()
        return self._accept(
            lambda session: image_service.create(
                session, image, project=self.project, allowed_url_hosts=(), actor=self.actor, now=now
            )[1]
        )

    def _found_project(self, session: Session) -> Project:
        found = session.execute(sa.select(schema.project).where(schema.project.c.name == "default")).one_or_none()
        if found is None:
            values = {"id": mint("proj"), "name": "default", "created_at": self.clock.now()}
            session.execute(schema.project.insert().values(**values))
            found = session.execute(sa.select(schema.project).where(schema.project.c.id == values["id"])).one()
        return build(Project, found)

    # --- load and faults --------------------------------------------------------------------------------------------------

    def disturb(self) -> None:
        """Keep operations under way and break things, until enough were accepted."""
        wanted = len(self.accepted) + self.wishes.operations
        next_fault_s = time.monotonic() + 1.0
        moved_s = next_request_s = time.monotonic()
        while len(self.accepted) < wanted or self._unmet:
            self._tick()
            if time.monotonic() >= next_fault_s:
                self._fault()
                next_fault_s = time.monotonic() + self.rng.uniform(*self.wishes.fault_every_s)
            may_ask = time.monotonic() >= next_request_s and self._live_count() < self.wishes.in_flight
            if may_ask and self._submit():
                moved_s = time.monotonic()
                next_request_s = moved_s + self.wishes.pace_s
            assert time.monotonic() - moved_s < STUCK_TIMEOUT_S, f"nothing can be accepted any more: {self.verdict.refused}"

    def _tick(self) -> None:
        """Do what is due: thaw, start again."""
        time.sleep(TICK_S)
        due = [later for later in self._later if later.at_s <= time.monotonic()]
        self._later = [later for later in self._later if later not in due]
        for later in due:
            later.act()
        self.verdict.died_by_themselves.update(self.plane.restart_the_dead())

    def _fault(self) -> None:
        chosen = (
            self._unmet[-1] if self._unmet else self.rng.choice([kind for kind, weight in FAULTS.items() for _ in range(weight)])
        )
        what, _, kind = chosen.partition(" ")
        now_s = time.monotonic()
        free = [
            process
            for process in self.plane.named(kind)
            if process.name not in self._disturbed and now_s - process.started_s >= self._peace_s
        ]
        if not free:
            return
        process = self.rng.choice(free)
        match what:
            case "kill":
                self._kill(process, self.rng.uniform(0.2, 1.5))
            case "down":
                self._kill(process, self.wishes.redis_down_s)
            case "freeze":
                # Beyond every lease that it may hold.
                self._freeze(process, (DRIVER_LEASE_S if kind == "worker" else LEASE_TTL_S) + 2.0)
            case _:
                if not self.plane.flush_redis():
                    return
        self.verdict.faults[chosen] += 1
        if self._unmet:
            self._unmet.pop()

    def _kill(self, process: Process, down_s: float) -> None:
        process.kill()
        self._until(process, down_s, process.start)

    def _freeze(self, process: Process, frozen_s: float) -> None:
        process.freeze()
        self._until(process, frozen_s, process.thaw)

    def _until(self, process: Process, seconds: float, act: Callable[[], None]) -> None:
        self._disturbed.add(process.name)

        def over() -> None:
            act()
            self._disturbed.discard(process.name)

        self._later.append(_Later(time.monotonic() + seconds, over))

    def calm_down(self) -> None:
        """Let everything that was disturbed be well again."""
        while self._later:
            self._tick()

    # --- operations ----------------------------------------------------------------------------------------------------------

    def _submit(self) -> bool:
        """Accept one more operation, or cancel one; whether something was accepted."""
        if self.rng.random() < 0.08:
            return self._cancel_one()
        live = self.db.read(self._read_vms)
        choice = self.rng.random()
        if choice < 0.06:
            return self._volume()
        if choice < 0.1:
            return self._import(self._name("image"))
        present = [vm for vm in live if vm.deleted_at is None]
        if len(present) < self.wishes.vms and choice < 0.5:
            return self._create()
        if not live:
            return self._create()
        return self._change(self.rng.choice(live))

    def _read_vms(self, session: Session) -> tuple[Vm, ...]:
        table = schema.vm
        rows = session.execute(sa.select(*columns_of(table, Vm)).where(table.c.purged_at.is_(None)).order_by(table.c.id))
        return tuple(vms.from_row(row) for row in rows)

    def _name(self, noun: str) -> str:
        self._names += 1
        return f"{noun}{self._names}"

    def _create(self) -> bool:
        spec = VmSpec(
            name=self._name("web"),
            image="micro",
            volume="",
            vcpus=1,
            vcpus_max=None,
            memory_mib=256,
            memory_max_mib=None,
            disk_bytes=None,
            pool=self.rng.choice(["shared", "shared", "local"]),
            networks=(NicWish(network="default"),),
            firmware="bios",
            labels={},
            host_selector={},
            host_class="",
            arch="x86_64",
            cpu_model="",
            seed=None,
            start=self.rng.random() < 0.9,
            to_host="",
        )
        now = self.clock.now()
        return self._accept(lambda session: vm_service.create(session, spec, project=self.project, actor=self.actor, now=now)[1])

    def _change(self, vm: Vm) -> bool:
        """Do to a vm what its state allows, as far as anybody can know; a busy one is sometimes deleted or cut off all the same."""
        caller = vm_power.Caller(actor=self.actor, expected_version=None, now=self.clock.now())
        if vm.deleted_at is not None:
            return self._accept(lambda session: vm_power.undelete(session, vm, caller))
        if self.rng.random() < 0.08:
            return self._accept(lambda session: vm_power.delete(session, vm, caller))
        match vm.observed_state:
            case ObservedState.RUNNING:
                verb = self.rng.choice(["migrate", "migrate", "migrate", "stop", "force", "reboot", "pause"])
            case ObservedState.PAUSED:
                verb = "resume"
            case _:
                verb = "start"
        return self._accept(lambda session: _accept_verb(session, vm, caller, verb))

    def _volume(self) -> bool:
        now = self.clock.now()
        free = self.db.read(self._free_volumes)
        if free and self.rng.random() < 0.5:
            volume_id = self.rng.choice(free)
            return self._accept(
                lambda session: volume_service.delete(
                    session, volume_id, project=self.project, expected_version=None, actor=self.actor, now=now
                )
            )
        spec = volume_service.VolumeSpec(
            name=self._name("data"), size_bytes=2 * GIB, pool=self.rng.choice(["shared", "local"]), format="", image="micro"
        )
        return self._accept(
            lambda session: volume_service.create(session, spec, project=self.project, actor=self.actor, now=now)[1]
        )

    def _free_volumes(self, session: Session) -> list[str]:
        table = schema.volume
        query = sa.select(table.c.id).where(table.c.vm_id.is_(None), table.c.deleted_at.is_(None)).order_by(table.c.id)
        return list(session.scalars(query))

    def _cancel_one(self) -> bool:
        table = schema.operation
        query = sa.select(table.c.id).where(table.c.ended_at.is_(None)).order_by(table.c.id)
        live = self.db.read(lambda session: list(session.scalars(query)))
        if live:
            chosen = self.rng.choice(live)
            try:
                self.db.write(
                    lambda session: operations.request_cancel(session, chosen, actor=self.actor.name, now=self.clock.now())
                )
                self.verdict.cancels += 1
            except TrimtabError as error:
                self.verdict.refused[error.code] += 1
        return False

    def _accept(self, work: Callable[[Session], Operation]) -> bool:
        try:
            operation = self.db.write(work)
        except TrimtabError as error:
            self.verdict.refused[error.code] += 1
            return False
        # Acknowledged from here on: it must not be lost.
        self.accepted[operation.id] = (operation.kind, operation.subject_id)
        return True

    # --- the end --------------------------------------------------------------------------------------------------------------

    def quiesce(self) -> None:
        """Wait until every operation has ended; an operator retries what asks for one, a few times."""
        tries: Counter[str] = Counter()
        deadline = time.monotonic() + STUCK_TIMEOUT_S
        while not self._all_ended() and time.monotonic() < deadline:
            self._tick()
            for operation_id in self._in_state(OperationState.NEEDS_ATTENTION):
                if tries[operation_id] < RETRIES_OF_STUCK_MAX:
                    tries[operation_id] += 1
                    self.verdict.retried_by_hand += 1
                    self._retry(operation_id)

    def _retry(self, operation_id: str) -> None:
        self.db.write(lambda session: operations.retry(session, operation_id, actor=self.actor.name, now=self.clock.now()))

    def judge(self) -> None:
        """Fill in the verdict; what hosts say of guests may take a moment to arrive."""
        deadline = time.monotonic() + CLEAN_TIMEOUT_S
        violations = self._violations()
        while violations and time.monotonic() < deadline:
            self._tick()
            violations = self._violations()
        verdict = self.verdict
        verdict.violations = violations
        verdict.accepted = len(self.accepted)
        verdict.kinds = Counter(kind for kind, _subject in self.accepted.values())
        for state, error in self._ends().values():
            verdict.ended[state] += 1
            if error:
                verdict.errors[error] += 1
        verdict.takeovers = self.db.read(self._takeovers)

    def _violations(self) -> list[str]:
        ends = self._ends()
        lost = [f"{operation_id} was accepted and is not there" for operation_id in self.accepted if operation_id not in ends]
        return [*lost, *audit_invariants(self), *self._repeated_starts()]  # type: ignore[arg-type]

    def _repeated_starts(self) -> list[str]:
        started = Counter(entry.vm_id for entry in list(self.fleet.oracle) if entry.event == "start")
        return starts.repeated(started, self.db.read(lambda session: starts.most_starts(session, self.accepted)))

    def _takeovers(self, session: Session) -> int:
        """Return how many operations were driven under more than one turn between records of the same kind of step."""
        table = schema.journal
        query = (
            sa.select(table.c.operation_id).group_by(table.c.operation_id).having(sa.func.count(sa.distinct(table.c.turn)) > 1)
        )
        return len(list(session.scalars(query)))

    def _ends(self) -> dict[str, tuple[str, str]]:
        """Return (state, error code) of every accepted operation that is there."""
        table = schema.operation
        rows = self.db.read(lambda session: session.execute(sa.select(table.c.id, table.c.state, table.c.error)).all())
        return {row.id: (row.state, (row.error or {}).get("code", "")) for row in rows if row.id in self.accepted}

    def _all_ended(self) -> bool:
        ended = {state.value for state in ENDED_STATES - {OperationState.NEEDS_ATTENTION}}
        table = schema.operation
        query = sa.select(sa.func.count()).select_from(table).where(table.c.state.not_in(ended))
        return self.db.read(lambda session: session.execute(query).scalar_one()) == 0

    def _in_state(self, state: OperationState) -> list[str]:
        table = schema.operation
        return self.db.read(lambda session: list(session.scalars(sa.select(table.c.id).where(table.c.state == state.value))))

    def _live_count(self) -> int:
        table = schema.operation
        query = sa.select(sa.func.count()).select_from(table).where(table.c.ended_at.is_(None))
        return int(self.db.read(lambda session: session.execute(query).scalar_one()))

    def _wait(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}; see {self.plane.directory}/log"
            self._tick()


def _accept_verb(session: Session, vm: Vm, caller: vm_power.Caller, verb: str) -> Operation:
    match verb:
        case "migrate":
            return vm_power.migrate(session, vm, caller, vm_power.MigrateSpec())
        case "stop" | "force":
            return vm_power.stop(session, vm, caller, force=verb == "force", timeout_s=10)
        case "reboot":
            return vm_power.reboot(session, vm, caller, force=False)
        case "pause":
            return vm_power.pause(session, vm, caller)
        case "resume":
            return vm_power.resume(session, vm, caller)
        case _:
            return vm_power.start(session, vm, caller)


def world() -> SimulatedFleet:
    """Return a world in which verbs take a moment, so that faults meet them."""
    latency_s = {"define_domain": 0.02, "change_power": 0.02, "ensure_volume": 0.02, "undefine_domain": 0.02}
    fleet = SimulatedFleet(latency_s=latency_s)
    fleet.shutdown_s = 0.5
    fleet.memory_rate_bytes_s = 256 << 20
    return fleet
