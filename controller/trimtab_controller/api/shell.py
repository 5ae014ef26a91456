"""What surrounds every request, as plain ASGI: its id, the limit per address, the bound of its body, headers of the answer."""

import asyncio

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab_controller.api import problems
from trimtab_controller.api.runtime import READ_COST, Runtime
from trimtab_controller.api.security import READ_METHODS, client_address
from trimtab_controller.clock import mint
from trimtab_protos.errors import InvalidRequest, TrimtabError

log = structlog.get_logger(__name__)

# Between two pieces of a body of at most a megabyte: a client that dribbles holds a connection and nothing else.
BODY_TIMEOUT_S = 30.0
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Strict-Transport-Security": "max-age=31536000",
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Shell:
    def __init__(self, app: ASGIApp, *, runtime: Runtime) -> None:
        self._app, self._runtime = app, runtime

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        request.state.request_id = mint("req")
        has_begun = False

        async def answer(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                headers = MutableHeaders(raw=message["headers"])
                headers["X-Request-Id"] = request.state.request_id
                headers.setdefault("Cache-Control", "no-store")
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                message["headers"] = headers.raw
            await send(message)

        try:
            cost = READ_COST if scope["method"] in READ_METHODS else 1.0
            self._runtime.address_rate.take(client_address(request), cost=cost)
            self._check_length(scope)
            await self._app(scope, self._bounded(scope, receive), answer)
        except TrimtabError as error:
            await problems.of_error(error, request_id=request.state.request_id)(scope, receive, answer)
        except Exception:
            # The request's edge: the client gets a problem document with its request id, the traceback goes to the log.
            log.exception("request failed", request_id=request.state.request_id, path=scope["path"])
            if has_begun:
                raise
            await problems.of_defect(request_id=request.state.request_id)(scope, receive, answer)

    def _check_length(self, scope: Scope) -> None:
        length = Headers(scope=scope).get("content-length", "0")
        if not _is_upload(scope) and length.isascii() and length.isdecimal() and int(length) > self._limit:
            raise self._too_large()

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        if _is_upload(scope):
            return receive
        taken_bytes, is_complete = 0, False

        async def bounded() -> Message:
            nonlocal taken_bytes, is_complete
            if is_complete:  # what follows is the end of the connection, whenever it comes
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), BODY_TIMEOUT_S)
            except TimeoutError as error:
                raise HTTPException(408, "the body did not come") from error
            is_complete = not message.get("more_body", False)
            taken_bytes += len(message.get("body", b""))
            if taken_bytes > self._limit:
                # The framework passes on only this kind of exception from inside its reading of a body.
                raise HTTPException(413, f"the body: at most {self._limit} bytes")
            return message

        return bounded

    @property
    def _limit(self) -> int:
        return self._runtime.context.settings.body_max_bytes

    def _too_large(self) -> InvalidRequest:
        return InvalidRequest("body-too-large", f"the body: at most {self._limit} bytes", field="body")


def _is_upload(scope: Scope) -> bool:
    return scope["method"] == "POST" and str(scope["path"]).endswith("/uploads")
