"""libvirt's and QEMU's certificates at the places where these look for them, replaced at once when renewed.

Below /etc/pki/libvirt and /etc/pki/qemu lies one directory per certificate (`.trimtab-<serial>`), and `trimtab` points to the one in
force; the names that libvirt and QEMU know are links through it. So one rename exchanges key and certificate together, a connection
that opens meanwhile sees one pair or the other, and AppArmor's rules for QEMU, which allow /etc/pki/qemu/**, go on holding.
Connections and migrations that are open keep what they loaded.
"""

import grp
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import structlog

from trimtab_agent.certificates import PURPOSE_LIBVIRT, report, write_file
from trimtab_protos.messages import Certificate

log = structlog.get_logger(__name__)

CURRENT = "trimtab"
RELOAD_TIMEOUT_S = 15.0
DEFAULT_QEMU_GROUP = "libvirt-qemu"

CA_LINKS = {
    "etc/pki/CA/cacert.pem": "../libvirt/trimtab/ca.pem",
    "etc/pki/libvirt/servercert.pem": "trimtab/cert.pem",
    "etc/pki/libvirt/clientcert.pem": "trimtab/cert.pem",
    "etc/pki/libvirt/private/serverkey.pem": "../trimtab/key.pem",
    "etc/pki/libvirt/private/clientkey.pem": "../trimtab/key.pem",
    "etc/pki/qemu/ca-cert.pem": "trimtab/ca.pem",
    "etc/pki/qemu/server-cert.pem": "trimtab/cert.pem",
    "etc/pki/qemu/server-key.pem": "trimtab/key.pem",
    "etc/pki/qemu/client-cert.pem": "trimtab/cert.pem",
    "etc/pki/qemu/client-key.pem": "trimtab/key.pem",
}
"""Path on the host (without the leading slash) → where it points."""
TREES = ("etc/pki/libvirt", "etc/pki/qemu")


class LibvirtCertificates:
    """The files of one host, below `root`."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def links(self) -> dict[Path, str]:
        """Return every link that the join makes, with its target."""
        return {self._root / path: target for path, target in CA_LINKS.items()}

    def install(self, *, ca_pem: bytes, certificate_pem: bytes, key_pem: bytes) -> None:
        """Put a pair into force. Idempotent; a cut leaves the old pair or the new one."""
        serial = report(PURPOSE_LIBVIRT, certificate_pem).serial
        for tree in TREES:
            base = self._root / tree
            base.mkdir(mode=0o755, parents=True, exist_ok=True)
            directory = base / f".trimtab-{serial}"
            directory.mkdir(mode=0o755, exist_ok=True)
            write_file(directory / "ca.pem", ca_pem, mode=0o644)
            write_file(directory / "cert.pem", certificate_pem, mode=0o644)
            self._write_key(directory / "key.pem", key_pem, for_qemu=tree.endswith("qemu"))
            point(base / CURRENT, directory.name)
            for old in base.glob(".trimtab-*"):
                if old.name != directory.name and old.is_dir():
                    shutil.rmtree(old)

    def remove(self) -> None:
        """Remove the pairs; the links are the undo log's."""
        for tree in TREES:
            base = self._root / tree
            (base / CURRENT).unlink(missing_ok=True)
            for directory in base.glob(".trimtab-*"):
                if directory.is_dir():
                    shutil.rmtree(directory)

    def certificate_pem(self) -> bytes | None:
        path = self._root / TREES[0] / CURRENT / "cert.pem"
        return path.read_bytes() if path.exists() else None

    def report(self) -> Sequence[Certificate]:
        """Return the certificate in force, for the inventory; empty where there is none."""
        pem = self.certificate_pem()
        return (report(PURPOSE_LIBVIRT, pem),) if pem else ()

    def _write_key(self, path: Path, key_pem: bytes, *, for_qemu: bool) -> None:
        group = self._qemu_group() if for_qemu else None
        write_file(path, key_pem, mode=0o640 if group is not None else 0o600)
        if group is not None and os.geteuid() == 0:
            os.chown(path, 0, group)

    def _qemu_group(self) -> int | None:
        """Return the group that QEMU runs as: it must read its key, and nobody else."""
        name = DEFAULT_QEMU_GROUP
        configuration = self._root / "etc/libvirt/qemu.conf"
        if configuration.exists():
            found = re.search(r'^\s*group\s*=\s*"([^"]+)"', configuration.read_text(), re.MULTILINE)
            name = found[1].lstrip("+") if found else name
        try:
            return int(name) if name.isdigit() else grp.getgrnam(name).gr_gid
        except KeyError:
            return None


def point(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target`, replacing what is there at once."""
    if link.is_symlink() and os.readlink(link) == target:
        return
    temporary = link.with_name(f".{link.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


def reload_libvirtd() -> bool:
    """Let the running libvirtd load its certificate again; guests, connections and migrations go on. False where it cannot.

    Where it cannot, the old certificate stays in force until libvirtd starts anew, at worst until it expires.
    """
    command = ["virt-admin", "-c", "libvirtd:///system", "server-update-tls", "libvirtd"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=RELOAD_TIMEOUT_S, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        log.warning("libvirtd not told of its new certificate", error=str(error))
        return False
    if done.returncode != 0:
        log.warning("libvirtd not told of its new certificate", error=done.stderr.strip()[:300])
    return done.returncode == 0
