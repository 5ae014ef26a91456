"""Which file is a volume that moves: one side at every instant, and neither where nothing can be trusted to be it."""

from dataclasses import replace
from pathlib import Path

import pytest

from trimtab_agent.hypervisor.kvm import move_files, volumes
from trimtab_agent.hypervisor.kvm.pool_layout import PoolLayout
from trimtab_protos.errors import Conflict, NotFound
from trimtab_protos.messages import DiskFormat, DiskSpec, PoolSpec, VolumeSpec
from trimtab_protos.volume_messages import VolumeMove

SIZE = 1 << 20


@pytest.fixture
def move(layout: PoolLayout) -> VolumeMove:
    """A volume of 1 MiB with content, and a second pool beside its own."""
    other = Path(f"{layout.path}-other")
    other.mkdir()
    source, target = PoolSpec(pool_id=layout.pool_id, path=str(layout.path)), PoolSpec(pool_id="pool-other", path=str(other))
    PoolLayout.of(target).create_subdirectories()
    made = VolumeMove(
        volume_id="vol-moves",
        source_pool=source,
        target_pool=target,
        source_format=DiskFormat.RAW,
        target_format=DiskFormat.RAW,
        size_bytes=SIZE,
    )
    volumes.ensure(VolumeSpec(volume_id="vol-moves", pool_id=source.pool_id, format=DiskFormat.RAW, size_bytes=SIZE), layout)
    Path(move_files.source_path(made)).write_bytes(b"x" * SIZE)
    return made


def resolved(move: VolumeMove) -> str:
    """Return the pool in which a guest that is started now finds its disk."""
    disk = DiskSpec(
        volume_id=move.volume_id,
        pool_id=move.source_pool.pool_id,
        format=move.source_format,
        index=0,
        move_pool_id=move.target_pool.pool_id,
        move_format=move.target_format,
    )
    layouts = {pool.pool_id: PoolLayout.of(pool) for pool in (move.source_pool, move.target_pool)}
    return move_files.resolve(disk, layouts).pool_id


def test_the_former_side_is_the_volume_until_it_is_let_go(move: VolumeMove) -> None:
    move_files.begin_mirror(move)
    assert resolved(move) == move.source_pool.pool_id
    for _twice in range(2):
        move_files.let_go(move, lambda: True)
        assert resolved(move) == move.target_pool.pool_id
    assert not move_files.is_at_source(move)


def test_a_copy_that_is_not_whole_is_never_taken_for_the_volume(move: VolumeMove) -> None:
    move_files.begin_mirror(move)
    Path(move_files.source_path(move)).unlink()  # its file system is not mounted, say
    for look in (lambda: resolved(move), lambda: move_files.is_at_source(move)):
        with pytest.raises(Conflict) as refused:
            look()
        assert refused.value.code == "volume-half-moved"


def test_a_guest_that_ended_meanwhile_keeps_the_former_side(move: VolumeMove) -> None:
    move_files.begin_mirror(move)
    with pytest.raises(Conflict, match="ended"):
        move_files.let_go(move, lambda: False)
    assert resolved(move) == move.source_pool.pool_id


def test_a_side_that_somebody_else_has_open_is_not_removed(move: VolumeMove) -> None:
    move_files.begin_mirror(move)
    with PoolLayout.of(move.source_pool).open("volumes") as directory, move_files.alone_with(directory, "vol-moves.raw"):
        with pytest.raises(Conflict) as refused:
            move_files.let_go(move, lambda: True)
        assert refused.value.code == "image-locked"
    assert Path(move_files.source_path(move)).stat().st_size == SIZE


def test_a_copy_without_a_guest_is_whole_or_not_there(move: VolumeMove) -> None:
    for _twice in range(2):
        move_files.copy(move, volumes.CopyWatch())
        assert Path(move_files.target_path(move)).read_bytes() == b"x" * SIZE
    assert resolved(move) == move.source_pool.pool_id, "until the record says otherwise"
    move_files.drop_source(move)
    assert resolved(move) == move.target_pool.pool_id
    gone = replace(move, volume_id="vol-nowhere")
    with pytest.raises(NotFound):
        move_files.is_at_source(gone)
