"""Tells of troubles of hosts that live, once as each begins and once when it is over, and counts them.

What was told is on record as events, so a new leader goes on where the last one stopped. An end is told only after the host was well
for a while: a link that flaps is told of once.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from trimtab_controller import metrics
from trimtab_controller.clock import Clock
from trimtab_controller.core.host_troubles import Trouble, TroubleKind
from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.store import events, failover, host_troubles, hosts, pools
from trimtab_controller.store.database import Session
from trimtab_controller.store.host_troubles import Carriers
from trimtab_controller.store.hosts import Standing

STEADY_S = 10.0
BEGUN = {TroubleKind.NETWORK: "alarm.network-degraded", TroubleKind.STORAGE: "alarm.storage-lost"}
OVER = {TroubleKind.NETWORK: "host.network_restored", TroubleKind.STORAGE: "host.storage_restored"}

Key = tuple[str, TroubleKind, str]
"""Host, kind and what it is about."""
Write = Callable[[Callable[[Session], Any]], Any]


class Troubles:
    """Belongs to the failover loop's thread."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._carriers = Carriers()
        self._told: set[Key] = set()
        # Since when what was told of is over.
        self._well_since_s: dict[Key, float] = {}

    def read(self, session: Session) -> Mapping[str, tuple[Trouble, ...]]:
        """Return what is wrong with each host that is up."""
        return host_troubles.read(session, now=self._clock.now(), lost=self._carriers.read(session))

    def begin(self, session: Session) -> None:
        """Take up what earlier leaders told."""
        self._told, self._well_since_s = set(), {}
        begun = {kind: trouble for trouble, kind in BEGUN.items()}
        over = {kind: trouble for trouble, kind in OVER.items()}
        for event in events.of_kinds(session, (*begun, *over), [one.id for one in hosts.standings(session)]):
            key = (event.subject_id, begun.get(event.kind) or over[event.kind], str(event.context.get("what", "")))
            (self._told.add if event.kind in begun else self._told.discard)(key)

    def tell(self, seen: Mapping[str, tuple[Trouble, ...]], standings: Mapping[str, Standing], write: Write) -> None:
        """Record what began and what is over, and count."""
        present = {(host_id, one.kind, one.what): one for host_id, troubles in seen.items() for one in troubles}
        for key, trouble in present.items():
            self._well_since_s.pop(key, None)
            host = standings.get(key[0])
            if key not in self._told and host is not None:
                write(partial(self._note_begin, host=host, trouble=trouble))
                self._told.add(key)
        for key in sorted(self._told - present.keys()):
            self._end(key, standings.get(key[0]), write)
        counted = Counter(kind for _host_id, kind in {(host_id, kind) for host_id, kind, _what in present})
        for kind in TroubleKind:
            metrics.HOSTS_DEGRADED.labels(kind.value).set(counted[kind])

    def _end(self, key: Key, host: Standing | None, write: Write) -> None:
        now_s = self._clock.boottime_s()
        if host is None:
            self._told.discard(key)  # it is no member any more
        elif host.connectivity is not HostConnectivity.UP:
            self._well_since_s.pop(key, None)  # nobody says how it is
        elif now_s - self._well_since_s.setdefault(key, now_s) >= STEADY_S:
            write(partial(self._note_end, host=host, key=key))
            self._told.discard(key)
            del self._well_since_s[key]

    def _note_begin(self, session: Session, *, host: Standing, trouble: Trouble) -> None:
        if trouble.kind is TroubleKind.NETWORK:
            text = f"{host.name} is network-degraded: {trouble.message}; its guests run on, new ones that need it go elsewhere"
        else:
            text = (
                f"{host.name}: storage lost: {trouble.message}, but it answers another host; new guests that need it go elsewhere"
            )
        self._append(session, BEGUN[trouble.kind], host, trouble.what, text)

    def _note_end(self, session: Session, *, host: Standing, key: Key) -> None:
        _host_id, kind, what = key
        if kind is TroubleKind.NETWORK:
            text = f"{host.name} is network-degraded no more: bridge {what} has its carrier again, or no network uses it"
        else:
            pool = next((one for one in pools.live(session) if one.id == what), None)
            is_ready = any(one.pool_id == what and one.state == "ready" for one in pools.on_host(session, host.id))
            why = "answers again" if is_ready else "is no trouble of this host alone any more, or of none of its vms"
            text = f"{host.name}: storage lost no more: pool {pool.name if pool else what} {why}"
        self._append(session, OVER[kind], host, what, text)

    def _append(self, session: Session, kind: str, host: Standing, what: str, text: str) -> None:
        now = self._clock.now()
        events.append(
            session, kind=kind, subject_id=host.id, actor=failover.SYSTEM, message=text, context={"what": what}, now=now
        )
