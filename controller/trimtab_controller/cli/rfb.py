"""Takes one picture of a screen by the RFB protocol (RFC 6143), and writes it as PNG; no library of pictures is needed for either."""

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from trimtab_controller.cli.errors import CommandFailed

VERSION = b"RFB 003.008\n"
_NO_AUTHENTICATION = 1
_RAW, _DESKTOP_SIZE = 0, -223
# 32 bits a pixel, little-endian, red in the third byte: what is asked of the server, so that only this is to be read.
_PIXELS = struct.pack(">BBBBHHHBBBxxx", 32, 24, 0, 1, 255, 255, 255, 16, 8, 0)
_SIDE_MAX = 16384
_TRIES = 4


@dataclass(frozen=True, slots=True)
class Picture:
    """`rgb` has three bytes a pixel, row by row."""

    width: int
    height: int
    rgb: bytes

    def colours(self) -> int:
        """Return how many colours it shows; a blank screen shows one."""
        return len({self.rgb[at : at + 3] for at in range(0, len(self.rgb), 3)})

    def png(self) -> bytes:
        row = self.width * 3
        rows = b"".join(b"\0" + self.rgb[at : at + row] for at in range(0, len(self.rgb), row))
        header = struct.pack(">IIBBBBB", self.width, self.height, 8, 2, 0, 0, 0)
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 6)), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, content) for name, content in chunks)


class _Reader:
    """Takes so many bytes of a stream that comes in pieces."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._held = bytearray()

    def take(self, size: int) -> bytes:
        while len(self._held) < size:
            piece = next(self._pieces, None)
            if piece is None:
                raise _broken("the screen's server went away in the middle")
            self._held += piece
        taken = bytes(self._held[:size])
        del self._held[:size]
        return taken

    def numbers(self, layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))


def photograph(pieces: Iterator[bytes], write: Callable[[bytes], None]) -> Picture:
    """Return what the screen shows now. CommandFailed where the other side speaks no RFB 3.8, or wants a password."""
    reader = _Reader(pieces)
    width, height = _greet(reader, write)
    write(struct.pack(">Bxxx", 0) + _PIXELS)
    write(struct.pack(">BxHii", 2, 2, _RAW, _DESKTOP_SIZE))
    for _ in range(_TRIES):
        write(struct.pack(">BBHHHH", 3, 0, 0, 0, width, height))
        canvas = bytearray(width * height * 4)
        resized = _update(reader, canvas, width)
        if resized is None:
            return Picture(width, height, _rgb(canvas))
        width, height = resized
    raise _broken("the screen changed its size again and again")


def _greet(reader: _Reader, write: Callable[[bytes], None]) -> tuple[int, int]:
    greeting = reader.take(12)
    if not greeting.startswith(b"RFB 003."):
        raise _broken(f"it greets with {greeting!r}")
    write(VERSION)
    (count,) = reader.numbers(">B")
    if not count or _NO_AUTHENTICATION not in reader.take(count):
        raise _broken("it asks for a password")
    write(bytes([_NO_AUTHENTICATION]))
    if reader.numbers(">I") != (0,):
        raise _broken("it refuses who comes without a password")
    write(b"\1")  # others may look at the same time
    width, height = reader.numbers(">HH")
    reader.take(16)
    (name_bytes,) = reader.numbers(">I")
    reader.take(min(name_bytes, 1 << 16))
    return _bounded(width, height)


def _update(reader: _Reader, canvas: bytearray, width: int) -> tuple[int, int] | None:
    """Draw one update; return the new size where the screen changed it instead."""
    while True:
        match reader.take(1)[0]:
            case 0:
                break
            case 1:
                _, _first, colours = reader.numbers(">BHH")
                reader.take(6 * colours)
            case 2:
                pass  # the bell
            case 3:
                (size,) = reader.numbers(">xxxI")
                reader.take(min(size, 1 << 20))
            case other:
                raise _broken(f"it sent a message of kind {other}")
    (rectangles,) = reader.numbers(">xH")
    resized = None
    for _ in range(rectangles):
        left, top, across, down, encoding = reader.numbers(">HHHHi")
        if encoding == _DESKTOP_SIZE:
            resized = _bounded(across, down)
            continue
        if encoding != _RAW:
            raise _broken(f"it sent pixels in encoding {encoding}")
        for row in range(down):
            pixels = reader.take(across * 4)
            begin = ((top + row) * width + left) * 4
            canvas[begin : begin + len(pixels)] = pixels
    return resized


def _bounded(width: int, height: int) -> tuple[int, int]:
    if not (0 < width <= _SIDE_MAX and 0 < height <= _SIDE_MAX):
        raise _broken(f"its screen is {width} by {height}")
    return width, height


def _rgb(canvas: bytearray) -> bytes:
    rgb = bytearray(len(canvas) // 4 * 3)
    rgb[0::3], rgb[1::3], rgb[2::3] = canvas[2::4], canvas[1::4], canvas[0::4]
    return bytes(rgb)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _broken(why: str) -> CommandFailed:
    return CommandFailed(f"no picture of the screen: {why}", code="screen-unreadable", kind="internal")
