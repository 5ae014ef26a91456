"""Two writers who change networks, routers and floating addresses at once, each on what the other is about to change.

What holds after any two of them: a router that a network names is there; a floating address leads to a card whose network is behind a
router with an outer side on its own network; nobody is on a network that is deleted; who was told that it worked finds it so.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import sqlalchemy as sa

from tests.placement_rows import NOW, ask, found
from trimtab_controller.core.model import Actor, Project, Role
from trimtab_controller.services import floating, networks, projects, routers, vm_nics
from trimtab_controller.services.networks import NetworkSpec, OuterSpec
from trimtab_controller.services.routers import OuterWish
from trimtab_controller.services.vm_nics import NicWish
from trimtab_controller.store import networks as network_rows
from trimtab_controller.store import schema, vms
from trimtab_controller.store.database import Database, Session
from trimtab_protos.errors import TrimtabError

ACTOR = Actor(name="ann", roles={"": Role.ADMIN})
PATIENCE_S = 30
Write = Callable[["Fleet", Session], Any]


@dataclass
class Fleet:
    """Networks app, data and spare, the way out lan; router edge with app behind it and outside on lan; vm web with a card on app."""

    project: Project
    vm_id: str
    ids: dict[str, str] = field(default_factory=dict)

    def network(self, session: Session, name: str, kind: str = "overlay", subnet: str = "", **more: Any) -> None:
        spec = NetworkSpec(name=name, kind=kind, bridges={}, subnet=subnet, **more)
        view, _ = networks.create(session, spec, project=self.project, actor=ACTOR, now=NOW, has_overlay=True)
        self.ids[name] = view.network.id

    def nic(self, session: Session, network: str, index: int) -> None:
        planned = vm_nics.plan_nic(session, self.vm_id, index, NicWish(network=network), project=self.project, field="network")
        self.ids[f"nic{index}"] = vm_nics.insert_nic(session, planned, now=NOW, field="network").id


def attach(router: str, network: str) -> Write:
    return lambda fleet, session: routers.attach(
        session, router, network, project=fleet.project, expected_version=None, actor=ACTOR, now=NOW
    )


def detach(router: str, network: str) -> Write:
    return lambda fleet, session: routers.detach(
        session, router, network, project=fleet.project, expected_version=None, actor=ACTOR, now=NOW
    )


def without_outer(router: str) -> Write:
    return lambda fleet, session: routers.change(
        session, router, OuterWish(network=""), project=fleet.project, expected_version=None, actor=ACTOR, now=NOW
    )


def with_outer(router: str) -> Write:
    return lambda fleet, session: routers.change(
        session, router, OuterWish(network="lan"), project=fleet.project, expected_version=None, actor=ACTOR, now=NOW
    )


def delete_router(router: str) -> Write:
    return lambda fleet, session: routers.delete(
        session, router, project=fleet.project, expected_version=None, actor=ACTOR, now=NOW
    )


def make_behind(router: str) -> Write:
    return lambda fleet, session: fleet.network(session, "fresh", subnet="10.79.0.0/24", router=router)


def hide(network: str) -> Write:
    """The transaction in which the saga of a deletion decides (`delete_network`)."""
    return lambda fleet, session: network_rows.hide_unused(session, fleet.ids[network], now=NOW)


def card(network: str) -> Write:
    return lambda fleet, session: fleet.nic(session, network, 1)


def take_card() -> Write:
    return lambda fleet, session: vms.delete_nic(session, fleet.ids["nic0"])


def lead() -> Write:
    return lambda fleet, session: floating.attach(
        session, "192.0.2.101", vm=fleet.vm_id, nic="", project=fleet.project, expected_version=None, actor=ACTOR, now=NOW
    )


def take_floating(network: str) -> Write:
    return lambda fleet, session: floating.create(
        session, network=network, address="", project=fleet.project, actor=ACTOR, now=NOW
    )


PAIRS: dict[str, tuple[Write, Write, Sequence[Write]]] = {
    # What two do at once, and what was done before.
    "a network gets two routers": (attach("edge", "data"), attach("inner", "data"), ()),
    "a router goes and gets a network": (delete_router("inner"), attach("inner", "data"), ()),
    "a router goes and a network is made behind it": (delete_router("inner"), make_behind("inner"), ()),
    "a network is taken away twice": (detach("edge", "app"), detach("edge", "app"), ()),
    "a network goes and gets a router": (hide("data"), attach("inner", "data"), ()),
    "a network is taken away and led into": (detach("edge", "app"), lead(), (take_floating("lan"),)),
    "an outer side goes and is led through": (without_outer("edge"), lead(), (take_floating("lan"),)),
    "a card goes and is led to": (take_card(), lead(), (take_floating("lan"),)),
    "an outer network goes and is taken": (hide("spare"), take_floating("spare"), ()),
    "an outer network goes and a router comes": (
        hide("lan"), with_outer("inner"), (without_outer("edge"),)
    ),
    "a network goes and gets a card": (hide("data"), card("data"), ()),
    "a network without addresses goes and gets a card": (hide("bare"), card("bare"), ()),
}  # fmt: skip


@pytest.fixture
def fleet(database: Database) -> Fleet:
    _term, ids = found(database, 0)
    vm_id = ask(database, ids, 1, vcpus=1, memory_mib=64)
    project = database.read(lambda session: projects.get(session, "default"))
    made = Fleet(project=project, vm_id=vm_id)

    def work(session: Session) -> None:
        outer = OuterSpec(gateway="192.0.2.1", first="192.0.2.100", last="192.0.2.109")
        made.network(session, "lan", "bridge", "192.0.2.0/24", bridge="br0", outer=outer)
        spare = OuterSpec(gateway="198.51.100.1", first="198.51.100.100", last="198.51.100.109")
        made.network(session, "spare", "bridge", "198.51.100.0/24", bridge="br0", vlan=9, outer=spare)
        made.network(session, "app", subnet="10.70.0.0/24")
        made.network(session, "data", subnet="10.71.0.0/24")
        made.network(session, "bare")
        routers.create(
            session, name="edge", networks=["app"], outer=OuterWish(network="lan"), project=project, actor=ACTOR, now=NOW
        )
        routers.create(session, name="inner", networks=[], outer=OuterWish(network=""), project=project, actor=ACTOR, now=NOW)
        made.nic(session, "app", 0)

    database.write(work)
    return made


@dataclass
class Outcome:
    error: TrimtabError | None = None
    answer: Any = None


@pytest.fixture
def other(database_url: str) -> Iterator[Database]:
    opened = Database(database_url)
    yield opened
    opened.close()


def run_beside(database: Database, other: Database, fleet: Fleet, first: Write, second: Write) -> tuple[Outcome, Outcome]:
    """Run `second` while `first` has written and not yet committed: until it is done, or waits for `first`."""
    outcomes = (Outcome(), Outcome())
    has_begun, is_done = threading.Event(), threading.Event()

    def rival() -> None:
        has_begun.set()
        _try(other, lambda session: second(fleet, session), outcomes[1])
        is_done.set()

    thread = threading.Thread(target=rival)

    def both(session: Session) -> Any:
        answer = first(fleet, session)
        if not thread.ident:
            thread.start()
            assert has_begun.wait(PATIENCE_S)
            _until_held(database, is_done)
        return answer

    _try(database, both, outcomes[0])
    if not thread.ident:
        thread.start()
    thread.join(PATIENCE_S)
    assert is_done.is_set(), "the second writer must come to an end"
    return outcomes


def _until_held(database: Database, is_done: threading.Event) -> None:
    """Wait until the other is done or waits for a lock; on SQLite, which has one writer at a time, it waits already."""
    if database.engine.dialect.name == "sqlite":
        return
    waiting = sa.text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'")
    for _ in range(PATIENCE_S * 100):
        with database.engine.connect() as connection:
            if connection.scalar(waiting):
                return
        if is_done.wait(0.01):
            return
    raise AssertionError("the second writer is neither done nor waiting")


def _try(database: Database, work: Callable[[Session], Any], outcome: Outcome) -> None:
    try:
        outcome.answer = database.write(work)
    except TrimtabError as error:
        outcome.error = error


def wrongs(session: Session) -> list[str]:
    """Return what does not hold."""
    live = {row.id: row for row in session.execute(sa.select(schema.network).where(schema.network.c.deleted_at.is_(None)))}
    there = {
        (row.project_id, row.name): row
        for row in session.execute(sa.select(schema.router).where(schema.router.c.deleted_at.is_(None)))
    }
    nics = {row.id: row for row in session.execute(sa.select(schema.nic))}
    found = [
        f"network {row.name} names router {name}, which is not there"
        for row in live.values()
        if (name := row.settings.get("router")) and (row.project_id, name) not in there
    ]
    found += [f"a card is on a deleted network: {nic.network_id}" for nic in nics.values() if nic.network_id not in live]
    found += [
        f"router {row.name} is on a deleted network"
        for row in there.values()
        if row.outer_network_id and row.outer_network_id not in live
    ]
    for row in session.execute(sa.select(schema.floating).where(schema.floating.c.deleted_at.is_(None))):
        if row.network_id not in live:
            found.append(f"{row.name} is of a deleted network")
        if row.nic_id is not None:
            network = live[nics[row.nic_id].network_id]
            router = there.get((row.project_id, network.settings.get("router", "")))
            if router is None or router.outer_network_id != row.network_id:
                found.append(f"{row.name} leads to {network.name}, where no router brings it")
    return found


@pytest.mark.parametrize("is_turned", [False, True], ids=["as written", "turned"])
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_what_two_writers_change_at_once_stays_whole(
    database: Database, other: Database, fleet: Fleet, pair: tuple[Write, Write, Sequence[Write]], is_turned: bool
) -> None:
    first, second, before = pair
    for write in before:
        database.write(lambda session, write=write: write(fleet, session))  # type: ignore[misc]
    if is_turned:
        first, second = second, first
    outcomes = run_beside(database, other, fleet, first, second)
    assert database.read(wrongs) == []
    assert outcomes[0].error is None, "the first one was there first"


@pytest.mark.parametrize("name", ["edge", "inner"])
def test_who_was_told_that_a_network_is_behind_its_router_finds_it_there(
    database: Database, other: Database, fleet: Fleet, name: str
) -> None:
    rival = {"edge": "inner", "inner": "edge"}[name]
    outcomes = run_beside(database, other, fleet, attach(name, "data"), attach(rival, "data"))
    assert outcomes[1].error is not None
    assert outcomes[1].error.code == "network-has-router"
    view = database.read(lambda session: routers.get(session, name, project=fleet.project))
    assert "data" in view.networks


@pytest.mark.parametrize(
    ("network", "coming"),
    [("bare", card("bare")), ("data", card("data")), ("spare", take_floating("spare")), ("data", attach("inner", "data"))],
    ids=["card", "card with an address", "floating address", "router"],
)
def test_a_network_that_is_deleted_meanwhile_says_so_to_who_comes(
    database: Database, other: Database, fleet: Fleet, network: str, coming: Write
) -> None:
    outcomes = run_beside(database, other, fleet, hide(network), coming)
    assert outcomes[1].error is not None
    assert outcomes[1].error.code == "network-not-found"
