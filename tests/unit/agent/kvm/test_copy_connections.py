"""Whose connections the kernel gives up early: a process' own to another host's migration ports, and no other."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from trimtab_agent.hypervisor.kvm import copy_connections
from trimtab_agent.peer_check import MIGRATION_PORTS

QEMU = """
import socket, sys
one = [socket.create_connection((address, int(port))) for address, port in (end.rsplit("/", 1) for end in sys.argv[1:])]
print("connected", flush=True)
sys.stdin.readline()
print(*(each.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) for each in one), flush=True)
"""
"""Connects to the ends that it is given, and says upon a line how long the kernel tries on each, in ms."""
LIMIT_MS = int(1000 * copy_connections.GIVES_UP_AFTER_S)


@pytest.fixture
def listeners() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def migration_listener(opened: ExitStack, family: socket.AddressFamily = socket.AF_INET) -> str:
    """Return ADDRESS/PORT of a listener on a port that libvirt gives to a guest that arrives."""
    listener = opened.enter_context(socket.socket(family))
    for port in range(*MIGRATION_PORTS):
        try:
            listener.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", port))
        except OSError:
            continue
        listener.listen()
        return "/".join(map(str, listener.getsockname()[:2]))
    raise AssertionError("every port of a migration is taken")


def other_listener(opened: ExitStack) -> str:
    return "/".join(map(str, opened.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[:2]))


def limits_of(*ends: str) -> tuple[int, list[int]]:
    """Return how many connections of a process to these ends were bound, and then the limit of each."""
    with subprocess.Popen([sys.executable, "-c", QEMU, *ends], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as qemu:
        assert qemu.stdout is not None
        assert qemu.stdout.readline() == "connected\n"
        count = copy_connections.bound(qemu.pid)
        told, _ = qemu.communicate("\n", timeout=60)
    return count, [int(word) for word in told.split()]


def test_a_disk_s_way_to_another_host_is_given_up_early_and_a_disk_behind_a_network_is_not(listeners: ExitStack) -> None:
    ends = (other_listener(listeners), migration_listener(listeners))
    assert limits_of(*ends) == (1, [0, LIMIT_MS])


def test_so_it_is_over_ipv6(listeners: ExitStack) -> None:
    assert limits_of(migration_listener(listeners, socket.AF_INET6)) == (1, [LIMIT_MS])


def test_a_process_that_has_none_or_is_gone_has_nothing_to_bound(listeners: ExitStack) -> None:
    assert limits_of(other_listener(listeners)) == (0, [0])
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait(timeout=60)
    assert copy_connections.bound(ended.pid) == 0


def test_no_process_is_nobody() -> None:
    assert copy_connections.bound(0) == 0
