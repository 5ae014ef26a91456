"""The database fails over and has lost the last seconds of commits: the engine starts again from what was there before."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.scenarios.schema import Run


def lose_tail(run: "Run", seconds: float) -> None:
    world, engine = run.world, run.world.engine
    kept = [state for at, state in engine.snapshots if at <= world.now - seconds]
    engine.kill()
    if kept:
        engine.state = kept[-1]
    since = world.now - seconds
    for deed in engine.deeds:
        if deed.began_s > since:
            deed.is_done, deed.ended_s = True, world.now  # its row is gone
    engine.revoked = {name for name, host in engine.state.hosts.items() if host.granting_ended}
    del engine.audit[:]
    engine.audit.extend((world.now, name, host.standing.value) for name, host in engine.state.hosts.items())
    world.tell("database_lost_its_tail", detail=seconds)
    world.after(3.0, engine.boot)
