"""How a daemon of ours speaks to the supervisor that started it (systemd's notification protocol). Standard library only."""

import contextlib
import os
import socket


def notify(text: str) -> None:
    """Tell the supervisor; nothing happens where there is none."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
        sender.sendto(text.encode(), "\0" + address[1:] if address.startswith("@") else address)


def watchdog_limit_s() -> float:
    """Return how often the supervisor wants to hear of us at least; 0 where nobody watches."""
    return int(os.environ.get("WATCHDOG_USEC", "0") or 0) / 1e6
