"""Where gRPC calls enter the agent: errors of the ten kinds leave as statuses, everything else as Internal with a log line here."""

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from typing import Any, NoReturn, TypeVar

import structlog

from trimtab_agent.served import SERVED_SECONDS
from trimtab_agent.workers import WorkerPool
from trimtab_protos import status
from trimtab_protos.errors import ErrorKind, Internal, TrimtabError

T = TypeVar("T")
S = TypeVar("S")
Request = TypeVar("Request")
Response = TypeVar("Response")
Context = Any
"""`grpc.aio.ServicerContext`; the generated stubs want a union of the sync and the aio one, which mypy cannot subclass."""

log = structlog.get_logger(__name__)


def unary(
    method: Callable[[S, Request, Context], Awaitable[Response]],
) -> Callable[[S, Request, Context], Awaitable[Response]]:
    """Wrap a unary method of a servicer."""

    @functools.wraps(method)
    async def wrapped(self: S, request: Request, context: Context) -> Response:
        began_s, outcome = time.monotonic(), "cancelled"
        try:
            response = await method(self, request, context)
            outcome = "ok"
            return response
        except TrimtabError as error:
            outcome = error.kind.value
            return await _refuse(context, error, method.__name__)
        except asyncio.CancelledError:
            raise
        except Exception:  # noqa: BLE001 the process's edge: a traceback never reaches the peer
            outcome = ErrorKind.INTERNAL.value
            return await _break(context, method.__name__)
        finally:
            SERVED_SECONDS.labels(method.__name__, outcome).observe(time.monotonic() - began_s)

    return wrapped


def stream(
    method: Callable[[S, Request, Context], AsyncIterator[Response]],
) -> Callable[[S, Request, Context], AsyncIterator[Response]]:
    """Wrap a method of a servicer that answers with a stream."""

    @functools.wraps(method)
    async def wrapped(self: S, request: Request, context: Context) -> AsyncIterator[Response]:
        try:
            async for response in method(self, request, context):
                yield response
        except TrimtabError as error:
            await _refuse(context, error, method.__name__)
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except Exception:  # noqa: BLE001 the process's edge: a traceback never reaches the peer
            await _break(context, method.__name__)

    return wrapped


async def in_pool(pool: WorkerPool, call: Callable[[], T]) -> T:
    """Return what `call` returns in a thread of `pool`."""
    return await wait(pool.submit(call))


async def wait(future: Future[T]) -> T:
    """Return the future's result without blocking the loop; one that is done needs no turn of the loop."""
    return future.result() if future.done() else await asyncio.wrap_future(future)


async def _refuse(context: Context, error: TrimtabError, verb: str) -> NoReturn:
    log.info("call refused", verb=verb, kind=error.kind.value, code=error.code, message=error.message)
    await context.abort(status.STATUS_BY_KIND[error.kind], error.message, status.trailing_metadata(error))
    raise AssertionError("abort raises")


async def _break(context: Context, verb: str) -> NoReturn:
    log.exception("call broke", verb=verb)
    error = Internal("verb-broke", f"the agent failed at {verb}; its log says why")
    await context.abort(status.STATUS_BY_KIND[error.kind], error.message, status.trailing_metadata(error))
    raise AssertionError("abort raises")
