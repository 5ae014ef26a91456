"""Pools on a real directory for tests of what is stored."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.agent.kvm import factories as make
from trimtab_agent.hypervisor.kvm.pool_layout import PoolLayout
from trimtab_protos.messages import PoolSpec


@pytest.fixture
def pool() -> Iterator[PoolSpec]:
    # Not pytest's own directory: pools must be free of symbolic links, and that one may be reached through some.
    with tempfile.TemporaryDirectory(prefix="trimtab-pool-", dir="/var/tmp") as directory:
        path = Path(os.path.realpath(directory)) / "fast"
        path.mkdir()
        spec = make.pool(path)
        PoolLayout.of(spec).create_subdirectories()
        yield spec


@pytest.fixture
def layout(pool: PoolSpec) -> PoolLayout:
    return PoolLayout.of(pool)
