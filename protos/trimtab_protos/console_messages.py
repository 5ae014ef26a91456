"""What a console is, as dataclasses and enums beside `messages.py`."""

from enum import StrEnum


class ConsoleKind(StrEnum):
    """`serial`: the first serial port. `vnc`: screen, keyboard and pointer."""

    SERIAL = "serial"
    VNC = "vnc"
