"""Asks many hosts, or two, the same at once, within the time that one step of a driver may take."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from trimtab_controller.store.reach import UpHost
from trimtab_protos.errors import TrimtabError, Unavailable

T = TypeVar("T")
U = TypeVar("U")

PARALLEL = 8
# Well below a driver's lease (`engine.DRIVER_LEASE_S`); hosts whose turn did not come by then are told as unreachable.
ALL_WITHIN_S = 18.0


def ask_each(hosts: Sequence[UpHost], ask: Callable[[UpHost], T]) -> Mapping[str, T | TrimtabError]:
    """Return what each host answered, or the error it met, by id. Anything but a TrimtabError is a defect and is raised."""
    if len(hosts) <= 1:
        return {host.id: _caught(ask, host) for host in hosts}
    pool = ThreadPoolExecutor(min(PARALLEL, len(hosts)), thread_name_prefix="fan-out")
    try:
        futures: dict[str, Future[T | TrimtabError]] = {host.id: pool.submit(_caught, ask, host) for host in hosts}
        wait(futures.values(), timeout=ALL_WITHIN_S)
        return {host_id: future.result() if future.done() else _late() for host_id, future in futures.items()}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def at_once(one: Callable[[], T], other: Callable[[], U]) -> tuple[T, U]:
    """Return what two calls answer that are made at the same time. Raises what either raises; each has its own deadline."""
    with ThreadPoolExecutor(1, thread_name_prefix="at-once") as pool:
        second = pool.submit(other)
        return one(), second.result()


def ask_both(ask: Callable[[str], T], one_host_id: str, other_host_id: str) -> tuple[T, T]:
    """Return what two hosts answer to the same, asked at once."""
    return at_once(lambda: ask(one_host_id), lambda: ask(other_host_id))


def _caught(ask: Callable[[UpHost], T], host: UpHost) -> T | TrimtabError:
    try:
        return ask(host)
    except TrimtabError as error:
        return error


def _late() -> Unavailable:
    return Unavailable("host-not-asked", "other hosts took so long that this one was not asked")
