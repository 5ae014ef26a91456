"""Operating systems that Debian's packages carry, as ISO images that boot; unpacked, never installed."""

import tempfile
from pathlib import Path

from trimtab_lab.commands import run
from trimtab_lab.guest import cache_directory, package

RESCUE_PACKAGE = "grub-rescue-pc"
INSTALLER_PACKAGE = "debian-installer-12-netboot-amd64"


def rescue_iso() -> Path:
    """Return the CD image of GRUB's rescue shell, 5 MB; it boots by BIOS to a prompt."""
    return _from_package(RESCUE_PACKAGE, "usr/lib/grub-rescue/grub-rescue-cdrom.iso", "grub-rescue.iso")


def _from_package(name: str, inside: str, keep_as: str) -> Path:
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    kept = cache / keep_as
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=cache, prefix="unpacking-") as scratch:
            run(["dpkg-deb", "-x", str(package(cache, name)), scratch], timeout_s=120)
            (Path(scratch) / inside).rename(kept)
    return kept
