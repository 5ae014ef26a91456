"""A driver in a process of its own that dies at a named point, as by `kill -9`. Started by `test_crash_points.py`.

The engine is imported only in the child, after its environment names the point; everything else that it needs is imported here, so
that a fork server has it loaded once.
"""

import os
import random
import time
from datetime import datetime, timedelta

import grpc
import structlog  # noqa: F401
import tenacity  # noqa: F401

import trimtab_controller.operations.registry
from trimtab_controller.agents.grpc_client import AgentAddress, GrpcAgentClient
from trimtab_controller.store import hosts
from trimtab_controller.store.database import Database

# Operations wait for seconds; nobody wants to.
FASTER = 50.0
GIVES_UP_AFTER_S = 20.0

trimtab_controller.operations.registry.all_sagas()


class FastClock:
    """Begins at the parent's virtual time and runs faster than the world."""

    def __init__(self, begins: datetime) -> None:
        self._begins = begins
        self._began_s = time.monotonic()

    def now(self) -> datetime:
        return self._begins + timedelta(seconds=FASTER * (time.monotonic() - self._began_s))

    def boottime_s(self) -> float:
        return time.monotonic()


def drive_until_death(url: str, begins: datetime, crash_at: str) -> None:
    """Drive what is due until the process dies at `crash_at`; exit with 0 where it never came there."""
    os.environ["TRIMTAB_CRASH_AT"] = crash_at
    from trimtab_controller.operations.engine import Engine

    db = Database(url)

    def lookup(host_id: str) -> AgentAddress:
        host = db.read(lambda session: hosts.get(session, host_id))
        return AgentAddress(host.id, host.agent_address, host.incarnation, host.lease_number)

    client = GrpcAgentClient(lookup=lookup, connect=lambda _host_id, address: grpc.insecure_channel(address))
    engine = Engine(db=db, agents=client, clock=FastClock(begins), driver="child", rng=random.Random(0))
    gives_up = time.monotonic() + GIVES_UP_AFTER_S
    while time.monotonic() < gives_up:
        engine.drive_due()
        time.sleep(0.005)
