"""Where QEMU finds the bytes of a volume that nobody writes to, as `qemu-img` says.

That is another program than the one that put them there, so that comparing proves the tables too.
"""

import contextlib
import json
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from trimtab_agent.backup.volume_file import Place
from trimtab_protos.errors import Conflict, Internal


@contextlib.contextmanager
def mapped(file: Path) -> Iterator[Iterator[Place]]:
    """Lend the ranges of a qcow2 file's disk that hold data, in ascending order; all others read as zeros.

    Conflict `volume-inconsistent` where QEMU finds fault with the file's tables: two ranges in one place, for example.
    """
    _check(file)
    with subprocess.Popen(
        ["qemu-img", "map", "--output=json", "-f", "qcow2", "--", str(file)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as told:
        assert told.stdout is not None
        try:
            yield _read(told.stdout)
        finally:
            told.kill()  # nobody reads on


def first_difference(told: Iterator[Place], wanted: Iterable[Place]) -> int | None:
    """Return the first byte of the disk that lies elsewhere than wanted, None where there is none. Both come in ascending order."""
    have = next(told, None)
    for one in wanted:
        offset, end, shift = one.offset, one.offset + one.length, one.at - one.offset
        while offset < end:
            if have is None:
                return offset
            if have.offset != offset or have.at != offset + shift:
                return min(have.offset, offset)
            step = min(have.length, end - offset)
            offset += step
            have = Place(offset, have.length - step, have.at + step) if have.length > step else next(told, None)
    return None if have is None else have.offset


def _read(lines: Iterable[str]) -> Iterator[Place]:
    """Yield what holds data, line by line: of a large disk there may be millions."""
    at = 0
    for line in lines:
        text = line.strip().lstrip("[").rstrip("],")
        if not text:
            continue
        told = json.loads(text)
        if told["start"] != at:
            raise Internal("volume-not-mapped", f"qemu-img said nothing of the volume from byte {at} on")
        at += told["length"]
        if told["zero"] or not told.get("present", True):
            continue
        if "offset" not in told:
            raise Internal("volume-not-mapped", f"qemu-img does not say where byte {told['start']} of the volume lies")
        yield Place(told["start"], told["length"], int(told["offset"]))


def _check(file: Path) -> None:
    checked = subprocess.run(
        ["qemu-img", "check", "-q", "-f", "qcow2", "--", str(file)],
        check=False,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if checked.returncode:
        detail = (checked.stdout + checked.stderr)[-400:]
        if "lock" in detail:
            raise Conflict("image-locked", "the volume is in use by another QEMU, on this host or on another", detail=detail)
        raise Conflict("volume-inconsistent", f"QEMU finds fault with the restored volume: {detail}")
