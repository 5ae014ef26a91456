"""Asks power devices for their status on a timer and when somebody wants to know: a device that fails is found before the outage.

Never a power action. A device that says "off" of a host that is heard from is not ready either: it is another machine's, or it lies.
"""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

import structlog

from trimtab_controller import metrics
from trimtab_controller.clock import Clock
from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.model import Host
from trimtab_controller.core.model.failover import FencePathRow
from trimtab_controller.fencing import Fencer, Power, PowerAnswer
from trimtab_controller.services import fencing
from trimtab_controller.store import events, failover, hosts, leases
from trimtab_controller.store.database import Database, Session
from trimtab_protos.errors import TrimtabError

log = structlog.get_logger(__name__)

TEST_EVERY = timedelta(minutes=10)
# A device that failed may be in the middle of its own restart.
RETRY_AFTER = timedelta(minutes=1)
DEVICES_AT_ONCE = 8
SYSTEM = "system:fencing"


class FenceReadiness:
    def __init__(self, *, db: Database, clock: Clock, fencer: Fencer, open_secret: Callable[[str, str], str]) -> None:
        """`open_secret`: sealed secret, place -> secret."""
        self._db, self._clock, self._fencer, self._open_secret = db, clock, fencer, open_secret

    def run(self, term: int) -> None:
        """Test what is due, several at a time, and record each answer."""
        now = self._clock.now()
        paths = self._db.read(failover.fence_paths)
        due = [path for path in paths if _is_due(path, now)]
        if due:
            with ThreadPoolExecutor(min(DEVICES_AT_ONCE, len(due)), thread_name_prefix="fence-test") as pool:
                list(pool.map(lambda path: self._test(term, path), due))
            paths = self._db.read(failover.fence_paths)
        counted = Counter("untested" if path.tested_at is None else "ready" if path.is_ready else "failed" for path in paths)
        for state in ("ready", "failed", "untested"):
            metrics.FENCE_PATHS.labels(state).set(counted[state])
        bare = self._db.read(lambda session: failover.unprotected(session, with_vms_to_restart=True))
        metrics.HOSTS_WITHOUT_FENCE.set(len(bare))

    def _test(self, term: int, path: FencePathRow) -> None:
        try:
            answer = self._fencer.status(fencing.opened(path, self._open_secret))
        except TrimtabError as error:
            answer = PowerAnswer(power=Power.UNKNOWN, message=error.message)

        def work(session: Session) -> None:
            leases.assert_leader(session, term)
            host = hosts.get(session, path.host_id)
            message = _what_is_wrong(answer, host)
            now = self._clock.now()
            failover.record_test(session, path.host_id, path.name, power=answer.power.value, message=message, now=now)
            was_ready = path.is_ready or path.tested_at is None
            if bool(message) == was_ready:
                self._tell(session, host, path, message, now)

        self._db.write(work, durable=False)
        metrics.FENCE_TESTS.labels(answer.power.value).inc()

    def _tell(self, session: Session, host: Host, path: FencePathRow, message: str, now: datetime) -> None:
        kind = "alarm.fence-not-ready" if message else "host.fence_ready"
        said = f"cannot be relied on: {message}" if message else "answers again"
        text = f"power device {path.name} of {host.name} {said}"
        events.append(session, kind=kind, subject_id=host.id, actor=SYSTEM, message=text, now=now)


def _is_due(path: FencePathRow, now: datetime) -> bool:
    if path.is_test_due or path.tested_at is None:
        return True
    return now - path.tested_at >= (TEST_EVERY if path.is_ready else RETRY_AFTER)


def _what_is_wrong(answer: PowerAnswer, host: Host) -> str:
    if answer.power is Power.UNKNOWN:
        return answer.message or "it did not say whether the host has power"
    if answer.power is Power.OFF and host.connectivity is HostConnectivity.UP:
        return f"it says off, but {host.name} is heard from: it is another machine's, or it lies"
    return ""
