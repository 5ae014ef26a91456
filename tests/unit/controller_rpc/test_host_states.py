"""The copy of host states in Redis: complete, aged, and dispensable."""

import asyncio
import shutil
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest
import redis

from tests.unit.controller_rpc.conftest import Fleet, eventually, key_pem
from trimtab_controller import metrics
from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.pki import CONTROLLER_NAME
from trimtab_controller.rpc.heard import HeardHosts
from trimtab_controller.rpc.host_states import EVERYTHING_EVERY_S, HOSTS_KEY, PAUSE_AFTER_FAILURE_S, HostState, HostStateMirror
from trimtab_controller.rpc.state_answers import GatewayAsker
from trimtab_controller.store import schema
from trimtab_controller.wiring import ControllerChannels
from trimtab_protos.controller.v1 import host_states_service_pb2 as pb
from trimtab_protos.controller.v1 import host_states_service_pb2_grpc as pb_grpc


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
        "host-1": state("host-1", AT, kill_ms=120, clock_rate_ppm=-37),
        "host-2": state("host-2", AT, is_hypervisor_up=False),
    }
    await mirror.write(states, states, boottime_s=1.0)
    heard = HeardHosts(private_redis.url)
    await eventually(lambda: heard.problem() == "ok")
    assert heard.heard() == {"host-1": AT}  # the other one says nothing of its guests
    assert (heard.states()["host-1"]["kill_ms"], heard.states()["host-1"]["clock_rate_ppm"]) == (120, -37)
    assert not heard.states()["host-2"]["is_hypervisor_up"]
    heard.stop()
    await mirror.close()


async def test_without_redis_the_gateways_are_asked_and_nobody_else_is_answered(fleet: Fleet) -> None:
    """The fixture has no Redis at all, and one gateway that runs; another one's row is left from before it died."""
    machine = await fleet.member("node1")
    stream, _welcome = await machine.open()
    await stream.beat(kill_ms=120)
    told_at = {"address": f"127.0.0.1:{fleet.process.host_port}"}
    fleet.database.write(lambda session: session.execute(schema.lease.update().values(context=told_at)))
    dead = schema.lease.insert().values(
        name="gateway/gw-dead", owner="gw-dead", term=1, beat=1, ttl_ms=15_000, context={"address": "127.0.0.1:1"},
        renewed_at=fleet.clock.now(),
    )  # fmt: skip
    fleet.database.write(lambda session: session.execute(dead))
    asker = GatewayAsker(fleet.database, ControllerChannels(fleet.settings))
    heard = HeardHosts(fleet.settings.effective_redis_url, ask_gateways=asker.states)
    try:
        first = await eventually(lambda: heard.heard().get(machine.host_id))
        assert heard.states()[machine.host_id]["kill_ms"] == 120
        assert heard.problem() != "ok"  # health still says what is missing
        fleet.clock.shift_s += 5
        await stream.beat()
        second = await eventually(lambda: (at := heard.heard()[machine.host_id]) > first and at)
        assert (second - first).total_seconds() >= 5
        await stream.beat(is_hypervisor_up=False)
        await eventually(lambda: machine.host_id not in heard.heard())  # nothing is known of its guests
    finally:
        await asyncio.to_thread(heard.stop)
        asker.close()
    curious = grpc.aio.secure_channel(
        f"127.0.0.1:{fleet.process.host_port}",
        grpc.ssl_channel_credentials(machine.ca_pem, key_pem(machine.key), machine.certificate_pem),
        options=[("grpc.ssl_target_name_override", CONTROLLER_NAME), ("grpc.use_local_subchannel_pool", 1)],
    )
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await pb_grpc.HostStatesServiceStub(curious).ListHostStates(pb.ListHostStatesRequest(), timeout=10)
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    await curious.close()


async def test_sessions_do_not_need_redis(fleet: Fleet) -> None:
    """The fixture's gateway has none at all."""
    machine = await fleet.member("node1")
    stream, _welcome = await machine.open()
    failures = metrics.REDIS_FAILURES._value.get()
    await eventually(lambda: metrics.REDIS_FAILURES._value.get() > failures or failures > 0)
    assert (await stream.beat()).is_granted
