"""Scenarios about queue, database and join run on the real engine, the real store (SQLite) and real agents on simulated hosts."""

import contextlib
import random
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from tests.operations.examples import EXAMPLES
from tests.operations.faults import DriverDied, MortalDatabase
from tests.operations.invariants import audit_invariants
from tests.operations.kit import FleetStory
from tests.operations.wire import Workshop
from trimtab_controller.core.lifecycle import ENDED_STATES, OperationState
from trimtab_controller.core.migration import refusals
from trimtab_controller.core.model import Actor
from trimtab_controller.services import hosts as host_service
from trimtab_controller.services.hosts import HostFacts
from trimtab_controller.store import describe, hosts, migrate, operations
from trimtab_controller.store.database import Database, Session
from trimtab_protos.errors import Unavailable

T = TypeVar("T")
CUT_KINDS = ("vm.create", "vm.start", "vm.stop", "vm.migrate", "vm.delete")


@contextlib.contextmanager
def fleet_story() -> Iterator[FleetStory]:
    directory = Path(tempfile.mkdtemp(prefix="tt-"))
    workshop = Workshop()
    database = Database(f"sqlite:///{directory / 'fleet.db'}")
    try:
        migrate.upgrade(f"sqlite:///{directory / 'fleet.db'}")
        story = FleetStory(database, workshop, directory)
        yield story
        story.close()
    finally:
        database.close()
        workshop.close()
        shutil.rmtree(directory, ignore_errors=True)


def _ends(story: FleetStory, ids: list[str]) -> list[OperationState]:
    return [story.operation(one).state for one in ids]


def operations_end_without_their_messages(*, count: int) -> None:
    """No nudge is ever delivered: what is due is found in SQL."""
    with fleet_story() as story:
        ids = [story.accept_create(f"web{number}", memory_mib=128, vcpus=1)[1].id for number in range(count)]
        story.settle()
        states = _ends(story, ids)
        assert all(state in ENDED_STATES for state in states), states
        assert states.count(OperationState.DONE) == count, states
        assert audit_invariants(story) == []


def a_second_delivery_finds_the_running_attempt(*, after_s: float) -> None:
    """Two messages for the same work: the row's lease and turn decide, and the guest is started once."""
    with fleet_story() as story:
        vm, operation = story.accept_create("web1")
        story.placement.run(story.term)
        second = story.new_engine()
        both = [threading.Thread(target=engine.drive_due) for engine in (story.engine, second)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join(timeout=30)
        story.clock.advance(after_s)
        second.drive_due()
        story.settle(second)
        assert story.operation(operation.id).state is OperationState.DONE
        starts = [entry for entry in story.fleet.oracle if entry.event == "start" and entry.vm_id == vm.id]
        assert len(starts) == 1
        done = [line for line in story.journal(operation.id) if line.startswith("do ")]
        assert len(done) == len(set(done)), "each step is recorded once"


class AbortingDatabase:
    """Aborts part of all write transactions before their commit, as serialization failures do."""

    def __init__(self, real: Database, rate: float) -> None:
        self._real, self._rate, self._rng = real, rate, random.Random(1)
        self.aborted = 0

    def read(self, query: Callable[[Session], T]) -> T:
        return self._real.read(query)

    def write(self, transaction: Callable[[Session], T], *, durable: bool = True) -> T:
        if self._rng.random() >= self._rate:
            return self._real.write(transaction, durable=durable)
        self.aborted += 1

        def cut(session: Session) -> Any:
            transaction(session)
            raise Unavailable("database-conflict", "serialization failure")

        return self._real.write(cut, durable=durable)


def operations_end_once_although_half_of_the_commits_abort(*, rate: float) -> None:
    with fleet_story() as story:
        ids = [story.accept_create(f"web{number}", memory_mib=128, vcpus=1)[1].id for number in range(6)]
        database = AbortingDatabase(story.db, rate)
        engine = story.new_engine(db=database)
        for _round in range(400):
            story.placement.run(story.term)
            with contextlib.suppress(Unavailable):
                engine.drive_due()
            story.wait_for_jobs()
            story.clock.advance(5)
            if all(state in ENDED_STATES for state in _ends(story, ids)):
                break
        assert database.aborted > 10
        assert all(state in ENDED_STATES for state in _ends(story, ids)), _ends(story, ids)
        for one in ids:
            events = story.db.read(lambda session, one=one: operations.journal_of(session, one))
            done = [entry.step for entry in events if entry.has_succeeded and entry.direction.value == "do"]
            assert len(done) == len(set(done)), done
        story.hear_hosts()
        assert audit_invariants(story) == []


def every_step_survives_the_death_of_its_worker() -> None:
    """A driver dies before each of its commits; another finishes or undoes what it left."""
    with fleet_story() as story:
        for example in [EXAMPLES[name] for name in sorted(EXAMPLES) if EXAMPLES[name].kind in CUT_KINDS]:
            for number in range(1, 100):
                operation = example.arrange(story)
                database = MortalDatabase(story.db, number, after_commit=False)
                try:
                    story.settle(story.new_engine(db=database))
                except DriverDied:
                    story.lose_driver()
                    story.settle(story.new_engine())
                assert story.operation(operation.id).state in ENDED_STATES
                assert audit_invariants(story) == [], (example.kind, number)
                if not database.has_died:
                    break


def second_host_with_the_same_identity() -> str:
    """A machine with the identity of a member asks to join under another name: refused, and nothing is written."""
    with fleet_story() as story:
        first = story.db.read(lambda session: hosts.get(session, story.host_ids[1]))
        now = story.clock.now()
        place = host_service.JoinPlace(api_url="https://127.0.0.1:7443", ca_fingerprint="0" * 64)
        token = story.db.write(lambda session: host_service.create_token(session, "h4", Actor(name="admin"), now, place=place))
        facts = HostFacts(
            name="h4",
            machine_id=first.machine_id,
            smbios_uuid=first.smbios_uuid,
            agent_version="0.1.0",
            agent_address="127.0.0.9:7444",
            migration_address="127.0.0.9",
            sent_unix_ms=int(now.timestamp() * 1000),
        )
        assessment = story.db.read(lambda session: host_service.assess(session, token.secret, facts, now))
        codes = {refusal.code for refusal in assessment.refusals}
        return "refused" if {"host-machine-id-taken", "host-smbios-uuid-taken"} <= codes else f"{codes}"


def a_host_that_lacks_a_feature_is_refused_by_its_name() -> None:
    """The controller asks what an older host lacks: the refusal says which host lacks what."""
    with fleet_story() as story:
        vm = story.running_vm("web1")
        spec = story.db.read(lambda session: describe.domain_spec(session, describe.read_vm(session, vm.id), vm.host_id))
        here = story.hypervisor(vm.host_id)
        other = story.hypervisor(next(host for host in story.host_ids if host != vm.host_id))
        lacking = replace(other.inventory(), machines=())
        seen = {"source_seen": here.observe_domain(vm.id), "target_seen": other.observe_domain(vm.id)}
        found = refusals(spec, source=here.inventory(), target=lacking, **seen)
        assert any(lacking.hostname in line and "machine type" in line for line in found), found
