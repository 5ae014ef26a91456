"""Builds the lab's guest: Debian's cloud kernel, a busybox initramfs, and a small disk image that boots by itself.

The disk boots under BIOS (syslinux) and under UEFI, Secure Boot too (Debian's signed shim, GRUB and kernel), and carries a second
partition where the guest keeps its counter:

    MBR │ 1: FAT, 24 MiB: kernel, initramfs, boot loaders │ 2: ext4 `trimtab-data`, 10 MiB

Everything is made from Debian packages without loop devices, mounts or root, and cached under a name that depends on what went
in. The guest itself is `guestfiles/init`.
"""

import fcntl
import gzip
import hashlib
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trimtab_lab.commands import run
from trimtab_lab.errors import LabError

DEFAULT_CACHE = Path("/var/cache/trimtab-lab")
GUEST_FILES = Path(__file__).parent / "guestfiles"
KERNEL_META_PACKAGE = "linux-image-cloud-amd64"
UEFI_PACKAGES = ("shim-signed", "grub-efi-amd64-signed")
GUEST_AGENT = Path("/usr/sbin/qemu-ga")
BUSYBOX = Path("/bin/busybox")

MODULES = (
    *("virtio_pci", "virtio_blk", "virtio_net", "virtio_balloon", "virtio_console", "virtio_mem", "virtio_rng"),
    *("virtio_scsi", "sd_mod", "sr_mod", "isofs", "button", "evdev", "efivarfs"),
)
KERNEL_OPTIONS = (
    "console=tty0 console=ttyS0,115200 quiet loglevel=3 panic=1 memhp_default_state=online no_timer_check"
    # What costs an emulated CPU time at boot and protects nothing here: a sixth of it, measured.
    " nokaslr mitigations=off cryptomgr.notests rcupdate.rcu_expedited=1 audit=0"
)

MIB = 1024 * 1024
SECTOR_BYTES = 512
BOOT_START_BYTES = 1 * MIB
BOOT_SIZE_BYTES = 24 * MIB
DATA_SIZE_BYTES = 10 * MIB
IMAGE_SIZE_BYTES = BOOT_START_BYTES + BOOT_SIZE_BYTES + DATA_SIZE_BYTES + 1 * MIB


@dataclass(frozen=True, slots=True)
class GuestImage:
    """Where the built files are; read-only for everybody."""

    kernel: Path
    initramfs: Path
    raw: Path
    qcow2: Path


def cache_directory() -> Path:
    return Path(os.environ.get("TRIMTAB_CACHE", DEFAULT_CACHE))


def build_guest_image(cache: Path | None = None) -> GuestImage:
    """The guest's files, built when the cache does not hold them; several processes may ask at once."""
    cache = cache or cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        packages = [package(cache, name) for name in (_kernelpackage(cache), *UEFI_PACKAGES)]
        directory = cache / f"guest-{_fingerprint(packages)}"
        image = GuestImage(
            kernel=directory / "vmlinuz",
            initramfs=directory / "initramfs.gz",
            raw=directory / "micro.raw",
            qcow2=directory / "micro.qcow2",
        )
        if not directory.exists():
            with tempfile.TemporaryDirectory(dir=cache, prefix="building-") as scratch:
                finished = _build(Path(scratch), packages)
                finished.rename(directory)
    return image


def _fingerprint(packages: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in (Path(__file__), *sorted(GUEST_FILES.iterdir()), BUSYBOX, GUEST_AGENT):
        if not file.exists():
            raise LabError(f"{file} is missing; ops/bootstrap.sh installs what the guest is made of")
        digest.update(file.read_bytes())
    for package in packages:
        digest.update(package.name.encode())
    return digest.hexdigest()[:12]


def _kernelpackage(cache: Path) -> str:
    """The concrete package behind Debian's meta package; one in the cache is good enough and needs no network."""
    cached = sorted(cache.glob("linux-image-*-cloud-amd64_*.deb"))
    if cached:
        return cached[-1].name.partition("_")[0]
    for line in run(["apt-cache", "depends", "--important", KERNEL_META_PACKAGE]).stdout.splitlines():
        if "Depends: linux-image-" in line:
            return line.split()[-1]
    raise LabError(f"apt knows no {KERNEL_META_PACKAGE}; run `apt-get update`")


def package(cache: Path, name: str) -> Path:
    """Return a Debian package's file, downloaded where the cache has none; it is unpacked, never installed."""
    cached = sorted(cache.glob(f"{name}_*.deb"))
    if cached:
        return cached[-1]
    with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as scratch:
        # apt's own user may not write here; the download is verified against the signed index either way.
        sandbox = ["-o", "APT::Sandbox::User=root"]
        run(["sh", "-c", 'cd "$1" && shift && exec apt-get "$@"', "sh", scratch, *sandbox, "download", name], timeout_s=300)
        (downloaded,) = Path(scratch).glob("*.deb")
        return downloaded.rename(cache / downloaded.name)


def _build(scratch: Path, packages: Iterable[Path]) -> Path:
    unpacked, finished = scratch / "unpacked", scratch / "finished"
    finished.mkdir()
    for package in packages:
        run(["dpkg-deb", "-x", str(package), str(unpacked)], timeout_s=120)
    (kernel,) = (unpacked / "boot").glob("vmlinuz-*")
    shutil.copy(kernel, finished / "vmlinuz")
    build_initramfs(unpacked, finished / "initramfs.gz", scratch=scratch)
    bootloaders = (unpacked / "usr/lib/shim/shimx64.efi.signed", unpacked / "usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed")
    _build_disk(finished, scratch=scratch, uefi_bootloaders=bootloaders)
    return finished


# -- initramfs -------------------------------------------------------------------------------------------------------


def build_initramfs(kernel_root: Path, output: Path, *, scratch: Path) -> None:
    """Packs busybox, the guest agent with its libraries, the virtio modules and `guestfiles` into one archive."""
    root = scratch / "initramfs"
    for directory in ("bin", "sbin", "m", "proc", "sys", "dev", "etc", "root", "var"):
        (root / directory).mkdir(parents=True)
    shutil.copy(BUSYBOX, root / "bin/busybox")
    for source, target in (("init", "init"), ("network.awk", "etc/network.awk"), ("udhcpc.script", "etc/udhcpc.script")):
        shutil.copy(GUEST_FILES / source, root / target)
        (root / target).chmod(0o755)
    (root / "etc/passwd").write_text("root::0:0:root:/root:/bin/sh\n")
    shutil.copy(GUEST_AGENT, root / "bin/qemu-ga")
    for library in _libraries(GUEST_AGENT):
        place = root / str(library).lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, place)
    for position, module in enumerate(_module_closure(kernel_root)):
        # The number keeps the order of dependencies when the guest loads them with a glob.
        shutil.copy(module, root / "m" / f"{position:03}-{module.name}")
    names = "".join(f"{path.relative_to(root)}\n" for path in sorted(root.rglob("*")))
    archive = scratch / "initramfs.cpio"
    pack = 'cd "$1" && exec cpio --quiet --create --format=newc --owner=0:0 --file="$2"'
    run(["sh", "-c", pack, "sh", str(root), str(archive)], standard_input=names)
    output.write_bytes(gzip.compress(archive.read_bytes(), compresslevel=6, mtime=0))


def _libraries(program: Path) -> list[Path]:
    listed = run(["ldd", str(program)]).stdout.split()
    return sorted({Path(word) for word in listed if word.startswith("/")})


def _module_closure(kernel_root: Path) -> list[Path]:
    (release,) = (each.name for each in (kernel_root / "lib/modules").iterdir())
    run(["depmod", "-b", str(kernel_root), release])
    found: dict[Path, None] = {}
    for module in MODULES:
        shown = run(["modprobe", "-S", release, "-d", str(kernel_root), "--show-depends", module]).stdout
        for line in shown.splitlines():
            verb, _, path = line.strip().partition(" ")
            if verb == "insmod":
                found[Path(path.split()[0]).resolve()] = None
    return list(found)


# -- disk ------------------------------------------------------------------------------------------------------------


def _build_disk(finished: Path, *, scratch: Path, uefi_bootloaders: tuple[Path, Path]) -> None:
    boot, data = scratch / "boot.img", scratch / "data.img"
    for path, size in ((boot, BOOT_SIZE_BYTES), (data, DATA_SIZE_BYTES)):
        with path.open("wb") as file:
            file.truncate(size)
    _fill_boot_partition(boot, finished, scratch=scratch, uefi_bootloaders=uefi_bootloaders)
    run(["mke2fs", "-q", "-t", "ext4", "-L", "trimtab-data", "-E", "lazy_itable_init=0,nodiscard", str(data)])
    with finished.joinpath("micro.raw").open("wb") as disk:
        disk.write(_master_boot_record())
        for source, start in ((boot, BOOT_START_BYTES), (data, BOOT_START_BYTES + BOOT_SIZE_BYTES)):
            disk.seek(start)
            disk.write(source.read_bytes())
        disk.truncate(IMAGE_SIZE_BYTES)
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c"]
    run([*convert, str(finished / "micro.raw"), str(finished / "micro.qcow2")], timeout_s=120)


def _fill_boot_partition(boot: Path, finished: Path, *, scratch: Path, uefi_bootloaders: tuple[Path, Path]) -> None:
    shim, grub = uefi_bootloaders
    syslinux_configuration = scratch / "syslinux.cfg"
    syslinux_configuration.write_text(
        "SERIAL 0 115200\nDEFAULT micro\nPROMPT 0\nTIMEOUT 1\n"
        f"LABEL micro\n LINUX /vmlinuz\n INITRD /initrd.gz\n APPEND {KERNEL_OPTIONS}\n"
    )
    grub_configuration = scratch / "grub.cfg"
    grub_configuration.write_text(
        f"set timeout=0\nmenuentry micro {{\n linux /vmlinuz {KERNEL_OPTIONS}\n initrd /initrd.gz\n}}\n"
    )
    # Hidden sectors (-H) tell the boot sector where on the disk its partition starts.
    run(["mformat", "-i", str(boot), "-v", "TRIMTAB", "-H", str(BOOT_START_BYTES // SECTOR_BYTES), *_geometry(), "::"])
    run(["mmd", "-i", str(boot), "::/EFI", "::/EFI/BOOT", "::/EFI/debian"])
    for source, target in (
        (finished / "vmlinuz", "/vmlinuz"),
        (finished / "initramfs.gz", "/initrd.gz"),
        (syslinux_configuration, "/syslinux.cfg"),
        (shim, "/EFI/BOOT/BOOTX64.EFI"),
        (grub, "/EFI/BOOT/grubx64.efi"),
        (grub_configuration, "/EFI/debian/grub.cfg"),
    ):
        run(["mcopy", "-i", str(boot), str(source), f"::{target}"])
    run(["syslinux", "--install", str(boot)])


def _geometry() -> list[str]:
    """FAT needs heads and sectors even on a disk that has none; total sectors decide the size."""
    return ["-h", "16", "-s", "63", "-T", str(BOOT_SIZE_BYTES // SECTOR_BYTES)]


def _master_boot_record() -> bytes:
    code = Path("/usr/lib/SYSLINUX/mbr.bin").read_bytes()
    if len(code) > 440:
        raise LabError("mbr.bin leaves no room for the partition table")
    entries = b""
    start_sector = BOOT_START_BYTES // SECTOR_BYTES
    for flag, kind, size in ((0x80, 0x0E, BOOT_SIZE_BYTES), (0x00, 0x83, DATA_SIZE_BYTES)):
        sectors = size // SECTOR_BYTES
        # Cylinder numbers that say "look at the sector numbers": FE FF FF.
        entries += struct.pack("<B3sB3sII", flag, b"\xfe\xff\xff", kind, b"\xfe\xff\xff", start_sector, sectors)
        start_sector += sectors
    return code.ljust(440, b"\0") + b"TRIM\0\0" + entries.ljust(64, b"\0") + b"\x55\xaa"
