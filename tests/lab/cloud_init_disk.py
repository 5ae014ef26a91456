"""A disk with Debian's cloud-init on it, and what starts it: this machine's root with the package over it, in namespaces.

What cloud-init writes goes to the upper layer of an overlay in memory; its hostname, network, processes and devices are those of
namespaces of its own, which end with the start. Of this machine's devices it sees the one with the seed. So nothing here changes, and
the same disk can be started again, with another seed, as the disk of a clone is. Where the kernel reads no ISO 9660, fuseiso does.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trimtab_lab.guest import cache_directory, package

PACKAGES = ("cloud-init", "ifupdown", "net-tools", "netplan.io", "udev", "fuseiso")
BOOT = Path(__file__).with_name("cloud_init_boot.sh")
STAGE_S = 240.0
RENDERERS = {"eni": (), "netplan": ("ifup",), "networkd": ("ifup", "netplan")}
"""What a disk lacks so that cloud-init writes the network's configuration in this form."""


def _run(*command: str | Path, timeout_s: float = 60.0) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
    if done.returncode:
        raise AssertionError(f"{command[0]} ended with {done.returncode}: {done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def packages() -> list[Path]:
    """Return the files of the packages, and of what they need that this machine has not; none is installed."""
    plan = _run("apt-get", "--simulate", "--no-install-recommends", "install", *PACKAGES)
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    needed = set(re.findall(r"^Inst (\S+) \(", plan, re.MULTILINE))
    return [package(cache, name) for name in sorted(needed | set(PACKAGES))]


@dataclass(frozen=True, slots=True)
class Disk:
    """The upper layer of an overlay over `base` and this machine's root."""

    folder: Path
    base: Path | None

    @property
    def upper(self) -> Path:
        return self.folder / "upper"

    @property
    def lower(self) -> str:
        return f"{self.base}:/" if self.base is not None else "/"

    def made(self) -> "Disk":
        for name in ("upper", "work", "root"):
            (self.folder / name).mkdir(parents=True)
        return self

    def read(self, path: str) -> str:
        """Return what was written to a file of the guest; '' where nothing was."""
        found = self.upper / path.lstrip("/")
        return found.read_text() if found.is_file() else ""

    def start(self, seed: bytes, macs: Sequence[str]) -> None:
        """Start it once with the seed in its drive, through all stages of cloud-init, to its end."""
        image = self.folder / "seed.iso"
        image.write_bytes(seed)
        shutil.rmtree(self.upper / "seen", ignore_errors=True)
        with _attached(image) as device:
            try:
                self.run("start", device, *macs)
            except AssertionError as error:
                raise AssertionError(self.read("/seen/log")[-3000:]) from error

    def run(self, *what: str | Path) -> None:
        """Run the script in namespaces of its own, with the disk as its root."""
        apart = ("--mount", "--uts", "--net", "--ipc", "--pid", "--fork", "--kill-child")
        _run("unshare", *apart, "sh", BOOT, self.folder, self.lower, *what, timeout_s=STAGE_S)


@contextmanager
def _attached(image: Path) -> Iterator[str]:
    device = _run("losetup", "--find", "--show", "--read-only", image).strip()
    try:
        yield device
    finally:
        _run("losetup", "--detach", device)


def base_disk(folder: Path) -> Path:
    """Return the layer with the packages' files, as a lower one of other disks."""
    disk = Disk(folder / "base", None).made()
    disk.run("unpack", *packages())
    return disk.upper


def new_disk(folder: Path, base: Path, renderer: str) -> Disk:
    """Return a disk on which cloud-init never ran."""
    disk = Disk(folder, base).made()
    disk.run("lack", *RENDERERS[renderer])
    return disk
