"""The lock-free disk of a lab: every guest has one, two hosts can write to it at once, and the server writes down who did.

QEMU's image locks would hide a double run on one machine, where all hosts share a kernel; so in a lab with this disk they are off
(`qemu_wrapper`). The server is reached by a unix socket in each host, which no cut cable closes: a guest that a cut host still runs
is seen writing. One line of JSON per write: when (CLOCK_BOOTTIME), which host, which QEMU of it, the vm's epoch that it was started
under, and what the guest wrote: its own boot and its counter. `judge` tells whether two ever wrote in turns.

Run as `python -m trimtab_lab.quorum LOG node1=SOCKET node2=SOCKET ...`. Standard library only.
"""

import asyncio
import itertools
import json
import struct
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIZE_BYTES = 1 << 20
MARK = b"trimtab-quorum "
"""What a guest's line begins with, at the start of the disk."""

_OPTION, _OPTION_REPLY, _REQUEST, _REPLY = b"IHAVEOPT", 0x3E889045565A9, 0x25609513, 0x67446698
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_HAS_FLAGS, _SEND_FLUSH, _SEND_TRIM, _SEND_ZEROES, _MULTI_CONN = 1, 4, 32, 64, 256
_FLAGS = _HAS_FLAGS | _SEND_FLUSH | _SEND_TRIM | _SEND_ZEROES | _MULTI_CONN
_OPT_EXPORT_NAME, _OPT_ABORT, _OPT_INFO, _OPT_GO = 1, 2, 6, 7
_REP_ACK, _REP_INFO, _REP_UNSUPPORTED = 1, 3, 0x80000001
_READ, _WRITE, _DISCONNECT, _ZEROES = 0, 1, 2, 6


class Server:
    """Disks by vm, in memory; all connections in one loop, so the log's order is the order of the writes."""

    def __init__(self, log: Path) -> None:
        self._log = log.open("a", buffering=1)
        self._disks: dict[str, bytearray] = {}
        self._numbers = itertools.count(1)

    async def listen(self, host: str, path: Path) -> None:
        path.unlink(missing_ok=True)
        await asyncio.start_unix_server(lambda reader, writer: self._serve(host, reader, writer), str(path))
        path.chmod(0o666)

    async def _serve(self, host: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = next(self._numbers)
        try:
            name = await _negotiate(reader, writer)
            if name:
                await self._transmit(host, number, name, reader=reader, writer=writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._note("closed", host, number)
            writer.close()

    async def _transmit(
        self, host: str, number: int, name: str, *, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        vm_id, _, epoch = name.partition("_")
        disk = self._disks.setdefault(vm_id, bytearray(SIZE_BYTES))
        self._note("opened", host, number, vm=vm_id, epoch=int(epoch or 0))
        while True:
            magic, _flags, kind, cookie, offset, length = struct.unpack(">IHHQQI", await reader.readexactly(28))
            if magic != _REQUEST or kind == _DISCONNECT:
                return
            content = b""
            if kind == _WRITE:
                content = await reader.readexactly(length)
                disk[offset : offset + length] = content
                self._note("wrote", host, number, vm=vm_id, epoch=int(epoch or 0), offset=offset, **_said(content))
            writer.write(struct.pack(">IIQ", _REPLY, 0, cookie))
            if kind == _READ:
                writer.write(bytes(disk[offset : offset + length]))
            elif kind == _ZEROES:
                disk[offset : offset + length] = bytes(length)
            await writer.drain()

    def _note(self, what: str, host: str, number: int, **more: Any) -> None:
        at_s = round(time.clock_gettime(time.CLOCK_BOOTTIME), 4)
        self._log.write(json.dumps({"at_s": at_s, "what": what, "host": host, "connection": number, **more}) + "\n")


def _said(content: bytes) -> dict[str, Any]:
    """Return what a guest's line says; nothing for another write."""
    if not content.startswith(MARK):
        return {}
    words = content[len(MARK) : 200].split(b"\n")[0].decode(errors="replace").split()
    return {"boot": words[0], "counter": int(words[1])} if len(words) > 1 and words[1].isdigit() else {}


async def _negotiate(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
    """Return the name of the export that the client chose; empty where it left."""
    writer.write(b"NBDMAGIC" + _OPTION + struct.pack(">H", _FIXED_NEWSTYLE | _NO_ZEROES))
    await writer.drain()
    (client_flags,) = struct.unpack(">I", await reader.readexactly(4))
    while True:
        _magic, option, length = struct.unpack(">8sII", await reader.readexactly(16))
        content = await reader.readexactly(length)
        if option == _OPT_EXPORT_NAME:
            writer.write(struct.pack(">QH", SIZE_BYTES, _FLAGS) + (b"" if client_flags & _NO_ZEROES else bytes(124)))
            await writer.drain()
            return content.decode()
        if option in {_OPT_GO, _OPT_INFO}:
            (name_length,) = struct.unpack(">I", content[:4])
            writer.write(_option_reply(option, _REP_INFO, struct.pack(">HQH", 0, SIZE_BYTES, _FLAGS)))
            writer.write(_option_reply(option, _REP_ACK))
            await writer.drain()
            if option == _OPT_GO:
                return content[4 : 4 + name_length].decode()
            continue
        writer.write(_option_reply(option, _REP_ACK if option == _OPT_ABORT else _REP_UNSUPPORTED))
        await writer.drain()
        if option == _OPT_ABORT:
            return ""


def _option_reply(option: int, kind: int, content: bytes = b"") -> bytes:
    return struct.pack(">QIII", _OPTION_REPLY, option, kind, len(content)) + content


# --- reading the log -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Write:
    """A line that a guest wrote of itself."""

    at_s: float
    host: str
    connection: int
    vm: str
    epoch: int
    boot: str
    counter: int


def writes(log: Path, vm: str = "") -> list[Write]:
    """Return what guests wrote, in the server's order; of one vm or of all."""
    found = []
    for line in log.read_text().splitlines():
        try:
            each = json.loads(line)
        except ValueError:
            continue  # being written
        if each["what"] == "wrote" and "counter" in each and vm in {"", each["vm"]}:
            found.append(Write(*(each[name] for name in ("at_s", "host", "connection", "vm", "epoch", "boot", "counter"))))
    return found


def judge(seen: Iterable[Write]) -> list[str]:
    """Return every time a QEMU wrote after another had taken its vm over, in words; empty: one writer at any time."""
    wrong = []
    last: dict[str, Write] = {}
    former: dict[str, set[int]] = {}
    for each in seen:
        before = last.get(each.vm)
        if before is not None and before.connection != each.connection:
            former.setdefault(each.vm, set()).add(before.connection)
            if each.connection in former[each.vm]:
                wrong.append(
                    f"{each.vm}: {each.host} (epoch {each.epoch}) wrote {each.counter} at {each.at_s:.2f} s, after "
                    f"{before.host} (epoch {before.epoch}) had written {before.counter} at {before.at_s:.2f} s"
                )
        last[each.vm] = each
    return wrong


# --- hosts -----------------------------------------------------------------------------------------------------------------------

SOCKET_IN_HOST = "/run/trimtab-lab/quorum.sock"
REAL_QEMU_IN_HOST = "/run/trimtab-lab-qemu/usr/bin/qemu-system-x86_64"
QEMU = "/usr/bin/qemu-system-x86_64"


def qemu_wrapper() -> str:
    """Return the program that hosts run as QEMU: image locks off, and the disk plugged into every guest."""
    return rf"""#!/bin/bash
# Stands before QEMU in a lab with a lock-free disk.
real={REAL_QEMU_IN_HOST}
for place in share lib; do # QEMU looks for its firmware and modules beside itself
  [ -e /run/trimtab-lab-qemu/usr/$place ] || ln -sfn /usr/$place /run/trimtab-lab-qemu/usr/$place
done
words=() guest=
for word in "$@"; do
  case $word in
  '{{"driver":"file",'*) word='{{"driver":"file","locking":"off",'"${{word#'{{"driver":"file",'}}" ;;
  guest=trimtab-*) guest=${{word#guest=}} guest=${{guest%%,*}} ;;
  esac
  words+=("$word")
done
if [ -n "$guest" ] && [ -S {SOCKET_IN_HOST} ]; then
  epoch=$(sed -n "s/.*stamp epoch=['\"]\([0-9]*\).*/\1/p" "/etc/libvirt/qemu/$guest.xml" 2>/dev/null | head -n 1)
  words+=(-drive "file=nbd+unix:///${{guest#trimtab-}}_${{epoch:-0}}?socket={SOCKET_IN_HOST},format=raw,if=none,id=quorum")
  # A slot that no definition of ours uses; without one QEMU would take the first, before the others have theirs.
  words+=(-device virtio-blk-pci,drive=quorum,serial=quorum,bus=pcie.0,addr=0x1d)
fi
exec "$real" "${{words[@]}}"
"""


async def _main(log: Path, sockets: Iterable[str]) -> None:
    server = Server(log)
    for each in sockets:
        host, _, path = each.partition("=")
        await server.listen(host, Path(path))
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]), sys.argv[2:]))
