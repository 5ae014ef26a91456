"""The other processes' view of host states: a copy of Redis' copy, refreshed by a thread so that nobody waits for it.

Without Redis the gateways themselves are asked, at the same pace.
"""

import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import redis
import structlog
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from trimtab_controller.rpc.host_states import HOSTS_KEY, REDIS_TIMEOUT_S, decode
from trimtab_controller.rpc.state_answers import newest_of

log = structlog.get_logger(__name__)

REFRESH_S = 2.0


class HeardHosts:
    """What the gateways last heard, at most a few seconds old. Where nobody tells it goes stale, and its ages say so."""

    def __init__(self, url: str, *, ask_gateways: Callable[[], dict[str, dict[str, Any]]] = dict) -> None:
        self._ask_gateways = ask_gateways
        self._redis = redis.Redis.from_url(
            url,
            socket_timeout=REDIS_TIMEOUT_S,
            socket_connect_timeout=REDIS_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )
        self._states: dict[str, dict[str, Any]] = {}
        self._heard: Mapping[str, datetime] = {}
        self._problem = "not asked yet"
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heard-hosts", daemon=True)
        self._thread.start()

    def states(self) -> Mapping[str, Mapping[str, Any]]:
        """Return each host's state as its gateway wrote it (`HostState.as_json`)."""
        return self._states

    def heard(self) -> Mapping[str, datetime]:
        """Return when each host was last heard of with its hypervisor up: so old are observations of its vms."""
        return self._heard

    def problem(self) -> str:
        """Return `ok`, or what is wrong with Redis."""
        return self._problem

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(timeout=2 * REDIS_TIMEOUT_S + 1)
        self._redis.close()

    def _run(self) -> None:
        while True:
            try:
                self._refresh()
            except (RedisError, OSError, ValueError) as error:
                if self._problem == "ok":
                    log.warning("host states cannot be read from redis", error=str(error)[:200])
                self._problem = str(error)[:200] or type(error).__name__
                # What nobody tells of any more stays as it was: its age grows.
                self._take(newest_of(self._states, self._ask_gateways()))
            if self._stopping.wait(REFRESH_S):
                return

    def _refresh(self) -> None:
        document: Any = self._redis.hgetall(HOSTS_KEY)
        self._take(decode(document))
        self._problem = "ok"

    def _take(self, states: dict[str, dict[str, Any]]) -> None:
        self._heard = {
            host_id: datetime.fromtimestamp(state["at_ms"] / 1000, UTC)
            for host_id, state in states.items()
            if state["is_hypervisor_up"]
        }
        self._states = states
