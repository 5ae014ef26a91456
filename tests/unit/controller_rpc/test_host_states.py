"""The copy of host states in Redis: complete, aged, and dispensable."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import redis

from tests.unit.controller_rpc.conftest import Fleet, eventually
from trimtab_controller import metrics
from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.rpc.heard import HeardHosts
from trimtab_controller.rpc.host_states import EVERYTHING_EVERY_S, HOSTS_KEY, PAUSE_AFTER_FAILURE_S, HostState, HostStateMirror


class PrivateRedis:
    def __init__(self, directory: Path) -> None:
        self.socket = directory / "redis.sock"
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> None:
        program = shutil.which("redis-server")
        assert program is not None, "install redis-server"
        command = [program, "--port", "0", "--unixsocket", str(self.socket), "--save", "", "--dir", str(self._directory)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        client = redis.Redis.from_url(self.url)
        deadline = time.monotonic() + 10
        while True:
            try:
                client.ping()
                break
            except redis.exceptions.RedisError:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        client.close()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=10)
            self._process = None


@pytest.fixture
def private_redis(memory_directory: Path) -> Iterator[PrivateRedis]:
    directory = memory_directory / f"redis-{time.monotonic_ns()}"
    directory.mkdir()
    server = PrivateRedis(directory)
    server.start()
    yield server
    server.stop()
    shutil.rmtree(directory)


def state(host_id: str, at: datetime, **fields: object) -> HostState:
    return HostState(
        host_id=host_id,
        name=host_id,
        lease_number=1,
        connectivity=HostConnectivity.UP,
        heard_boottime_s=0.0,
        heard_unix_ms=int(at.timestamp() * 1000),
        **fields,  # type: ignore[arg-type]
    )


AT = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


async def test_changed_hosts_are_written_and_everything_now_and_then(private_redis: PrivateRedis) -> None:
    mirror = HostStateMirror(private_redis.url, gateway_id="gw-1")
    client = redis.Redis.from_url(private_redis.url, decode_responses=True)
    states = {host_id: state(host_id, AT) for host_id in ("host-1", "host-2")}
    assert await mirror.write(states, {"host-1"}, boottime_s=100.0)
    assert set(client.hkeys(HOSTS_KEY)) == {"host-1", "host-2"}  # type: ignore[arg-type]
    client.flushall()
    assert await mirror.write(states, {"host-1"}, boottime_s=101.0)
    assert set(client.hkeys(HOSTS_KEY)) == {"host-1"}  # type: ignore[arg-type]
    assert await mirror.write(states, set(), boottime_s=101.0 + EVERYTHING_EVERY_S)
    assert set(client.hkeys(HOSTS_KEY)) == {"host-1", "host-2"}  # type: ignore[arg-type]
    await mirror.forget(["host-1"], boottime_s=112.0)
    assert set(client.hkeys(HOSTS_KEY)) == {"host-2"}  # type: ignore[arg-type]
    client.close()
    await mirror.close()


async def test_losing_redis_is_counted_and_everything_comes_back_with_it(private_redis: PrivateRedis) -> None:
    mirror = HostStateMirror(private_redis.url, gateway_id="gw-1")
    states = {"host-1": state("host-1", AT)}
    assert await mirror.write(states, states, boottime_s=100.0)
    private_redis.stop()
    failures = metrics.REDIS_FAILURES._value.get()
    assert not await mirror.write(states, states, boottime_s=101.0)
    assert not await mirror.write(states, states, boottime_s=102.0)  # left alone for a while
    assert metrics.REDIS_FAILURES._value.get() == failures + 1
    private_redis.start()
    assert await mirror.write(states, set(), boottime_s=101.0 + PAUSE_AFTER_FAILURE_S)
    client = redis.Redis.from_url(private_redis.url)
    assert client.hlen(HOSTS_KEY) == 1
    client.close()
    await mirror.close()


async def test_readers_learn_when_each_host_was_heard(private_redis: PrivateRedis) -> None:
    mirror = HostStateMirror(private_redis.url, gateway_id="gw-1")
    states = {
        "host-1": state("host-1", AT, kill_ms=120),
        "host-2": state("host-2", AT, is_hypervisor_up=False),
    }
    await mirror.write(states, states, boottime_s=1.0)
    heard = HeardHosts(private_redis.url)
    await eventually(lambda: heard.problem() == "ok")
    assert heard.heard() == {"host-1": AT}  # the other one says nothing of its guests
    assert heard.states()["host-1"]["kill_ms"] == 120
    assert not heard.states()["host-2"]["is_hypervisor_up"]
    heard.stop()
    await mirror.close()


async def test_sessions_do_not_need_redis(fleet: Fleet) -> None:
    """The fixture's gateway has none at all."""
    machine = await fleet.member("node1")
    stream, _welcome = await machine.open()
    failures = metrics.REDIS_FAILURES._value.get()
    await eventually(lambda: metrics.REDIS_FAILURES._value.get() > failures or failures > 0)
    assert (await stream.beat()).is_granted
