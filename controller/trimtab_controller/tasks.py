"""The only importer of Celery: one task, `drive`, and a publisher that fails fast.

A task means "drive what is due" and carries nothing. Never here: chords, groups, ETA, revoke, rate limits, results, per-host
queues. Settings: late acknowledgement, short visibility timeout, no prefetch, threads.
"""

import logging
from collections.abc import Callable
from typing import Any

from celery import Celery

from trimtab_controller import wiring
from trimtab_controller.config import Settings

QUEUE = "trimtab"
DRIVE = "trimtab.drive"
# A nudge that finds nothing in a while is worthless: the leader's redrive loop sends fresh ones.
EXPIRES_S = 30

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


def run_worker(settings: Settings) -> None:
    """Run a worker in this process until it is told to stop (SIGTERM: finish the drives under way, each below 30 s)."""
    engine = wiring.build_engine(settings, process="worker")
    app = make_app(settings.broker_url, _WORKER_TRANSPORT)

    @app.task(name=DRIVE, ignore_result=True)  # type: ignore[untyped-decorator]
    def drive() -> None:
        engine.drive_due()

    # Restarted workers find their work in SQL at once instead of waiting for somebody's next nudge.
    publisher(settings.broker_url, on_failure=lambda _error: None)()
    for chatty in ("celery.worker.strategy", "celery.app.trace"):  # a line or two per nudge says nothing
        logging.getLogger(chatty).setLevel(logging.WARNING)
    arguments = ["--quiet", "worker", "--pool=threads", f"--concurrency={settings.worker_threads}", f"--queues={QUEUE}"]
    arguments += ["--without-gossip", "--without-mingle", "--without-heartbeat", f"--loglevel={settings.log_level}"]
    try:
        app.worker_main(arguments)
    finally:
        engine.db.close()
