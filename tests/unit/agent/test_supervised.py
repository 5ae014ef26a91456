"""The agent's supervisor hears of it for as long as its loop turns, and of nobody else's."""

import asyncio
import socket
from pathlib import Path

import pytest

from trimtab_agent import daemon, host_setup


async def test_the_agent_feeds_the_watchdog_that_its_supervisor_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "60000")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(tmp_path / "notify"))
        supervisor.setblocking(False)
        feeding = asyncio.create_task(daemon._feed_watchdog())
        loop = asyncio.get_running_loop()
        heard = [await asyncio.wait_for(loop.sock_recv(supervisor, 100), 10) for _time in range(3)]
        feeding.cancel()
    assert heard == [b"WATCHDOG=1"] * 3


async def test_without_a_watchdog_nobody_is_told_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    await asyncio.wait_for(daemon._feed_watchdog(), 10)


def test_a_frozen_agent_is_killed_by_its_unit_and_only_the_agent() -> None:
    lines = host_setup.UNIT.splitlines()
    assert {"WatchdogSec=30", "WatchdogSignal=SIGKILL", "NotifyAccess=main", "KillMode=process", "Restart=always"} <= set(lines)
