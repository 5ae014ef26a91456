"""Logs: events with bound facts, never prose; JSON for machines, coloured lines on a terminal.

    log = structlog.get_logger(__name__)
    log.info("session opened", host_id=host_id, lease_number=number)

Inside `operation_context` every line carries the operation's id. Secrets never get here: redaction below is the second net.
"""

import logging
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import structlog

_SECRET_WORDS = ("secret", "password", "token", "private_key", "csr")
_HARMLESS = ("token_id", "token_name")


def configure(process: str, *, log_format: str = "auto", level: str = "info") -> None:
    """Send structlog's and the standard library's lines to stderr in one form; each names `process`."""
    is_json = log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _redact,
    ]
    renderer: Any = structlog.processors.JSONRenderer() if is_json else structlog.dev.ConsoleRenderer()
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(process=process)
    last = [structlog.processors.format_exc_info] if is_json else []
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _name_process(process), *last, renderer],
    )
    stream = logging.StreamHandler(sys.stderr)
    stream.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [stream]
    root.setLevel(level.upper())
    for noisy in ("grpc", "aiosqlite", "asyncio", "alembic.runtime.migration", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


@contextmanager
def operation_context(operation_id: str, **facts: str) -> Iterator[None]:
    """Bind the operation's id to every line of this thread or task."""
    with structlog.contextvars.bound_contextvars(operation_id=operation_id, **facts):
        yield


def _redact(_logger: Any, _name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key in event:
        if key not in _HARMLESS and any(word in key for word in _SECRET_WORDS):
            event[key] = "(redacted)"
    return event


def _name_process(process: str) -> Any:
    # Threads do not inherit context variables: lines of theirs would not say which process wrote them.
    def add(_logger: Any, _name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event.setdefault("process", process)
        return event

    return add
