"""A short, seeded fault campaign over real processes; the long ones are `make soak`."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.soak.campaign import FAULTS, Wishes
from tests.soak.chaos import campaign
from tests.soak.controlplane import Shape

SMALL = Shape(hosts=4, workers=2, engines=1, gateways=1)


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """A directory with a short path, for sockets."""
    with tempfile.TemporaryDirectory(prefix="tt-chaos-") as name:
        yield Path(name)


@pytest.mark.timeout(900)
def test_no_operation_is_lost_or_done_twice_while_everything_is_killed_now_and_then(
    short_directory: Path, database_url: str
) -> None:
    wishes = Wishes(seed=7, operations=30, pace_s=0.15, fault_every_s=(0.3, 0.8), redis_down_s=4.0)
    url = "" if database_url.startswith("sqlite") else database_url
    with campaign(short_directory, wishes, SMALL, database_url=url) as ready:
        verdict = ready.run()
    assert verdict.violations == []
    assert verdict.accepted >= wishes.operations
    assert sum(verdict.ended.values()) == verdict.accepted
    assert set(verdict.faults) == set(FAULTS), "each kind of fault was met"
