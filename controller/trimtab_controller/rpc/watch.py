"""The gateway's clockwork: keeps its right, mirrors host states, writes pools' figures, judges silence, drops who must go.

Silence is judged only while this gateway itself is well: its granting right lives and its loop was not held up. A gateway that
was paused first gives the heartbeats that queued up meanwhile a lease's length to arrive.
"""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime

import structlog

from trimtab_controller import metrics
from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.rpc.gateway import Gateway
from trimtab_controller.rpc.host_states import HostState, HostStateMirror
from trimtab_controller.rpc.sessions import superseded
from trimtab_controller.services import sessions
from trimtab_controller.store import behind, certificates, host_reports, hosts
from trimtab_controller.store.database import Session
from trimtab_protos.errors import NotFound, PermissionDenied, TrimtabError

log = structlog.get_logger(__name__)

TICK_S = 1.0
HELD_UP_S = 2.0
MEMBERS_EVERY_S = 5.0
REVOCATIONS_EVERY_S = 1.0
ORPHANS_EVERY_S = 5.0
BUNDLE_EVERY_S = 5.0
STRANGERS_EVERY_S = 600.0
RESERVE_EVERY_S = 60.0
HAND_OVER_WITHIN_MS = 2_000
"""What is left of a lease when its gateway may not renew it any more is enough for some tries, not for a long spread."""
RECONNECT_WITHIN_MS = 15_000
"""A thousand hosts that reconnect at once would cost a second of a core in handshakes, and their heartbeats' punctuality."""


class Watch:
    """Runs each part in a task of its own; a part that fails is logged and tried again at its next round."""

    def __init__(self, gateway: Gateway, mirror: HostStateMirror) -> None:
        self._gateway = gateway
        self._mirror = mirror
        self._ticked_s = gateway.clock.boottime_s()
        self._judging_from_s = self._ticked_s + gateway.settings.lease_ttl_s
        self._judging: set[asyncio.Task[None]] = set()
        # Host -> (its lease number, since when nobody has it).
        self._orphans: dict[str, tuple[int, float]] = {}
        self._bundle = gateway.pki.bundle_sha256()
        self._has_handed_over = False

    async def run(self) -> None:
        """Run until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._gateway.committer.run())
            group.create_task(self._every(self._gateway.settings.lease_renew_s, self.renew))
            group.create_task(self._every(REVOCATIONS_EVERY_S, self.learn))
            group.create_task(self._every(TICK_S, self.hand_over))
            group.create_task(self._every(TICK_S, self.judge))
            group.create_task(self._every(TICK_S, self.mirror))
            group.create_task(self._every(TICK_S, self.write_pools))
            group.create_task(self._every(MEMBERS_EVERY_S, self.check_members))
            group.create_task(self._every(ORPHANS_EVERY_S, self.judge_orphans))
            group.create_task(self._every(STRANGERS_EVERY_S, self.drop_strangers))
            group.create_task(self._every(BUNDLE_EVERY_S, self.announce_bundle))
            group.create_task(self._every(RESERVE_EVERY_S, self.keep_reserve))

    async def _every(self, period_s: float, part: Callable[[], Awaitable[object]]) -> None:
        while True:
            try:
                await part()
            except TrimtabError as error:
                log.warning("gateway part failed", part=part.__name__, error=error.message, code=error.code)
            except Exception:
                log.exception("gateway part failed", part=part.__name__)
            await asyncio.sleep(period_s)

    # --- our own right -------------------------------------------------------------------------------------------------------

    async def renew(self) -> None:
        await self._gateway.right.renew()

    async def hand_over(self) -> None:
        """Ask the hosts to go to another gateway once our right to grant has ended: cut off from the database, we renew no lease.

        Not before: where every gateway is cut off, hosts lose nothing that we could still have granted. Hosts would stay by
        themselves, since their heartbeats are answered, until their leases have ended.
        """
        gateway = self._gateway
        if gateway.right.is_alive:
            self._has_handed_over = False
            return
        if self._has_handed_over or not gateway.right.live_peers:
            return
        self._has_handed_over = True
        log.warning("granting right has ended; hosts are sent to other gateways", sessions=len(gateway.sessions))
        await asyncio.gather(*(session.ask_to_reconnect(HAND_OVER_WITHIN_MS) for session in list(gateway.sessions.values())))

    async def keep_reserve(self) -> None:
        """Keep disk space for our right to grant; see `store/disk_reserve.py`."""
        await asyncio.to_thread(self._gateway.database.reserve.fill)

    async def learn(self) -> None:
        """Stop for revoked hosts, end sessions whose certificates were revoked, and learn the mark that hosts are told."""
        gateway = self._gateway
        await gateway.right.learn_revocations(gateway.granted_ago_ms)
        now = gateway.clock.now()
        revoked, gateway.database_mark = await asyncio.to_thread(
            gateway.database.read, lambda session: (certificates.revoked_serials(session, now), behind.mark(session))
        )
        for session in [one for one in gateway.sessions.values() if one.peer.serial in revoked]:
            log.info("session of a revoked certificate ended", host_id=session.host_id)
            session.end(PermissionDenied("certificate-revoked", "this host's certificate was revoked; join it again"))

    # --- what others read ------------------------------------------------------------------------------------------------------

    async def mirror(self) -> None:
        gateway = self._gateway
        changed, gateway.changed = gateway.changed, set()
        states = gateway.states.values()
        metrics.CLOCK_SKEW_SECONDS.set(max((abs(state.skew_ms) for state in states), default=0) / 1000)
        metrics.HOSTS_WITHOUT_BEACON.set(sum(1 for state in states if state.beacon_problem))
        metrics.UNARMED_HOSTS.set(sum(1 for state in states if not state.is_warden_armed))
        if not await self._mirror.write(gateway.states, changed, boottime_s=gateway.clock.boottime_s()):
            gateway.changed |= changed

    async def write_pools(self) -> None:
        gateway = self._gateway
        if not gateway.pool_reports:
            return
        reports, gateway.pool_reports = list(gateway.pool_reports.values()), {}
        now = gateway.clock.now()
        await asyncio.to_thread(
            gateway.database.write,
            lambda session: host_reports.store_pools(session, reports, now=now),
            durable=False,
        )

    # --- silence ---------------------------------------------------------------------------------------------------------------

    def may_judge(self) -> bool:
        """Tell whether silence means anything now; to be asked once per tick."""
        gateway = self._gateway
        now_s, before_s = gateway.clock.boottime_s(), self._ticked_s
        self._ticked_s = now_s
        if now_s - before_s > TICK_S + HELD_UP_S or not gateway.right.is_alive:
            self._judging_from_s = now_s + gateway.settings.lease_ttl_s
        return now_s >= self._judging_from_s

    async def judge(self) -> None:
        if not self.may_judge():
            return
        now_s, settings = self._gateway.clock.boottime_s(), self._gateway.settings
        for state in list(self._gateway.states.values()):
            silent_s = now_s - state.heard_boottime_s
            to = _judgement(state.connectivity, silent_s, suspect_s=settings.suspect_after_s, lost_s=settings.lost_after_s)
            if to is not None and not state.is_changing:
                state.is_changing = True
                task = asyncio.create_task(self._change(state, to))
                self._judging.add(task)
                task.add_done_callback(self._judging.discard)

    async def _change(self, state: HostState, to: HostConnectivity) -> None:
        gateway, now = self._gateway, self._gateway.clock.now()
        try:
            is_written = await gateway.committer.commit(
                lambda session: sessions.change_connectivity(session, state.host_id, to, lease_number=state.lease_number, now=now)
            )
        except TrimtabError as error:
            log.warning("connectivity not written", host_id=state.host_id, to=to.value, error=error.message)
            return
        finally:
            state.is_changing = False
        if is_written:
            state.connectivity = to
            gateway.changed.add(state.host_id)
            log.info("host connectivity", host_id=state.host_id, host=state.name, connectivity=to.value)
        elif gateway.states.get(state.host_id) is state:
            gateway.forget(state.host_id, superseded(state.host_id))

    async def judge_orphans(self) -> None:
        """Judge the silence of hosts that no living gateway has a session with: ours ended before we began, or theirs died.

        A host's silence counts from when we saw that nobody has it: so each has a whole window to come back, to us or another.
        """
        gateway, now_s, settings = self._gateway, self._gateway.clock.boottime_s(), self._gateway.settings
        if not gateway.right.is_alive or now_s < self._judging_from_s:
            self._orphans.clear()
            return
        known = await asyncio.to_thread(gateway.database.read, hosts.heard)
        orphans = {host.host_id: host for host in known if self._is_orphan(host)}
        self._orphans = {host_id: self._since(host, now_s) for host_id, host in orphans.items()}
        for host_id, host in orphans.items():
            silent_s = now_s - self._orphans[host_id][1]
            to = _judgement(host.connectivity, silent_s, suspect_s=settings.suspect_after_s, lost_s=settings.lost_after_s)
            if to in {HostConnectivity.SUSPECT, HostConnectivity.LOST}:
                await gateway.committer.commit(_suspicion(host, to, gateway.clock.now()))
                log.info("host connectivity", host_id=host_id, connectivity=to.value, last_gateway_id=host.gateway_id)

    def _is_orphan(self, host: hosts.Heard) -> bool:
        """Of a host whose gateway is not known (it connected to an older release) any other gateway may have the session."""
        peers = self._gateway.right.live_peers
        return host.host_id not in self._gateway.states and (host.gateway_id not in peers if host.gateway_id else not peers)

    def _since(self, host: hosts.Heard, now_s: float) -> tuple[int, float]:
        known = self._orphans.get(host.host_id)
        return known if known is not None and known[0] == host.lease_number else (host.lease_number, now_s)

    # --- members ---------------------------------------------------------------------------------------------------------------

    async def check_members(self) -> None:
        """Drop hosts that were removed, and sessions that are not their hosts' newest any more."""
        gateway = self._gateway
        ours = {host_id: state.lease_number for host_id, state in gateway.states.items()}
        if not ours:
            return
        present = await asyncio.to_thread(gateway.database.read, lambda session: hosts.lease_numbers(session, list(ours)))
        removed = [host_id for host_id in ours if host_id not in present]
        for host_id in removed:
            gateway.forget(host_id, NotFound("host-removed", "this host was removed from the fleet", host_id=host_id))
        await self._mirror.forget(removed, boottime_s=gateway.clock.boottime_s())
        for host_id, number in ours.items():
            state = gateway.states.get(host_id)
            if state is not None and state.lease_number == number and present.get(host_id, number) > number:
                gateway.forget(host_id, superseded(host_id))

    async def drop_strangers(self) -> None:
        """Clean Redis of hosts that were removed while this gateway was not there."""
        members = await asyncio.to_thread(self._gateway.database.read, hosts.member_ids)
        await self._mirror.forget_all_but(members, boottime_s=self._gateway.clock.boottime_s())

    async def announce_bundle(self) -> None:
        """After a stage of a CA rotation, ask hosts to reconnect: the Welcome tells them of the new bundle, and they renew."""
        gateway = self._gateway
        present = await asyncio.to_thread(gateway.pki.bundle_sha256)
        if present == self._bundle:
            return
        self._bundle = present
        log.info("the CA bundle changed, hosts are asked to reconnect", sessions=len(gateway.sessions))
        for session in list(gateway.sessions.values()):
            await session.ask_to_reconnect(RECONNECT_WITHIN_MS)


def _judgement(present: HostConnectivity, silent_s: float, *, suspect_s: float, lost_s: float) -> HostConnectivity | None:
    """Return what the silence makes of a host, None for no change; suspect is never skipped."""
    match present:
        case HostConnectivity.UP if silent_s > suspect_s:
            return HostConnectivity.SUSPECT
        case HostConnectivity.SUSPECT if silent_s > lost_s:
            return HostConnectivity.LOST
        case HostConnectivity.SUSPECT | HostConnectivity.LOST if silent_s <= suspect_s:
            return HostConnectivity.UP
    return None


def _suspicion(host: hosts.Heard, to: HostConnectivity, now: datetime) -> Callable[[Session], bool]:
    return lambda session: sessions.change_connectivity(session, host.host_id, to, lease_number=host.lease_number, now=now)
