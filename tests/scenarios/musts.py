"""What our own scenario files demand, sentence by sentence: each `must` is one function here; a sentence without one fails."""

from collections.abc import Callable
from typing import Any

from tests.scenarios import durable
from tests.scenarios.backups import Archive
from tests.scenarios.played import Played, alarms, count, first
from trimtab_controller.clock import mint
from trimtab_controller.core.failover.records import Desired, Hold, Phase, Proof, Seen
from trimtab_controller.core.lifecycle import HostConnectivity

MUSTS: dict[str, Callable[[Played], None]] = {}
T = 60.0
"""When the fault of nearly every file happens."""


def must(sentence: str) -> Callable[[Callable[[Played], None]], Callable[[Played], None]]:
    def keep(check: Callable[[Played], None]) -> Callable[[Played], None]:
        assert sentence not in MUSTS
        MUSTS[sentence] = check
        return check

    return keep


def add(*events: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    return lambda scenario: scenario["timeline"].extend(events)


def edit(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda scenario: scenario["timeline"][0].update(values)


# --- agents and clocks ---------------------------------------------------------------------------------------------------------------


@must("independent watchdog kills c on time although the agent is frozen")
def _(played: Played) -> None:
    run = played.run("lease-alone")
    settings = run.world.settings
    killed = first(run, "killed_by_warden", "c", "h3")
    assert killed.t <= T + settings.lease_ttl_s + settings.kill_s
    assert killed.t < first(run, "started", "c", after=T).t


@must("on resume the agent does nothing with its stale lease/epoch")
def _(played: Played) -> None:
    run = played.run("lease-alone")
    resumed = first(run, "agent_resumed", host="h3")
    assert count(run, "started", host="h3", after=resumed.t) == 0
    assert len(run.world.running_on("c")) == 1
    assert run.world.running_on("c") != ["h3"]


@must("no change in lease behaviour; job ages stay non-negative")
def _(played: Played) -> None:
    run = played.run()
    assert run.world.hosts["h3"].wall_offset_s == -3600
    assert run.core.hosts["h3"].standing is HostConnectivity.UP
    assert count(run, "host_suspect") == count(run, "warden_kills") == 0
    moved = played.run(change=add({"t": 61, "event": "vm_live_migrate", "vm": "c", "target": "h1"}), name="with a job")
    ages = [deed.ended_s - deed.began_s for deed in moved.world.engine.deeds if deed.ended_s is not None]
    assert ages
    assert min(ages) >= 0
    assert moved.world.running_on("c") == ["h1"]


@must("margin covers it: copy starts after the kill")
def _(played: Played) -> None:
    run = played.run("lease-alone")
    assert run.world.hosts["h3"].rate == 0.99
    assert first(run, "killed_by_warden", "c", "h3").t < first(run, "started", "c", after=T).t


@must("fencing by power, or disk epoch refuses writes; on resume the first act is the lease check")
def _(played: Played) -> None:
    run = played.run()
    assert first(run, "switched_off", host="h3").t < first(run, "started", "c", after=T).t
    held = played.run(change=add({"t": 59, "event": "failover_pause", "value": "on"}), name="failover paused")
    resumed = first(held, "host_resumed", host="h3")
    assert resumed.detail is True, "its lease had ended"
    assert first(held, "killed_by_warden", "c", "h3").t == resumed.t


@must("no double run")
def _(played: Played) -> None:
    for variant in ("as-written", "lease-alone", "beacon"):
        assert len(played.run(variant).world.running_on("c")) <= 1  # I1 was checked after every event


@must("no more than one failover of c; flapping host is put in quarantine")
def _(played: Played) -> None:
    for variant in ("as-written", "lease-alone"):
        run = played.run(variant)
        assert len({one.host for one in run.world.happened("started", "c") if one.t > T}) <= 1
        assert run.core.vms["c"].recoveries <= 2
        assert count(run, "fence_confirmed", host="h3") <= 1
        assert run.core.hosts["h3"].losses
    quarantined = [state.hosts["h3"].quarantined_until_s - at for at, state in run.world.engine.snapshots]
    assert max(quarantined) > run.world.settings.steady_s, "longer after each loss"
    assert "host-flaps" in alarms(run, "h3")


# --- links ---------------------------------------------------------------------------------------------------------------------------


@must("renewals decided by one direction only; no restart while renewals are accepted")
def _(played: Played) -> None:
    run = played.run()
    assert count(run, "started", after=T) == count(run, "killed_by_warden") == 0
    assert run.world.running_on("c") == ["h3"]


@must("host shown degraded, not dead")
def _(played: Played) -> None:
    run = played.run()
    assert run.core.hosts["h3"].standing is HostConnectivity.UP
    assert run.core.hosts["h3"].degraded == ("commands do not reach it",)
    assert count(run, "host_suspect") == 0


@must("agent counts only acknowledged renewals and kills c")
def _(played: Played) -> None:
    run = played.run("lease-alone")
    settings = run.world.settings
    assert first(run, "killed_by_warden", "c", "h3").t <= T + settings.lease_ttl_s + settings.kill_s


@must("controller counts from the last renewal it granted, so it waits the longer of the two")
def _(played: Played) -> None:
    run = played.run("lease-alone")
    granted_s = run.world.engine.handled["h3"]
    assert granted_s > T + run.world.settings.lease_ttl_s, "renewals went on being granted while nobody heard of it"
    fenced = first(run, "fence_confirmed", host="h3")
    assert fenced.detail is Proof.LEASE_BOUND
    assert fenced.t >= granted_s + run.world.settings.lease_wait_s(run.world.hosts["h3"].kill_s)
    assert first(run, "killed_by_warden", "c").t < fenced.t <= first(run, "started", "c", after=T).t


@must("controller suspects itself: no fencing above the limit, alarm")
def _(played: Played) -> None:
    run = played.run()
    assert count(run, "power_off_asked") == count(run, "fence_confirmed") == 0
    assert "failover-frozen" in alarms(run)
    assert "of 3 hosts are lost at once" in run.core.frozen
    assert all(one.standing is HostConnectivity.LOST for one in run.core.hosts.values())


# --- controllers ---------------------------------------------------------------------------------------------------------------------


@must("stated policy holds: guests keep running (lease granting is separate) or are killed; never both; after start no storm")
def _(played: Played) -> None:
    # The engine alone is away, or everything is and the beacons live: nothing happens to any guest.
    for run in (played.run(), played.run("beacon", change=edit(what="control-plane"), name="all")):
        assert count(run, "killed_by_warden") == count(run, "started", after=T) == count(run, "fence_confirmed") == 0
    # Everything is away and there is no second channel: all are killed, and start again once, within slots.
    run = played.run("lease-alone", change=edit(what="control-plane"), name="all")
    back = first(run, "controller_started")
    for vm in "abc":
        assert count(run, "killed_by_warden", vm) == 1
        assert count(run, "started", vm, after=T) == 1
        assert first(run, "started", vm, after=T).t > back.t
    assert count(run, "fence_confirmed") == 0


@must("c started once; fence not repeated needlessly")
def _(played: Played) -> None:
    run = played.run()
    assert count(run, "started", "c", after=T) == 1
    assert count(run, "power_off_asked", host="h3") == count(run, "fence_confirmed", host="h3") == 1


@must("controller reconciles from agents: running copies found are adopted, none started twice")
def _(played: Played) -> None:
    assert count(played.run(), "started", after=T) == 0

    def lose_a_recovery(scenario: dict[str, Any]) -> None:
        scenario["timeline"] = [
            {"t": 60, "event": "host_power", "host": "h3", "value": "off"},
            {"t": 75, "event": "db", "value": "failover_lose_last_s", "seconds": 7},
        ]

    run = played.run(change=lose_a_recovery, name="a recovery is lost")
    assert count(run, "started", "c", after=T) == 1, "it was started before the loss, and not again"
    assert count(run, "database_lost_its_tail") == 1
    started = first(run, "started", "c", after=T)
    assert run.core.vms["c"].host == started.host
    assert run.core.vms["c"].epoch >= started.detail
    assert "vm-adopted" in alarms(run, "c")


@must("ids never reused")
def _(played: Played) -> None:
    run = played.run()
    assert run.world.happened("database_lost_its_tail")
    # Ids are random, not counted: the ids that a lost tail had given out come from no counter that could go back.
    minted = [mint("vm") for _number in range(20_000)]
    assert len(set(minted)) == len(minted)


@must("no guest restarted; refused features named")
def _(played: Played) -> None:
    run = played.run()
    assert count(run, "started", after=T) == count(run, "killed_by_warden") == count(run, "host_lost") == 0
    assert all("fast-restore" in host.capabilities for host in run.world.hosts.values())
    durable.a_host_that_lacks_a_feature_is_refused_by_its_name()


# --- fencing -------------------------------------------------------------------------------------------------------------------------


@must("c runs on h1 or h2 within 45 s when power fencing answers, within 60 s by lease alone")
def _(played: Played) -> None:
    for variant, within_s in (("as-written", 45.0), ("lease-alone", 60.0)):
        started = first(played.run(variant), "started", "c", after=T)
        assert started.host in {"h1", "h2"}
        assert started.t <= T + within_s


@must("fence recorded before start")
def _(played: Played) -> None:
    for variant in ("as-written", "lease-alone"):
        run = played.run(variant)
        assert first(run, "fence_confirmed", host="h3").t <= first(run, "begun_StartVm", "c", after=T).t
        lines = run.core.hosts["h3"].evidence
        assert [line.proof for line in lines if line.proof is not None] == [run.core.hosts["h3"].proof]


@must("falls back to lease expiry when self-fencing was proven armed on h3")
def _(played: Played) -> None:
    run = played.run()
    assert "fence-failed" in alarms(run, "h3")
    assert first(run, "fence_confirmed", host="h3").detail is Proof.LEASE_BOUND
    assert first(run, "started", "c", after=T).host in {"h1", "h2"}


@must("otherwise stays in fence_failed, c not started, alarm until an operator confirms")
def _(played: Played) -> None:
    run = played.run("unarmed-with-device")
    assert count(run, "started", "c", after=T) == count(run, "fence_confirmed") == 0
    assert run.core.hosts["h3"].standing is HostConnectivity.LOST
    assert alarms(run, "h3").count("fence-failed") > 3
    told = {"t": 300, "event": "confirm_off", "host": "h3", "reason": "pulled the plug"}
    confirmed = played.run("unarmed-with-device", change=add(told), name="confirmed")
    assert first(confirmed, "fence_confirmed", host="h3").detail is Proof.OPERATOR
    assert first(confirmed, "started", "c", after=T).t >= 300


@must("whichever comes first, lease bound or fence, releases recovery; no double fence")
def _(played: Played) -> None:
    slow = played.run()
    assert first(slow, "fence_confirmed", host="h3").detail is Proof.LEASE_BOUND
    assert first(slow, "started", "c", after=T).t < T + 40
    quick = played.run(change=edit(seconds=5), name="5 s")
    assert first(quick, "fence_confirmed", host="h3").detail is Proof.POWER_OFF
    for run in (slow, quick):
        assert count(run, "power_off_asked", host="h3") == count(run, "fence_confirmed", host="h3") == 1
        assert count(run, "started", "c", after=T) == 1


# --- guests and storage --------------------------------------------------------------------------------------------------------------


@must("back-off; then error; others unaffected")
def _(played: Played) -> None:
    run = played.run()
    crashes = [one.t for one in run.world.happened("crashed", "a")]
    starts = [one.t for one in run.world.happened("started", "a") if one.t > T]
    assert len(crashes) == 5
    waits = [start - crash for crash, start in zip(crashes, starts, strict=False)]
    assert len(waits) == 4
    assert waits == sorted(waits)
    assert waits[-1] > 2 * waits[0]
    assert run.core.vms["a"].phase is Phase.NEEDS_ATTENTION
    assert "5 times" in run.core.vms["a"].why
    assert count(run, "started", "b") == count(run, "started", "c") == 1


@must("c pauses on I/O error, is not reported running-healthy")
def _(played: Played) -> None:
    run = played.run()
    paused = first(run, "paused_io_error", "c", "h3")
    shown = [state.vms["c"] for at, state in run.world.engine.snapshots if paused.t + 5 < at < paused.t + 25]
    assert shown
    assert all(vm.seen is Seen.PAUSED and "I/O error" in vm.why for vm in shown)


@must("controller moves c only after destroy on h3 is confirmed or the host is fenced")
def _(played: Played) -> None:
    run = played.run()
    assert first(run, "destroyed", "c", "h3").t < first(run, "begun_StartVm", "c", after=T).t
    assert run.world.running_on("c") in (["h1"], ["h2"])
    late = played.run(change=add({"t": 200, "event": "storage_access", "host": "h3", "value": "ok"}), name="storage returns")
    assert late.world.running_on("c") == run.world.running_on("c")
    assert count(late, "started", "c", after=T) == 1


@must("start refused by the disk lock, inventory unchanged, alarm")
def _(played: Played) -> None:
    run = played.run()
    assert count(run, "copy_refused_by_lock", "c", "h1") == 1
    assert run.world.running_on("c") == ["h3"]
    assert [holder.host for holder in run.core.vms["c"].holders] == ["h3"]
    assert "stale-copy" in alarms(run, "c")


@must("VM stays in inventory as lost/recovering; restarted by policy")
def _(played: Played) -> None:
    run = played.run()
    gone = first(run, "vanished", "b")
    between = [state.vms["b"] for at, state in run.world.engine.snapshots if gone.t + 0.5 < at < gone.t + 1.9]
    assert between
    assert all(vm.phase is Phase.RESTARTING for vm in between)
    assert first(run, "started", "b", after=T).host == "h2"


@must("c ends deleted; not restarted by recovery")
def _(played: Played) -> None:
    for variant in ("as-written", "lease-alone"):
        run = played.run(variant)
        assert "c" in run.core.tombstones
        assert "c" not in run.core.vms
        assert count(run, "started", "c", after=T) == count(run, "begun_StartVm", "c", after=T) == 0


@must("second refused by certificate/boot id; no command goes to it")
def _(played: Played) -> None:
    run = played.run()
    assert run.notes["join"] == "refused"
    assert "h4" not in run.core.hosts
    assert not [deed for deed in run.world.engine.deeds if deed.host == "h4"]


# --- capacity and maintenance --------------------------------------------------------------------------------------------------------


@must("high priority placed first; the rest pending with a reason, retried when capacity returns")
def _(played: Played) -> None:
    def fill(scenario: dict[str, Any]) -> None:
        gib = 1 << 30
        for host in scenario["cluster"]["hosts"].values():
            host["mem_bytes"] = 10 * gib
        scenario["vms"]["d"] = {**scenario["vms"]["c"], "priority": 10}
        for name, size in {"a": 9, "b": 5, "c": 5, "d": 5}.items():
            scenario["vms"][name]["mem_bytes"] = size * gib
        scenario["timeline"].append({"t": 300, "event": "host_power", "host": "h3", "value": "on"})

    run = played.run(change=fill, name="full")
    assert first(run, "started", "d", after=T).t < 120
    waiting = [state.vms["c"] for at, state in run.world.engine.snapshots if 120 < at < 290]
    assert waiting
    assert all(vm.phase is Phase.RECOVERING and "not enough memory" in vm.why for vm in waiting)
    assert first(run, "started", "c", after=T).t > 300
    assert first(played.run(), "started", "c", after=T).host in {"h1", "h2"}


@must("drain reports that VM with the reason; others leave; no forced stop without consent")
def _(played: Played) -> None:
    def crowd(scenario: dict[str, Any]) -> None:
        scenario["vms"]["d"] = dict(scenario["vms"]["a"])
        scenario["vms"]["e"] = {**scenario["vms"]["a"], "storage": "local"}

    run = played.run(change=crowd, name="with others")
    assert "cannot leave" in run.core.vms["a"].why
    assert "strict rule" in run.core.vms["a"].why
    assert "disks lie on h1 alone" in run.core.vms["e"].why
    assert run.world.running_on("a") == run.world.running_on("e") == ["h1"]
    assert run.world.running_on("d") in (["h2"], ["h3"])
    assert count(run, "stopped") == 0
    assert run.core.hosts["h1"].hold is Hold.DRAINING
    assert run.core.vms["a"].desired is Desired.RUNNING


# --- migrations ----------------------------------------------------------------------------------------------------------------------


@must("job found again from libvirt; ends done or failed, never stuck migrating")
def _(played: Played) -> None:
    run = played.run()
    assert count(run, "agent_killed", host="h1") == 1
    assert run.core.vms["a"].phase is Phase.SETTLED
    assert len(run.world.running_on("a")) == 1
    assert all(deed.is_done for deed in run.world.engine.deeds if deed.kind == "MoveVm")
    assert count(run, "migrate:0%", "a") == 1, "it was not begun again"


@must("a keeps running on h1, state running not migrating")
def _(played: Played) -> None:
    run = played.run()
    assert run.world.running_on("a") == ["h1"]
    assert run.core.vms["a"].phase is Phase.SETTLED
    assert run.core.vms["a"].seen is Seen.RUNNING
    assert [holder.host for holder in run.core.vms["a"].holders] == ["h1"]
    assert count(run, "started", "a") == 1


@must("one side resumed, other destroyed, decided by a recorded token")
def _(played: Played) -> None:
    run = played.run()
    tokens = {state.vms["a"].token for _at, state in run.world.engine.snapshots} - {""}
    destroyed = first(run, "destroyed", "a")
    assert len(tokens) == 1
    (token,) = tokens
    assert destroyed.host != token
    assert first(run, "resumed", "a").host == token
    assert run.world.running_on("a") == [token]
    assert destroyed.t < first(run, "resumed", "a").t


@must("target half-copy is destroyed before the restart from disk; exactly one copy")
def _(played: Played) -> None:
    for share in ("10%", "50%", "99%"):
        run = played.run(change=edit(t=f"migrate:{share}"), name=share)
        assert first(run, "destroyed", "a", "h2").t < first(run, "started", "a", after=31).t
        assert len(run.world.running_on("a")) == 1
        assert count(run, "started", "a", after=31) == 1
    after = played.run(change=edit(t="migrated"), name="after the switch")
    assert after.world.running_on("a") == ["h2"]
    assert count(after, "started", "a") == 1, "its memory lives on"


# --- queue, database, backups: the real engine ---------------------------------------------------------------------------------------


@must("operations retried, each ends once")
def _(played: Played) -> None:
    durable.operations_end_once_although_half_of_the_commits_abort(rate=played.scenario["timeline"][0]["rate"])


@must("second run sees the running attempt (row lock + epoch) and exits")
def _(played: Played) -> None:
    durable.a_second_delivery_finds_the_running_attempt(after_s=played.scenario["timeline"][1]["seconds"])


@must("all 50 reach a final state: re-queued from SQL")
def _(played: Played) -> None:
    durable.operations_end_without_their_messages(count=played.scenario["timeline"][0]["count"])


@must("operation resumes or rolls back; no orphans of disk, tap, definition")
def _(played: Played) -> None:
    durable.every_step_survives_the_death_of_its_worker()


@must("verification finds it; status bad; retention never deletes the last good one")
def _(played: Played) -> None:
    archive = Archive(copies=3)
    archive.flip_a_byte(newest=True)
    archive.verify()
    assert [copy.status for copy in archive.copies] == ["good", "good", "bad"]
    for _round in range(5):
        archive.prune(keep=1)
    assert [copy.status for copy in archive.copies if copy.status == "good"] == ["good"]


@must("refused unless stopped; disk lock held throughout")
def _(played: Played) -> None:
    run = played.run()
    archive = Archive(copies=1)
    assert run.world.running_on("a") == ["h1"]
    assert archive.restore_in_place(is_running=True) == "refused: the vm runs; stop it first"
    assert archive.lock_trace == []
    assert archive.restore_in_place(is_running=False) == "restored"
    assert archive.lock_trace == ["locked", "wrote", "wrote", "unlocked"]
