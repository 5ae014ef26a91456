"""All sagas by name. `tests/operations/test_every_saga.py` walks this registry: a saga without a test subject fails there."""

import importlib
import pkgutil
from functools import cache
from typing import Any

from trimtab_controller.operations import sagas
from trimtab_controller.operations.saga import Saga
from trimtab_protos.errors import Internal


@cache
def all_sagas() -> dict[str, Saga[Any]]:
    """Return every `SAGA` of the modules in `sagas/`."""
    found: dict[str, Saga[Any]] = {}
    for module in pkgutil.iter_modules(sagas.__path__):
        saga = getattr(importlib.import_module(f"{sagas.__name__}.{module.name}"), "SAGA", None)
        if saga is not None:
            found[saga.name] = saga
    return found


def saga_named(name: str) -> Saga[Any]:
    saga = all_sagas().get(name)
    if saga is None:
        raise Internal("saga-unknown", f"this release has no operation {name}; is an older worker still running?", saga=name)
    return saga
