"""Counts and times what the API answers, from outside of it; routes are labelled by their template, so labels stay bounded."""

import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from trimtab_controller import metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
REJECTIONS = {401: "unauthenticated", 403: "denied", 429: "rate"}


def measured(app: App) -> App:
    """Return the application with every HTTP answer counted; a watch counts as one that is open, without a duration."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        started_s = time.monotonic()
        answer: dict[str, Any] = {"status": 500, "is_watch": False}

        async def note(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer["status"] = message["status"]
                answer["is_watch"] = any(
                    name.lower() == b"content-type" and value.startswith(b"text/event-stream")
                    for name, value in message["headers"]
                )
                if answer["is_watch"]:
                    metrics.API_WATCHERS.inc()
            await send(message)

        try:
            await app(scope, receive, note)
        finally:
            _count(scope, answer["status"])
            if answer["is_watch"]:
                metrics.API_WATCHERS.dec()
            else:
                metrics.API_REQUEST_SECONDS.labels(_method(scope), _route(scope)).observe(time.monotonic() - started_s)

    return call


def _count(scope: Scope, status: int) -> None:
    metrics.API_REQUESTS.labels(_method(scope), _route(scope), str(status)).inc()
    if status in REJECTIONS:
        metrics.API_REJECTED.labels(REJECTIONS[status]).inc()


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in METHODS else "other"


def _route(scope: Scope) -> str:
    """The template that matched (the router notes it in the scope): `/v1/projects/{project}/vms/{name}`."""
    return str(getattr(scope.get("route"), "path", "unmatched"))
