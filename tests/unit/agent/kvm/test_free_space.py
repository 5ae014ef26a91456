"""What a job that fills a file system leaves to others; real file systems: `test_images.py`."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from trimtab_agent.hypervisor.kvm.free_space import FreeSpace, free_bytes, kept_free_bytes

MIB = 1 << 20


@pytest.fixture
def directory(tiny_disk: Path) -> Iterator[int]:
    descriptor = os.open(tiny_disk, os.O_RDONLY | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize(("free_mib", "kept_mib"), [(0, 0), (96, 24), (4096, 1024), (100_000, 1024)])
def test_a_quarter_is_kept_and_at_most_a_gibibyte(free_mib: int, kept_mib: int) -> None:
    assert kept_free_bytes(free_mib * MIB) == kept_mib * MIB


def test_what_others_take_meanwhile_is_not_left_to_the_job(directory: int, tiny_disk: Path) -> None:
    space = FreeSpace.of(directory)
    assert (space.free_before_bytes, space.kept_free_bytes, space.left_bytes()) == (96 * MIB, 24 * MIB, 72 * MIB)
    (tiny_disk / "disk").write_bytes(bytes(60 * MIB))
    assert (free_bytes(directory), space.left_bytes()) == (36 * MIB, 12 * MIB)
    (tiny_disk / "another").write_bytes(bytes(20 * MIB))
    assert space.left_bytes() == 0, "what is kept was not for the job"


def test_what_the_job_wrote_counts_also_before_the_file_system_tells(directory: int) -> None:
    assert FreeSpace.of(directory).left_bytes(written_bytes=50 * MIB) == 22 * MIB
