"""The only importer of Celery: one task, `drive`, and a publisher that fails fast.

A task means "drive what is due" and carries nothing. Never here: chords, groups, ETA, revoke, rate limits, results, per-host
queues. Settings: late acknowledgement, short visibility timeout, no prefetch, threads.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import structlog
from celery import Celery

from trimtab_controller import wiring
from trimtab_controller.config import Settings
from trimtab_protos.errors import TrimtabError

log = structlog.get_logger(__name__)

QUEUE = "trimtab"
DRIVE = "trimtab.drive"
# A nudge that finds nothing in a while is worthless: the leader's redrive loop sends fresh ones.
EXPIRES_S = 30
# A nudge only wakes a driver.
NUDGE_THREADS = 2

_WORKER_TRANSPORT = {
    "visibility_timeout": 120,
    "unacked_restore_interval": 5,
    "unacked_restore_throttle": 1,
    "socket_timeout": 30,
    "socket_connect_timeout": 5,
    "socket_keepalive": True,
    "health_check_interval": 25,
}
_PUBLISHER_TRANSPORT = {
    "max_retries": 1,
    "interval_start": 0,
    "interval_step": 0,
    "interval_max": 0,
    "socket_timeout": 2,
    "socket_connect_timeout": 1,
}


def make_app(broker_url: str, transport: dict[str, Any]) -> Celery:
    """Return a Celery application with this product's settings."""
    app = Celery("trimtab", broker=broker_url)
    app.conf.update(
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options=transport,
        task_default_queue=QUEUE,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        task_publish_retry=False,
        task_time_limit=None,
        worker_send_task_events=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_hijack_root_logger=False,
        worker_enable_remote_control=False,
        timezone="UTC",
    )
    return app


def publisher(broker_url: str, *, on_failure: Callable[[Exception], None] | None = None) -> Callable[[], None]:
    """Return a function that sends one nudge and fails within 0.2 s where the broker is dead."""
    publishing = make_app(broker_url, _PUBLISHER_TRANSPORT)

    def publish() -> None:
        try:
            publishing.send_task(DRIVE, queue=QUEUE, retry=False, expires=EXPIRES_S, ignore_result=True)
        except Exception as error:
            if on_failure is None:
                raise
            on_failure(error)

    return publish


class Drivers:
    """Threads that drive operations. One is woken by a nudge, each further one by a driver that found more than it could take.

    So a burst is met by all of them within milliseconds, however few nudges came, and no nudge waits for an operation to end.
    """

    def __init__(self, drive_due: Callable[[Callable[[], None]], object], *, threads: int) -> None:
        """`drive_due` drives until nothing is due; it calls what it is given where there is work for another driver."""
        self._drive_due = drive_due
        self._free = threading.Semaphore(threads)
        self._is_closing = False
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="driver")

    def wake(self) -> None:
        """Let one more driver look at the table; nothing where all of them are driving, for then each looks again by itself."""
        if self._is_closing or not self._free.acquire(blocking=False):
            return
        try:
            self._threads.submit(self._drive)
        except RuntimeError:  # closed this instant
            self._free.release()

    def close(self) -> None:
        """Wait for the drives under way, each below 30 s."""
        self._is_closing = True
        self._threads.shutdown()

    def _drive(self) -> None:
        try:
            self._drive_due(self.wake)
        except TrimtabError as error:
            log.warning(
                "nothing driven", code=error.code, error=error.message
            )  # the database is away: the next nudge looks again
        except Exception:
            log.exception("driver failed")
        finally:
            self._free.release()


def run_worker(settings: Settings) -> None:
    """Run a worker in this process until it is told to stop (SIGTERM: finish the drives under way, each below 30 s)."""
    engine = wiring.build_engine(settings, process="worker")
    app = make_app(settings.broker_url, _WORKER_TRANSPORT)

    drivers = Drivers(lambda on_more: engine.drive_due(on_more=on_more), threads=settings.worker_threads)

    @app.task(name=DRIVE, ignore_result=True)  # type: ignore[untyped-decorator]
    def drive() -> None:
        drivers.wake()

    # Restarted workers find their work in SQL at once instead of waiting for somebody's next nudge.
    publisher(settings.broker_url, on_failure=lambda _error: None)()
    for chatty in ("celery.worker.strategy", "celery.app.trace"):  # a line or two per nudge says nothing
        logging.getLogger(chatty).setLevel(logging.WARNING)
    arguments = ["--quiet", "worker", "--pool=threads", f"--concurrency={NUDGE_THREADS}", f"--queues={QUEUE}"]
    arguments += ["--without-gossip", "--without-mingle", "--without-heartbeat", f"--loglevel={settings.log_level}"]
    try:
        app.worker_main(arguments)
    finally:
        drivers.close()
        engine.db.close()
