"""The ladder: makes certain that a lost host can no longer write, at the first rung that holds.

    1  its agent confirmed a clean stop
    2  power off, and the status read back as off
    3  the lease bound passed, where the warden was proven armed with the last renewal; with a beacon, since the fence intent was
       durable in its slot, and it stands there still
    4  an operator confirms by name
A host that holds nothing of ours is not switched off. While a power action is under way the host does not come back.
"""

from dataclasses import replace

from trimtab_controller.core.failover.detection import stand
from trimtab_controller.core.failover.draft import Draft
from trimtab_controller.core.failover.effects import EndGranting, PowerOff, ProveIntent, Refuse, WriteIntent
from trimtab_controller.core.failover.events import ConfirmedOff, GrantingEnded, IntentProven, IntentWritten, PowerAnswered
from trimtab_controller.core.failover.records import NEVER_S, Closing, Desired, HostRecord, PowerTry, Proof
from trimtab_controller.core.failover.recovery import let_go
from trimtab_controller.core.lifecycle import HostConnectivity


def climb(draft: Draft) -> None:
    """Take every lost host one step further, unless failover is frozen."""
    for host in sorted(draft.hosts.values(), key=lambda one: one.id):
        if host.standing is not HostConnectivity.LOST or (draft.is_paused and not host.is_released):
            continue
        if draft.frozen and not host.is_released and host.clean_vms is None:
            continue
        if draft.silent_s(host) <= draft.settings.lost_after_s or not _is_wanted(draft, host):
            continue
        _climb(draft, host)


def _is_wanted(draft: Draft, host: HostRecord) -> bool:
    has_stopped = any(vm.desired is Desired.STOPPED for vm in draft.at_home_on(host.id))
    return has_stopped or any(vm.is_kept or vm.desired is Desired.DELETED for vm in draft.held_by(host.id))


def _climb(draft: Draft, host: HostRecord) -> None:
    if host.ends_granting_since_s is None:
        host = draft.put(replace(host, ends_granting_since_s=draft.now))
    if not host.granting_ended:
        draft.do(EndGranting(host=host.id))
    if host.intent_s is None:
        draft.do(WriteIntent(host=host.id))
    if host.clean_vms is not None:
        fence(draft, host, Proof.CLEAN_STOP, "its agent confirmed that its guests had ended before it went down")
    elif _has_bound_passed(draft, host) and _has_intent_held(draft, host):
        from_s = _counted_from_s(draft, host)
        fence(draft, host, Proof.LEASE_BOUND, f"its lease ended: {draft.now - from_s:.1f} s since the last renewal or intent")
    elif host.closing is not Closing.FREEZE and draft.held_by(host.id):
        _switch_off(draft, host)


# --- rung 2 ------------------------------------------------------------------------------------------------------------------


def _switch_off(draft: Draft, host: HostRecord) -> None:
    power, settings = host.power, draft.settings
    if not host.power_paths:
        if not host.was_armed_at_loss and power is None:
            draft.put(replace(host, power=PowerTry(path="", number=0, at_s=draft.now, is_under_way=False)))
            _alarm_stuck(draft, host)
        return
    if power is not None and power.is_under_way:
        if draft.now - power.at_s <= settings.power_timeout_s:
            return
        host = draft.note(host, f"power off by {power.path} did not answer within {settings.power_timeout_s:.0f} s: unknown")
    number = power.number if power else 0
    has_tried_all = number > 0 and number % len(host.power_paths) == 0
    if power is not None and has_tried_all and draft.now - power.at_s < settings.power_retry_s:
        return
    path = host.power_paths[number % len(host.power_paths)]
    draft.put(replace(host, power=PowerTry(path=path, number=number + 1, at_s=draft.now, is_under_way=True)))
    draft.do(PowerOff(host=host.id, path=path, number=number + 1))


def power_answered(draft: Draft, event: PowerAnswered) -> None:
    """Take what a power device said; an answer that comes late, or to a question of another leader, changes nothing."""
    host = draft.hosts.get(event.host)
    if host is None:
        return
    is_awaited = host.power is not None and host.power.is_under_way and host.power.number == event.number
    if host.standing is not HostConnectivity.LOST or not is_awaited:
        draft.note(host, f"late answer of power device {event.path}: {'off' if event.is_off else event.message}")
        return
    assert host.power is not None
    host = draft.put(replace(host, power=replace(host.power, is_under_way=False, at_s=draft.now)))
    if event.is_off:
        fence(draft, host, Proof.POWER_OFF, f"switched off by {event.path}, and its status read back as off")
        return
    host = draft.note(host, f"power off by {event.path} failed: {event.message}")
    _alarm_stuck(draft, host)


def _alarm_stuck(draft: Draft, host: HostRecord) -> None:
    rest = (
        "its guests restart when its lease has surely ended"
        if host.was_armed_at_loss
        else f'its warden was not armed, so its guests wait: `trimtab host confirm-off {host.id} --reason "..."`'
    )
    draft.alarm(host.id, "fence-failed", f"{host.id} could not be switched off; {rest}")


# --- rung 3 ------------------------------------------------------------------------------------------------------------------


def _counted_from_s(draft: Draft, host: HostRecord) -> float:
    intent_s = host.intent_s if host.intent_s is not None else NEVER_S
    return max(host.handled_s, intent_s, draft.started_s)


def _has_bound_passed(draft: Draft, host: HostRecord) -> bool:
    if not (host.was_armed_at_loss and host.granting_ended and host.intent_s is not None):
        return False
    return draft.now >= _counted_from_s(draft, host) + draft.settings.lease_wait_s(host.kill_s)


def _has_intent_held(draft: Draft, host: HostRecord) -> bool:
    """Tell whether nothing renewed the lease on the second channel meanwhile; have it looked at where that is not known yet."""
    if host.has_beacon and not host.intent_is_proven:
        draft.do(ProveIntent(host=host.id))
        return False
    return True


def granting_ended(draft: Draft, event: GrantingEnded) -> None:
    host = draft.hosts.get(event.host)
    if host is not None and host.ends_granting_since_s is not None:
        draft.put(replace(host, granting_ended=True, handled_s=max(host.handled_s, event.handled_s)))


def intent_written(draft: Draft, event: IntentWritten) -> None:
    host = draft.hosts.get(event.host)
    if host is not None and host.ends_granting_since_s is not None and host.intent_s is None:
        draft.put(replace(host, intent_s=event.at_s))


def intent_proven(draft: Draft, event: IntentProven) -> None:
    """Take what stands in the slot at the end of the wait; what is not ours any more begins the wait anew."""
    host = draft.hosts.get(event.host)
    if host is None or host.intent_s is None or not _has_bound_passed(draft, host):
        return
    if not event.why:
        draft.put(replace(host, intent_is_proven=True))
        return
    told = f"its fence intent proves nothing: {event.why}"
    if not host.evidence or host.evidence[-1].what != told:
        host = draft.note(host, told)
    draft.put(replace(host, intent_s=None))


# --- rung 4 ------------------------------------------------------------------------------------------------------------------


def confirmed_off(draft: Draft, event: ConfirmedOff) -> None:
    """Take an operator's word, but never against what we hear ourselves."""
    host = draft.hosts.get(event.host)
    if host is None or host.standing in {HostConnectivity.NEW, HostConnectivity.UP}:
        draft.do(Refuse(subject=event.host, code="host-is-heard", message=f"{event.host} renews its lease: it is not off"))
        return
    if host.standing is HostConnectivity.FENCED:
        return
    if host.standing is HostConnectivity.SUSPECT:
        host = stand(draft, host, HostConnectivity.LOST, f"{event.by} says that it is off")
    fence(draft, host, Proof.OPERATOR, f"{event.by} confirmed that it is off: {event.reason}")


def fence(draft: Draft, host: HostRecord, proof: Proof, what: str) -> None:
    """Record the proof, and let go of what it covers."""
    host = stand(draft, host, HostConnectivity.FENCED, what, proof)
    let_go(draft, host, proof)
