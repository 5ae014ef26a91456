"""Reads a guest's screen: a picture taken by the product's own command, and the text of VGA's text mode in it."""

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from tests.lab.fleet_kit import Fleet


@dataclass(frozen=True, slots=True)
class Screen:
    width: int
    height: int
    rgb: bytes

    def ink(self) -> int:
        """Return how many pixels have not the most frequent colour; 0 is a blank screen."""
        counts: dict[bytes, int] = {}
        for at in range(0, len(self.rgb), 3):
            pixel = self.rgb[at : at + 3]
            counts[pixel] = counts.get(pixel, 0) + 1
        return self.width * self.height - max(counts.values())


def screenshot(fleet: Fleet, name: str, directory: Path) -> Screen:
    """Take a picture of the vm's screen by `trimtab vm console --screenshot`."""
    file = directory / "screen.png"
    fleet.ok("vm", "console", name, "--screenshot", str(file))
    return read_png(file.read_bytes())


def read_png(content: bytes) -> Screen:
    """Read what the command writes: eight bits a colour, no filter."""
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    at, header, packed = 8, b"", b""
    while at < len(content):
        (size,), name = struct.unpack(">I", content[at : at + 4]), content[at + 4 : at + 8]
        body = content[at + 8 : at + 8 + size]
        assert struct.unpack(">I", content[at + 8 + size : at + 12 + size])[0] == zlib.crc32(name + body)
        header, packed = (body, packed) if name == b"IHDR" else (header, packed + body if name == b"IDAT" else packed)
        at += 12 + size
    width, height = struct.unpack(">II", header[:8])
    rows = zlib.decompress(packed)
    row = 1 + width * 3
    return Screen(width, height, b"".join(rows[begin + 1 : begin + row] for begin in range(0, len(rows), row)))
