"""What QEMU follows in its memory of a raw disk, with a QEMU that never runs a guest; its monitor stands in for libvirt's way to it."""

import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trimtab_agent.backup.nbd import ALLOCATION, DIRTY, NbdClient
from trimtab_agent.hypervisor.kvm import memory_bitmaps, monitor
from trimtab_protos.errors import Unavailable

MIB = 1 << 20
DISK = "ua-vol-1"


class Qemu:
    """A machine that stands still, with one raw disk; also the `domain` of the functions."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("disk.raw", "scratch.raw"):
            with (directory / name).open("wb") as file:
                file.truncate(16 * MIB)
        ours, theirs = socket.socketpair()
        disk = {"driver": "raw", "node-name": "top", "file": {"driver": "file", "filename": str(directory / "disk.raw")}}
        arguments = ["-S", "-M", "q35", "-accel", "tcg", "-display", "none", "-nodefaults", "-m", "16"]
        monitor = ["-chardev", f"socket,id=monitor,fd={theirs.fileno()}", "-mon", "chardev=monitor,mode=control"]
        devices = ["-blockdev", json.dumps(disk), "-device", f"virtio-blk-pci,drive=top,id={DISK}"]
        self.process = subprocess.Popen(
            ["qemu-system-x86_64", *arguments, *monitor, *devices], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
        )
        theirs.close()
        self._lines = ours.makefile("rw")
        self._lines.readline()
        self.ask("qmp_capabilities")

    def isActive(self) -> int:
        return 1

    def command(self, text: str) -> str:
        self._lines.write(text + "\n")
        self._lines.flush()
        while True:
            answer = self._lines.readline()
            if not json.loads(answer).keys().isdisjoint({"return", "error"}):
                return answer

    def ask(self, command: str, **arguments: object) -> Any:
        answer = json.loads(self.command(json.dumps({"execute": command, "arguments": arguments})))
        return answer["return"]

    def write(self, at: int, length: int) -> None:
        line = f'qemu-io -d {DISK}/virtio-backend "write -P 7 {at} {length}"'
        self.ask("human-monitor-command", **{"command-line": line})

    def begin_backup(self) -> Path:
        """Serve the disk as it is now, as libvirt's job does."""
        where = self.directory / "nbd.sock"
        self.ask("nbd-server-start", addr={"type": "unix", "data": {"path": str(where)}})
        scratch = {"driver": "file", "filename": str(self.directory / "scratch.raw")}
        made = subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", scratch["filename"], str(16 * MIB)], check=False)
        assert made.returncode == 0
        self.ask("blockdev-add", **{"driver": "qcow2", "node-name": "scratch", "file": scratch, "backing": "top"})
        self.ask("blockdev-backup", **{"job-id": "backup", "device": "top", "target": "scratch", "sync": "none"})
        self.ask("block-export-add", **{"type": "nbd", "id": "vda", "node-name": "scratch", "name": "vda"})
        return where


@pytest.fixture
def qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Qemu]:
    started = Qemu(tmp_path)
    way = SimpleNamespace(
        qemuMonitorCommand=lambda domain, text, _flags: domain.command(text), VIR_DOMAIN_QEMU_MONITOR_COMMAND_DEFAULT=0
    )
    monkeypatch.setattr(monitor, "libvirt_qemu", way)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.wait(10)


def test_what_changed_since_a_checkpoint_is_told_beside_a_job_and_never_too_little(qemu: Qemu) -> None:
    memory_bitmaps.add(qemu, memory_bitmaps.followed(qemu)[DISK], "tt-bk-1")
    qemu.write(MIB, 4096)
    before = memory_bitmaps.followed(qemu)[DISK]
    assert before.bitmaps == {"tt-bk-1"}
    memory_bitmaps.add(qemu, before, "tt-bk-2")
    where = qemu.begin_backup()
    qemu.write(8 * MIB, 4096)
    assert memory_bitmaps.followed(qemu)[DISK].node != before.node, "the job's own filter: hence the node from before is used"
    context = memory_bitmaps.serve(qemu, before, "tt-bk-1", "tt-vda")
    with (
        NbdClient.connect(where, "vda", contexts=[ALLOCATION]) as content,
        NbdClient.connect(where, "tt-vda", contexts=[context]) as changes,
    ):
        dirty = [(one.offset, one.length) for one in changes.extents(context) if one.flags & DIRTY]
        assert dirty == [(MIB, 65536), (8 * MIB, 65536)], (
            "what was written after the instant is told too, which costs reading only"
        )
        assert (content.read(MIB, 2), content.read(8 * MIB, 2)) == (b"\7\7", b"\0\0"), "the content is that of the instant"
    memory_bitmaps.end(qemu, before, "tt-vda")


def test_only_the_listed_checkpoint_is_kept_and_a_failed_one_leaves_the_one_before(qemu: Qemu) -> None:
    for name in ("tt-bk-1", "tt-bk-2", "tt-bk-2"):
        memory_bitmaps.add(qemu, memory_bitmaps.followed(qemu)[DISK], name)
    memory_bitmaps.drop(qemu, ["another"], "tt-bk-2")
    memory_bitmaps.keep_only(qemu, [DISK], "tt-bk-2")
    assert memory_bitmaps.followed(qemu)[DISK].bitmaps == {"tt-bk-2"}
    memory_bitmaps.add(qemu, memory_bitmaps.followed(qemu)[DISK], "tt-bk-3")
    memory_bitmaps.drop(qemu, [DISK], "tt-bk-3")
    assert memory_bitmaps.followed(qemu)[DISK].bitmaps == {"tt-bk-2"}


def test_qemu_ends_its_server_though_a_reader_stands_still_once_that_was_cut(qemu: Qemu) -> None:
    """It waits for such a reader with its guest's processors held, and a mere shutdown of the connection has it wait on."""
    qemu.write(0, 12 * MIB)
    with NbdClient.connect(qemu.begin_backup(), "vda", contexts=[ALLOCATION]) as reader:
        pieces = reader.read_pieces(((at * MIB, MIB) for at in range(12)), MIB)
        assert next(pieces)[0] == 0
        reader.cut()
        assert qemu.ask("nbd-server-stop") == {}
        with pytest.raises(Unavailable, match="broke off"):
            list(pieces)
