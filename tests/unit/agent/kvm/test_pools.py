"""Pools: which paths may be one, how they are observed, and that a hung one stalls nobody."""

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.agent.kvm import factories as make
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.guarded import GuardedCalls, Hung
from trimtab_agent.hypervisor.kvm.pool_layout import PoolLayout
from trimtab_agent.hypervisor.kvm.pools import Pools
from trimtab_agent.hypervisor.kvm.volume_keys import VolumeKeys
from trimtab_protos.errors import Conflict, InvalidRequest
from trimtab_protos.messages import PoolSpec


@pytest.fixture
def pools() -> Iterator[Pools]:
    connection = Connection("test:///default", on_open=lambda _connection: None)
    connection.start()
    assert connection.wait_until_up(10)
    yield Pools(connection, VolumeKeys())
    connection.stop()


@pytest.mark.parametrize(
    "path",
    [
        *("", "srv/x", "./x", "//srv/x", "/srv/../etc", "/srv//x", "/srv/./x", "/srv/x\0y"),
        *("/", "/srv", "/tmp", "/var", "/var/lib", "/etc", "/etc/x", "/proc/x", "/sys/x", "/dev/shm", "/run/x", "/usr/local/x"),
        *("/boot/x", "/var/lib/libvirt", "/var/lib/libvirt/qemu", "/var/lib/libvirt/qemu/nvram", "/var/lib/trimtab"),
    ],
)
def test_a_path_that_the_agent_must_not_use_is_refused(path: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        PoolLayout.of(make.pool(path))
    assert refused.value.code == "pool-path-refused"


@pytest.mark.parametrize("path", ["/srv/vms", "/data", "/mnt/nfs/vms", "/var/lib/libvirt/images/", "/home/vms"])
def test_ordinary_paths_are_fine(path: str) -> None:
    assert str(PoolLayout.of(make.pool(path)).path) == path.rstrip("/")


def test_ensure_makes_the_folders_and_is_repeatable(pools: Pools, pool: PoolSpec) -> None:
    for folder in Path(pool.path).iterdir():
        folder.rmdir()
    first, second = pools.ensure(pool), pools.ensure(pool)
    assert sorted(os.listdir(pool.path)) == ["images", "import", "vms", "volumes"]
    assert first.is_responsive
    assert 0 < second.available_bytes <= second.capacity_bytes
    assert pools.known() == (PoolSpec(pool_id="pool-fast", path=pool.path),)
    pools.remove("pool-fast")
    pools.remove("pool-fast")
    assert pools.known() == ()
    assert (Path(pool.path) / "volumes").is_dir()


def test_one_pool_is_at_one_path(pools: Pools, pool: PoolSpec, tmp_path: Path) -> None:
    pools.ensure(pool)
    elsewhere = Path(pool.path).parent / "slow"
    elsewhere.mkdir()
    with pytest.raises(Conflict) as refused:
        pools.ensure(make.pool(elsewhere))
    assert refused.value.code == "pool-path-differs"
    pools.remove("pool-fast")


def test_one_directory_is_no_second_pool_under_another_name(pools: Pools, pool: PoolSpec) -> None:
    """A bind mount: two pools would count and hand out the same bytes twice. Mounting takes root."""
    pools.ensure(pool)
    twin = Path(pool.path).parent / "twin"
    twin.mkdir()
    subprocess.run(["mount", "--bind", pool.path, twin], check=True, timeout=10)
    try:
        with pytest.raises(Conflict) as refused:
            pools.ensure(make.pool(twin, pool_id="pool-twin"))
    finally:
        subprocess.run(["umount", "--lazy", twin], check=True, timeout=10)
    assert (refused.value.code, pool.path in refused.value.message) == ("pool-path-taken", True)
    assert [one.pool_id for one in pools.known()] == [pool.pool_id]
    pools.ensure(make.pool(twin, pool_id="pool-twin"))


def test_a_missing_path_or_a_link_is_refused(pools: Pools, pool: PoolSpec) -> None:
    link = Path(pool.path).parent / "link"
    link.symlink_to(pool.path)
    for path in (link, link / "deeper", Path(pool.path) / "none"):
        with pytest.raises(InvalidRequest) as refused:
            pools.ensure(make.pool(path))
        assert refused.value.code == "pool-path-unusable"


def test_markers_are_written_read_and_removed(pools: Pools, pool: PoolSpec) -> None:
    assert pools.check_marker(pool, "op-1", write_content="", remove=False) == ""
    assert pools.check_marker(pool, "op-1", write_content="from host 1", remove=False) == "from host 1"
    assert pools.check_marker(pool, "op-1", write_content="", remove=False) == "from host 1"
    assert pools.check_marker(pool, "op-1", write_content="", remove=True) == ""
    assert pools.check_marker(pool, "op-1", write_content="", remove=False) == ""
    with pytest.raises(InvalidRequest):
        pools.check_marker(pool, "../x", write_content="x", remove=False)


def test_a_hung_call_costs_its_limit_and_one_thread(request: pytest.FixtureRequest) -> None:
    guarded, released = GuardedCalls(), threading.Event()
    request.addfinalizer(released.set)
    started: list[str] = []

    def hang() -> None:
        started.append(threading.current_thread().name)
        released.wait(30)

    begin = time.monotonic()
    for _ in range(3):
        with pytest.raises(Hung):
            guarded.run("dead", hang, timeout_s=0.1)
    assert time.monotonic() - begin < 2
    assert len(started) == 1
    assert guarded.run("alive", lambda: 7, timeout_s=5) == 7
    released.set()
    assert guarded.run("dead", lambda: 8, timeout_s=5) == 8


def test_a_guarded_error_is_the_callers() -> None:
    guarded = GuardedCalls()
    with pytest.raises(FileNotFoundError):
        guarded.run("x", lambda: os.stat("/none"), timeout_s=5)
    with contextlib.suppress(Hung):
        assert guarded.run("x", lambda: "free again", timeout_s=5) == "free again"


def test_observing_a_pool_that_vanished_says_so(pools: Pools, pool: PoolSpec) -> None:
    (Path(pool.path) / "volumes").rmdir()
    seen = pools.observe(pool)
    assert not seen.is_responsive
    assert "directory" in seen.problem
