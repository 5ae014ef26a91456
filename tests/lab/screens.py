"""Reads a guest's screen: a picture taken by the product's own command, and the text of VGA's text mode in it."""

import struct
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import cache
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


CELL_WIDTH, CELL_HEIGHT = 8, 16
CELL_ROW = 3 * CELL_WIDTH
WIDE_TEXT_MODE = 720
FONT_ROM = Path("/usr/share/seabios/vgabios-stdvga.bin")
# The letter A of VGA's 8×16 font, by which the font is found in the ROM.
_LETTER_A = bytes.fromhex("000010386cc6c6fec6c6c6c600000000")


def text_of(screen: Screen) -> str:
    """Return the text of a screen of 8×16 cells, drawn with VGA's own font, as Linux's console is; other letters are '?'."""
    letters = _letters()
    # VGA's own text mode puts a ninth column of pixels between letters.
    pitch = 3 * (CELL_WIDTH + 1) if screen.width == WIDE_TEXT_MODE else CELL_ROW
    lines = []
    for top in range(0, screen.height - CELL_HEIGHT + 1, CELL_HEIGHT):
        rows = [screen.rgb[(top + row) * screen.width * 3 :][: screen.width * 3] for row in range(CELL_HEIGHT)]
        cells = (b"".join(row[left : left + CELL_ROW] for row in rows) for left in range(0, len(rows[0]), pitch))
        lines.append("".join(letters.get(_glyph(cell), "?") for cell in cells).rstrip())
    return "\n".join(lines)


@cache
def _letters() -> dict[bytes, str]:
    rom = FONT_ROM.read_bytes()
    base = rom.index(_LETTER_A) - ord("A") * CELL_HEIGHT
    glyphs = {rom[base + code * CELL_HEIGHT :][:CELL_HEIGHT]: chr(code) for code in range(0x7E, 0x20, -1)}
    return {**glyphs, bytes(CELL_HEIGHT): " "}


@cache
def _glyph(cell: bytes) -> bytes:
    """Return a cell's pixels as a glyph's bits: the rarer of its two colours is the letter's. Most cells of a screen are alike."""
    pixels = [cell[at : at + 3] for at in range(0, len(cell), 3)]
    colours = Counter(pixels).most_common(2)
    if len(colours) < 2:
        return bytes(CELL_HEIGHT)
    ink = colours[1][0]
    rows = (pixels[at : at + CELL_WIDTH] for at in range(0, len(pixels), CELL_WIDTH))
    return bytes(sum((pixel == ink) << (7 - x) for x, pixel in enumerate(row)) for row in rows)
