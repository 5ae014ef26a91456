"""The keys of encrypted volumes and the secrets of pools, for as long as they are needed: in this process's memory, in libvirt's, in a
descriptor of `qemu-img`.

Nothing here writes a key to a disk. libvirt's secrets are ephemeral (it keeps them in memory, and loses them with its process) and
private (nobody reads one back, root by `virsh` neither). They are there only while a QEMU that needs one is started or given a disk:
from then on the key is QEMU's, which was handed it encrypted under a key of that process. Hence a key that is missing, since the agent
or libvirtd began anew, is no fault: the controller gives it again and repeats the command.
"""

import base64
import contextlib
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

import libvirt

from trimtab_agent.hypervisor.kvm import block_pools, errors
from trimtab_agent.hypervisor.kvm.identifiers import check_id
from trimtab_agent.hypervisor.kvm.xml_tree import parse
from trimtab_protos.errors import InvalidRequest, Unavailable
from trimtab_protos.messages import PoolSpec, VolumeSpec

KEPT_FOR_S = 3600.0
_KEY = re.compile(r"[0-9a-f]{64}")
_NAMESPACE = uuid.UUID("5a3c1f0e-6f0b-4a53-9d6e-1c0a0f5b7d11")
_USAGES = {"passphrase": "volume", "iscsi": "iscsi", "ceph": "ceph"}
"""What a secret is for, by what a definition says of it."""
_USAGE_NAMES = {"volume": "volume", "iscsi": "target", "ceph": "name"}
_MAX_POOL_SECRET = 255


def secret_uuid(owner_id: str) -> str:
    """Return under which UUID libvirt knows the key of a volume or the secret of a pool: the same on each host, so that a definition
    may go along."""
    return str(uuid.uuid5(_NAMESPACE, owner_id))


@dataclass(frozen=True, slots=True)
class Need:
    """A secret that a definition refers to."""

    uuid: str
    usage: str
    """volume, iscsi, ceph: what libvirt is told that it is for."""


class VolumeKeys:
    """Keys and secrets by the id of their volume or pool. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        # By the UUID of the secret: definitions know no more.
        self._kept: dict[str, tuple[bytes, float]] = {}

    def give(self, keys: Mapping[str, str]) -> None:
        """Keep these for an hour. InvalidRequest where one is none; the message never holds it."""
        for owner_id, key in keys.items():
            check_id(owner_id, "volume_id")
            is_fine = 0 < len(key) <= _MAX_POOL_SECRET if owner_id.startswith("pool-") else _KEY.fullmatch(key) is not None
            if not is_fine:
                raise InvalidRequest("volume-key", "key: 64 hexadecimal digits; secret: 1 to 255 characters", field="keys.key")
        until = self._clock() + KEPT_FOR_S
        with self._lock:
            self._drop_old()
            self._kept.update({secret_uuid(owner_id): (key.encode(), until) for owner_id, key in keys.items()})

    def of(self, owner_id: str) -> bytes:
        """Return the key. Unavailable (`volume-key-missing`): it was not given, or too long ago."""
        return self._by_uuid(secret_uuid(owner_id), owner_id)

    def of_secret(self, secret: str) -> bytes:
        """Return what a definition names by this UUID. Unavailable as `of`."""
        return self._by_uuid(secret, f"secret {secret}")

    def of_volume(self, volume: VolumeSpec) -> bytes | None:
        """Return the key of the volume, None for one that is not encrypted."""
        return self.of(volume.volume_id) if volume.is_encrypted else None

    def of_pool(self, pool: PoolSpec) -> bytes | None:
        """Return the secret of the pool, None for one that needs none."""
        return self.of(pool.pool_id) if block_pools.needs_secret(pool) else None

    def of_pool_if_here(self, pool: PoolSpec) -> bytes | None:
        """Return the secret of the pool, None where it needs none or is not here."""
        try:
            return self.of_pool(pool)
        except Unavailable:
            return None

    def require(self, owner_ids: Iterable[str]) -> None:
        """Raise as `of` where one of them is missing."""
        for owner_id in owner_ids:
            self.of(owner_id)

    def forget(self, owner_ids: Iterable[str]) -> None:
        with self._lock:
            for owner_id in owner_ids:
                self._kept.pop(secret_uuid(owner_id), None)

    def _by_uuid(self, secret: str, what: str) -> bytes:
        with self._lock:
            self._drop_old()
            kept = self._kept.get(secret)
        if kept is None:
            raise Unavailable("volume-key-missing", f"the key of {what} is not on this host; it is given again")
        return kept[0]

    def _drop_old(self) -> None:
        now = self._clock()
        for secret in [secret for secret, (_key, until) in self._kept.items() if until <= now]:
            del self._kept[secret]

    @contextlib.contextmanager
    def in_libvirt(self, connection: Any, needs: Iterable[Need]) -> Iterator[None]:
        """Have libvirt know the keys during the block, in which a QEMU takes them over."""
        wanted = tuple(needs)
        self.put_into_libvirt(connection, wanted)
        try:
            yield
        finally:
            take_from_libvirt(connection, wanted)

    def put_into_libvirt(self, connection: Any, needs: Iterable[Need]) -> None:
        """Have libvirt know the keys until they are taken from it. Unavailable as `of`, and then it knows none more than before."""
        keys = {need: self._by_uuid(need.uuid, f"secret {need.uuid}") for need in needs}
        for need, key in keys.items():
            # libvirt hands a key of Ceph's on in base64, which is how it came.
            connection.secretDefineXML(secret_xml(need)).setValue(base64.b64decode(key) if need.usage == "ceph" else key)


def take_from_libvirt(connection: Any, needs: Iterable[Need]) -> None:
    """Have libvirt forget the keys; a QEMU that has one keeps it."""
    for need in needs:
        try:
            connection.secretLookupByUUIDString(need.uuid).undefine()
        except libvirt.libvirtError as error:
            if not errors.is_gone(error) and error.get_error_code() != libvirt.VIR_ERR_NO_SECRET:
                raise


def secret_xml(need: Need) -> str:
    secret = Element("secret", ephemeral="yes", private="yes")
    SubElement(secret, "uuid").text = need.uuid
    usage = SubElement(secret, "usage", type=need.usage)
    SubElement(usage, _USAGE_NAMES[need.usage]).text = f"trimtab-{need.uuid}"
    return ElementTree.tostring(secret, encoding="unicode")


def encrypt(source: Element, volume_id: str) -> None:
    """Say in a disk's source that it is opened with the volume's key."""
    encryption = SubElement(source, "encryption", format="luks")
    SubElement(encryption, "secret", type="passphrase", uuid=secret_uuid(volume_id))


def needed_in(xml: str) -> tuple[Need, ...]:
    """Return the secrets of ours that the definition's disks need."""
    disks = parse(xml).findall("devices/disk")
    return tuple(dict.fromkeys(need for disk in disks for need in needed_by(disk)))


def needed_by(disk: Element) -> tuple[Need, ...]:
    """Return the secrets that a disk of ours needs; nothing of another's, which an adopted domain may have."""
    alias = disk.find("alias")
    if alias is None or not alias.get("name", "").startswith("ua-vol-"):
        return ()
    secrets = [*disk.findall("source/encryption/secret"), *disk.findall("source/auth/secret"), *disk.findall("auth/secret")]
    found = ((secret.get("uuid", ""), _USAGES.get(secret.get("type", ""), "")) for secret in secrets)
    return tuple(Need(secret, usage) for secret, usage in found if secret and usage)
