"""What `qemu-img` may see and use when it works on a file from outside: little, and it ends inside its bounds. Needs root, as an agent."""

import os
from pathlib import Path

import pytest

from trimtab_agent.hypervisor.kvm import qemu_img
from trimtab_protos.errors import DeadlineExceeded, Internal, InvalidRequest

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory that belongs to nobody, below one that nobody may enter."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    own = closed / "own"
    own.mkdir()
    os.chown(own, qemu_img.NOBODY, qemu_img.NOBODY)
    return own


def run(folder: Path, *arguments: str, limits: qemu_img.Limits | None = None) -> str:
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return qemu_img.run(arguments, directory=directory, limits=limits or qemu_img.Limits(), as_nobody=True)
    finally:
        os.close(directory)


def put(folder: Path, name: str, content: bytes) -> Path:
    file = folder / name
    file.write_bytes(content)
    os.chown(file, qemu_img.NOBODY, qemu_img.NOBODY)
    return file


def test_it_works_in_its_directory_as_nobody(folder: Path) -> None:
    put(folder, "source", os.urandom(MIB))
    run(folder, "convert", "-f", "raw", "-O", "qcow2", "source", "made")
    assert '"virtual-size": 1048576' in run(folder, "info", "-f", "qcow2", "--output=json", "made")
    assert (folder / "made").stat().st_uid == qemu_img.NOBODY


@pytest.mark.parametrize("place", ["/etc", "/var/tmp", "/tmp"])
def test_a_file_of_the_host_that_everybody_may_read_is_not_there_for_it(folder: Path, place: str) -> None:
    canary = Path(place) / f"trimtab-canary-{os.getpid()}"
    canary.write_bytes(b"canary" * 1000)
    canary.chmod(0o644)
    try:
        with pytest.raises(Internal, match="No such file"):
            run(folder, "convert", "-f", "raw", "-O", "raw", str(canary), "stolen")
    finally:
        canary.unlink()
    assert not (folder / "stolen").exists()


def test_it_has_no_network(folder: Path) -> None:
    with pytest.raises(Internal, match="Network is unreachable"):
        run(folder, "info", "--output=json", "nbd://127.0.0.1:10809/x")


def test_the_mounts_that_hide_the_host_are_its_own(folder: Path) -> None:
    before = Path("/proc/self/mounts").read_text()
    put(folder, "source", b"x" * 4096)
    run(folder, "info", "-f", "raw", "source")
    assert Path("/proc/self/mounts").read_text() == before


def test_a_file_that_grows_beyond_its_bound_ends_the_run(folder: Path) -> None:
    put(folder, "source", os.urandom(4 * MIB))
    with pytest.raises(InvalidRequest) as refused:
        run(folder, "convert", "-f", "raw", "-O", "raw", "source", "made", limits=qemu_img.Limits(file_bytes=MIB))
    assert refused.value.code == "image-too-costly"
    assert not (folder / "made").exists() or (folder / "made").stat().st_size <= MIB


def test_too_much_processor_time_ends_the_run(folder: Path) -> None:
    source = put(folder, "source", b"")
    os.truncate(source, 64 << 30)  # sparse: costs no room, and to compress its clusters takes minutes
    with pytest.raises(InvalidRequest) as refused:
        run(folder, "convert", "-S", "0", "-c", "-f", "raw", "-O", "qcow2", "source", "made", limits=qemu_img.Limits(cpu_s=1))
    assert refused.value.code == "image-too-costly"


def test_too_much_memory_ends_the_run(folder: Path) -> None:
    put(folder, "source", b"x" * 4096)
    with pytest.raises(InvalidRequest) as refused:
        run(folder, "dd", "-f", "raw", "-O", "raw", "bs=2000M", "if=source", "of=made")
    assert refused.value.code == "image-too-costly"


def test_too_much_time_ends_the_run(folder: Path) -> None:
    source = put(folder, "source", b"")
    os.truncate(source, 64 << 30)
    with pytest.raises(DeadlineExceeded) as late:
        run(
            folder,
            "convert",
            "-S",
            "0",
            "-c",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "source",
            "made",
            limits=qemu_img.Limits(timeout_s=1.0),
        )
    assert late.value.code == "image-tool-timeout"
