"""The engine process: leads when it can, and runs the leader's jobs while it does.

A job that blocks (a host that hangs in `observe_hosts`) must not delay placement, so jobs run in lanes, each a thread:
`placement` (batches), `failover`, `fencing`, `redrive`, `upkeep`, `drift`, `hand changes`, `planning`, `backups`, `overlay`. Every
write of a lane is fenced by the leader's term. While the database is behind the fleet (`services/behind.py`) the lanes stand still.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import structlog

from trimtab_controller import wiring
from trimtab_controller.clock import Clock
from trimtab_controller.config import Settings
from trimtab_controller.core.failover import FailoverSettings
from trimtab_controller.core.planning.rebalance import RebalanceMode
from trimtab_controller.fencing import FenceAgents
from trimtab_controller.loops.backups import READ_AGAIN_AFTER, BackupLoop
from trimtab_controller.loops.drift import Drift
from trimtab_controller.loops.drill_cuts import DrillCuts
from trimtab_controller.loops.failover import BELIEVED, FailoverLoop
from trimtab_controller.loops.failover_effects import no_secret
from trimtab_controller.loops.fence_readiness import FenceReadiness
from trimtab_controller.loops.fleet_figures import FleetFigures
from trimtab_controller.loops.hand_changes import HandChanges
from trimtab_controller.loops.leader import Leader
from trimtab_controller.loops.leader_loop import Job, run_due
from trimtab_controller.loops.lost_disks import LostDisksLoop
from trimtab_controller.loops.overlays import OverlayLoop
from trimtab_controller.loops.placement import PlacementLoop
from trimtab_controller.loops.rebalance import Rebalance
from trimtab_controller.loops.recoveries import RecoveryLoop
from trimtab_controller.loops.redrive import Redrive
from trimtab_controller.loops.survival import Survival
from trimtab_controller.loops.upkeep import Upkeep
from trimtab_controller.loops.usage import Usage
from trimtab_controller.northbound import OvnNorthbound, Papers
from trimtab_controller.nudge import Nudger
from trimtab_controller.operations.engine import Engine
from trimtab_controller.secret_box import SecretBox
from trimtab_controller.store.database import Database

log = structlog.get_logger(__name__)

TICK_S = 0.02
# A lane looks at least so often whether it leads.
LOOK_S = 0.25
# A copy of the database that is older than a few of these is noticed by whichever host speaks first.
MARK_EVERY_S = 60.0


HostStates = Callable[[], Mapping[str, Mapping[str, Any]]]


def lanes(
    engine: Engine,
    nudger: Nudger,
    *,
    rebalance_mode: RebalanceMode = RebalanceMode.OFF,
    failover_settings: FailoverSettings = BELIEVED,
    open_secret: Callable[[str, str], str] = no_secret,
    host_states: HostStates = dict,
    drift_period_s: float = 30.0,
    recover_lost_after_s: float = 300.0,
    read_again_after: timedelta = READ_AGAIN_AFTER,
) -> dict[str, list[Job]]:
    """Return the leader's jobs by lane, with their periods.

    `open_secret`: sealed secret of a power device, its place -> secret. `host_states`: what the gateways last heard of each host.
    """
    db, clock = engine.db, engine.clock
    placement = PlacementLoop(db=db, clock=clock, nudger=nudger, rng=engine.rng)
    redrive = Redrive(db=db, clock=clock, engine=engine, nudger=nudger)
    usage = Usage(db=db, clock=clock)
    drift = Drift(db=db, clock=clock, agents=engine.agents, nudger=nudger, usage=usage)
    by_hand = HandChanges(db=db, clock=clock, agents=engine.agents)
    survival = Survival(db=db, clock=clock, host_states=host_states)
    rebalance = Rebalance(db=db, clock=clock, nudger=nudger, mode=rebalance_mode)
    fencer = FenceAgents()
    failover = FailoverLoop(
        engine=engine, clock=clock, fencer=fencer, settings=failover_settings, open_secret=open_secret, nudger=nudger
    )
    cuts = DrillCuts(db=db, clock=clock, fencer=fencer, open_secret=open_secret)
    readiness = FenceReadiness(db=db, clock=clock, fencer=fencer, open_secret=open_secret)
    return {
        # A request waits half a period on average; an empty round is one indexed query. One that answers reads the whole fleet.
        "placement": [Job("placement", TICK_S, placement.run)],
        # Alone in its lane: nothing else may delay it, and a tick more than 3 s late counts as our own pause.
        "failover": [Job("failover", 1.0, failover.run, is_urgent=failover.is_urgent)],
        # A device may take half a minute to answer.
        "fencing": [Job("test fences", 1.0, readiness.run), Job("cut power for drills", 1.0, cuts.run)],
        "redrive": [Job("redrive", 0.25, redrive.run)],
        "upkeep": _upkeep_lane(db, clock, nudger),
        "backups": _backup_lane(db, clock, nudger, timedelta(seconds=recover_lost_after_s), read_again_after),
        "drift": [Job("judge vms", 2.0, drift.judge_vms), Job("observe hosts", drift_period_s, drift.observe_hosts)],
        # A host that hangs may keep these waiting, and nothing else.
        "hand changes": [Job("look for hand-made changes", drift_period_s, by_hand.look)],
        # Seconds of arithmetic on a large fleet: nothing else waits for it.
        "planning": [
            Job("note hosts", 30.0, lambda _term: usage.note_hosts(host_states())),
            Job("roll up usage", 30.0, usage.flush),
            Job("prove failover", 30.0, survival.run),
            Job("rebalance", 600.0, rebalance.run),
        ],
    }


def _upkeep_lane(db: Database, clock: Clock, nudger: Nudger) -> list[Job]:
    upkeep = Upkeep(db=db, clock=clock, nudger=nudger)
    return [
        Job("figures", 5.0, FleetFigures(db=db, clock=clock).run, only_looks=True),
        Job("mark the database", MARK_EVERY_S, upkeep.mark_database),
        Job("prepare hosts", 1.0, upkeep.prepare_hosts),
        Job("seal audit", 5.0, upkeep.seal_audit),
        Job("purge", 30.0, upkeep.purge),
        Job("purge volumes", 30.0, upkeep.purge_volumes),
        Job("tidy snapshots", 10.0, upkeep.tidy_snapshots),
        Job("settle moves", 5.0, upkeep.settle_moves),
        Job("apply firewalls", 30.0, upkeep.apply_firewalls),
        Job("evict images", 300.0, upkeep.evict_images),
        Job("retain", 60.0, upkeep.retain),
    ]


def _backup_lane(
    db: Database, clock: Clock, nudger: Nudger, recover_lost_after: timedelta, read_again_after: timedelta
) -> list[Job]:
    backups = BackupLoop(db=db, clock=clock, nudger=nudger, read_again_after=read_again_after)
    return [
        Job("ask for backups", 5.0, backups.ask),
        Job("verify backups", 15.0, backups.verify),
        Job("read backups again", 60.0, backups.read_again),
        Job("retain backups", 60.0, backups.retain),
        Job("measure backups", 30.0, backups.measure),
        Job("run recovery plans", 1.0, RecoveryLoop(db=db, clock=clock, nudger=nudger).run),
        Job("bring lost disks back", 5.0, LostDisksLoop(db=db, clock=clock, nudger=nudger, after=recover_lost_after).run),
    ]


def failover_settings(settings: Settings) -> FailoverSettings:
    """Return failover's numbers for this fleet: what is waited for is the lease that hosts are really given."""
    return replace(BELIEVED, lease_ttl_s=settings.lease_ttl_s, renew_every_s=settings.heartbeat_s)


def _papers(settings: Settings) -> Papers | None:
    """Return what OVN's database is shown, where its endpoint asks for that."""
    if settings.ovn_certificate is None or settings.ovn_key is None or settings.ovn_authority is None:
        return None
    return Papers(settings.ovn_certificate, settings.ovn_key, settings.ovn_authority)


def run(settings: Settings, *, stopping: threading.Event, beat: Callable[[], None], host_states: HostStates = dict) -> None:
    """Serve as the engine until `stopping` is set; `beat` tells the supervisor that the lanes still move."""
    engine = wiring.build_engine(settings, process="engine")
    nudger = wiring.build_nudger(settings)
    box = SecretBox(settings.pki_dir)
    leader = Leader(settings, engine.db, owner=engine.driver)
    jobs_by_lane = lanes(
        engine,
        nudger,
        rebalance_mode=RebalanceMode(settings.rebalance_mode),
        failover_settings=failover_settings(settings),
        open_secret=lambda sealed, place: box.open(sealed, place=place),
        host_states=host_states,
        drift_period_s=settings.drift_period_s,
        recover_lost_after_s=settings.recover_lost_after_s,
        read_again_after=timedelta(days=settings.read_backups_again_days),
    )
    if settings.ovn_northbound:
        northbound = OvnNorthbound(settings.ovn_northbound, fleet=box.fleet_id, papers=_papers(settings))
        # Alone in its lane: a database that does not answer delays nothing else.
        jobs_by_lane["overlay"] = [
            Job("overlay networks", 1.0, OverlayLoop(db=engine.db, northbound=northbound, clock=engine.clock).run)
        ]
    threads = [
        threading.Thread(target=_lane, args=(name, jobs, leader, engine.clock, stopping), name=f"lane-{name}", daemon=True)
        for name, jobs in jobs_by_lane.items()
    ]
    try:
        for thread in threads:
            thread.start()
        while not stopping.wait(1.0):
            leader.tick()
            beat()
    finally:
        stopping.set()
        for thread in threads:
            thread.join(timeout=10)
        leader.release()
        nudger.stop()
        engine.db.close()


def _lane(name: str, jobs: Sequence[Job], leader: Leader, clock: Clock, stopping: threading.Event) -> None:
    pause_s = TICK_S
    while not stopping.wait(pause_s):
        term, pause_s = leader.term(), LOOK_S
        if term is not None:
            run_due(jobs, term, clock, is_behind=leader.is_behind)
            if leader.is_behind:
                continue
            pause_s = min(LOOK_S, max(TICK_S, min(job.due_in_s(clock) for job in jobs)))
    log.info("lane ended", lane=name)
