"""What makes a method of the simulated hypervisor one of its verbs."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from trimtab_agent.hypervisor.simulation import FaultKind

P = ParamSpec("P")
T = TypeVar("T")


def verb(method: Callable[P, T]) -> Callable[P, T]:
    """Make a method a verb: it fails while the hypervisor is down, takes its latency, and meets planned faults."""
    name = method.__name__

    @functools.wraps(method)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        host: Any = args[0]
        host.require_up()
        latency_s = host.fleet.latency_s.get(name, 0.0)
        if latency_s:
            host.fleet.clock.sleep(latency_s)
        fault = host.fleet.take_fault(host.host_id, name)
        if fault is not None and fault.kind is FaultKind.FAIL_BEFORE:
            raise fault.error
        if fault is not None and fault.kind is FaultKind.HANG:
            fault.released.wait()
            host.require_up()
        result = method(*args, **kwargs)
        if fault is not None and fault.kind is FaultKind.FAIL_AFTER:
            raise fault.error
        return result

    return wrapped
