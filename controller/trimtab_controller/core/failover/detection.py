"""Who is silent, since when, and whether silence means anything. Suspect, lost and fenced are separate and none is skipped.

Silence counts only while we are well: a leader that was paused, restarted or without its own lease gives everybody a full window.
More than `breaker_limit` hosts lost at once makes us suspect ourselves: failover freezes, and says so.
"""

from dataclasses import replace

from trimtab_controller.core.failover.draft import Draft
from trimtab_controller.core.failover.effects import ResumeGranting, SetStanding
from trimtab_controller.core.failover.events import LeaderStarted, Renewed, Tick
from trimtab_controller.core.failover.records import NEVER_S, Closing, Evidence, HostRecord, Proof
from trimtab_controller.core.lifecycle import HostConnectivity

LIVES_BY_BEACON = "management is lost; it lives by its beacon"
_SILENT = frozenset({HostConnectivity.SUSPECT, HostConnectivity.LOST})


def start_leading(draft: Draft, _event: LeaderStarted) -> None:
    """Forget every instant of another clock; each lease counts as renewed now, each host gets a full window."""
    draft.judging_from_s = draft.started_s = draft.ticked_s = draft.now
    for host in list(draft.hosts.values()):
        draft.put(
            replace(
                host,
                heard_s=NEVER_S,
                handled_s=NEVER_S,
                since_s=draft.now,
                # Asked again: whether the old leader's power action took place is unknown, and "off" is an ensure.
                power=replace(host.power, is_under_way=False, at_s=NEVER_S) if host.power else None,
                # Granting that has ended stays ended: that is a committed row. It is counted from our own start nevertheless.
                intent_s=draft.now if host.intent_s is not None else None,
                intent_is_proven=False,
                closing_since_s=draft.now,
                has_listed=False,
                losses=tuple(draft.now for _loss in host.losses),
                quarantined_until_s=draft.now + draft.settings.steady_s if host.losses else NEVER_S,
            )
        )
    for vm in list(draft.vms.values()):
        draft.put_vm(
            replace(vm, since_s=draft.now, not_before_s=NEVER_S, crashes=tuple(draft.now for _crash in vm.crashes), ran_s=NEVER_S)
        )


def hear(draft: Draft, event: Renewed) -> None:
    """Take a renewal. One that was not granted, or whose acknowledgements the host does not see, proves no lease."""
    host = draft.hosts.get(event.host)
    if host is None:
        return
    handled_s = max(host.handled_s, event.at_s) if event.is_granted else host.handled_s
    is_first = host.standing is HostConnectivity.NEW
    counts = event.is_granted and (event.is_lease_live or is_first or host.heard_s == NEVER_S)
    degraded = tuple(
        text
        for is_wrong, text in (
            (event.is_granted and not event.is_lease_live and not counts, "renewals arrive, acknowledgements are lost"),
            (not event.has_uplink, "network-degraded: the guests' uplink is lost"),
            (not event.has_storage, "storage is lost"),
            (not event.takes_commands, "commands do not reach it"),
            (event.is_beacon, LIVES_BY_BEACON),
        )
        if is_wrong
    )
    # What a host that was away comes back as is judged when it has listed what it holds (`recovery.session_opened`).
    is_away = host.standing in {HostConnectivity.LOST, HostConnectivity.FENCED}
    host = replace(
        host,
        handled_s=handled_s,
        heard_s=max(host.heard_s, event.at_s) if counts else host.heard_s,
        is_armed=event.is_armed,
        kill_s=max(event.kill_s, 0.0),
        boot_id=host.boot_id if is_away else event.boot_id or host.boot_id,
        degraded=degraded,
        has_storage=event.has_storage,
        lost_pools=event.lost_pools,
        has_storage_since_s=host.has_storage_since_s if host.has_storage == event.has_storage else draft.now,
    )
    draft.put(host)
    if is_first and counts:
        stand(draft, host, HostConnectivity.UP, "first renewal")


def stand(draft: Draft, host: HostRecord, standing: HostConnectivity, what: str, proof: Proof | None = None) -> HostRecord:
    """Change the standing with its line of evidence, and have both recorded."""
    line = Evidence(at_s=draft.now, what=what, proof=proof)
    kept = () if standing is HostConnectivity.SUSPECT and host.standing is HostConnectivity.UP else host.evidence
    host = replace(host, standing=standing, since_s=draft.now, evidence=(*kept, line), proof=proof)
    draft.do(SetStanding(host=host.id, standing=standing, evidence=host.evidence, proof=proof))
    return draft.put(host)


def judge(draft: Draft, tick: Tick) -> bool:
    """Judge every host's silence. False where we may not judge at all now."""
    is_held_up = draft.now - draft.ticked_s > draft.settings.held_up_s
    draft.ticked_s = draft.now
    if is_held_up or not tick.has_lease or not tick.has_uplink:
        draft.judging_from_s = draft.now
    if not tick.has_lease:
        return False
    for host in [one for one in draft.hosts.values() if one.standing is not HostConnectivity.NEW]:
        _judge_host(draft, host)
    _judge_ourselves(draft)
    return True


def _judge_host(draft: Draft, host: HostRecord) -> None:
    silent_s = draft.silent_s(host)
    is_heard = draft.now - host.heard_s <= draft.settings.suspect_after_s
    if host.standing is HostConnectivity.UP and silent_s > draft.settings.suspect_after_s:
        stand(draft, host, HostConnectivity.SUSPECT, f"no renewal for {silent_s:.1f} s")
    elif host.standing is HostConnectivity.SUSPECT and is_heard:
        stand(draft, _flapped(draft, host), HostConnectivity.UP, "renews again")
    elif host.standing is HostConnectivity.SUSPECT and silent_s > draft.settings.lost_after_s:
        host = replace(host, was_armed_at_loss=host.is_armed)
        if host.closing is Closing.NO:
            host = _flapped(draft, host)
        stand(draft, host, HostConnectivity.LOST, f"no renewal for {silent_s:.1f} s")


def _flapped(draft: Draft, host: HostRecord) -> HostRecord:
    """Count a loss: a host that was silent takes no new guests until it was heard for a while, longer after each loss."""
    settings = draft.settings
    losses = (*(at for at in host.losses if draft.now - at < settings.flap_window_s), draft.now)
    quarantine_s = min(settings.steady_s * 2 ** (len(losses) - 1), settings.steady_max_s)
    if len(losses) == 3:
        draft.alarm(host.id, "host-flaps", f"{host.id} was silent {len(losses)} times within an hour; it takes no new guests")
    return replace(host, losses=losses, quarantined_until_s=draft.now + quarantine_s)


def _judge_ourselves(draft: Draft) -> None:
    settings = draft.settings
    members = [host for host in draft.hosts.values() if host.standing is not HostConnectivity.NEW]
    silent = [host for host in members if _counts_as_lost(draft, host)]
    limit = settings.breaker_limit(len(members))
    if len(silent) > limit:
        if not draft.frozen:
            names = ", ".join(sorted(host.id for host in silent)[:5])
            draft.frozen = (
                f"{len(silent)} of {len(members)} hosts are lost at once ({names}), more than {limit}: the fault may be ours; "
                "nothing is fenced until hosts return or an operator releases them with `trimtab failover release HOST`"
            )
            draft.alarm("failover", "failover-frozen", draft.frozen)
    elif draft.frozen:
        # Those that are still on their way back get a full window, else the last one would be fenced a second before it renews.
        draft.frozen = ""
        draft.judging_from_s = draft.now


def _counts_as_lost(draft: Draft, host: HostRecord) -> bool:
    if host.is_released or host.closing is not Closing.NO or host.proof in {Proof.CLEAN_STOP, Proof.OPERATOR}:
        return False
    if host.standing in _SILENT:
        return draft.now - host.heard_s > draft.settings.suspect_after_s
    is_fenced = host.standing is HostConnectivity.FENCED
    return is_fenced and draft.now - host.since_s < draft.settings.breaker_window_s


def return_to_service(draft: Draft, host: HostRecord, what: str) -> HostRecord:
    """Let a host that was lost or fenced renew again, with a full window; it starts nothing by itself."""
    host = replace(
        host,
        heard_s=draft.now,
        power=None,
        ends_granting_since_s=None,
        granting_ended=False,
        intent_s=None,
        intent_is_proven=False,
        clean_vms=None,
        is_released=False,
        closing=Closing.NO,
        may_go_down=False,
    )
    draft.do(ResumeGranting(host=host.id))
    return stand(draft, host, HostConnectivity.UP, what)
