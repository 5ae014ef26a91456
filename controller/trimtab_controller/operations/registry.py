"""All sagas by name. `tests/operations/test_every_saga.py` walks this registry: a saga without a test subject fails there."""

import importlib
import pkgutil
from threading import Lock
from typing import Any

from trimtab_controller.operations import sagas
from trimtab_controller.operations.saga import Saga
from trimtab_protos.errors import Internal

_lock = Lock()
_loaded: dict[str, Saga[Any]] = {}


def all_sagas() -> dict[str, Saga[Any]]:
    """Return the `SAGA` of every module in `sagas/`."""
    if not _loaded:
        with _lock:
            _loaded.update(_load())
    return _loaded


def _load() -> dict[str, Saga[Any]]:
    """Import them all, or fail: Python hands out half-imported modules where two threads import in a circle, and a saga that was
    left out then would be unknown to this process for ever.
    """
    found: dict[str, Saga[Any]] = {}
    for module in pkgutil.iter_modules(sagas.__path__):
        saga = getattr(importlib.import_module(f"{sagas.__name__}.{module.name}"), "SAGA", None)
        if saga is None:
            raise Internal("saga-not-loaded", f"operations/sagas/{module.name}.py has no SAGA (yet); it is tried again")
        found[saga.name] = saga
    return found


def saga_named(name: str) -> Saga[Any]:
    saga = all_sagas().get(name)
    if saga is None:
        raise Internal("saga-unknown", f"this release has no operation {name}; is an older worker still running?", saga=name)
    return saga
