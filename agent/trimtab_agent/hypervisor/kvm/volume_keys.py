"""The keys of encrypted volumes, for as long as they are needed: in this process's memory, in libvirt's, in a descriptor of `qemu-img`.

Nothing here writes a key to a disk. libvirt's secrets are ephemeral (it keeps them in memory, and loses them with its process) and
private (nobody reads one back, root by `virsh` neither). They are there only while a QEMU that needs one is started or given a disk:
from then on the key is QEMU's, which was handed it encrypted under a key of that process. Hence a key that is missing, since the agent
or libvirtd began anew, is no fault: the controller gives it again and repeats the command.
"""

import contextlib
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

import libvirt

from trimtab_agent.hypervisor.kvm import errors
from trimtab_agent.hypervisor.kvm.identifiers import check_id
from trimtab_agent.hypervisor.kvm.xml_tree import parse
from trimtab_protos.errors import InvalidRequest, Unavailable

KEPT_FOR_S = 3600.0
_KEY = re.compile(r"[0-9a-f]{64}")
_NAMESPACE = uuid.UUID("5a3c1f0e-6f0b-4a53-9d6e-1c0a0f5b7d11")
_USAGE = "trimtab-"


def secret_uuid(volume_id: str) -> str:
    """Return under which UUID libvirt knows the volume's key: the same on each host, so that a definition may go along."""
    return str(uuid.uuid5(_NAMESPACE, volume_id))


class VolumeKeys:
    """Keys by volume. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[bytes, float]] = {}

    def give(self, keys: Mapping[str, str]) -> None:
        """Keep these keys for an hour. InvalidRequest where one is none; the message never holds it."""
        for volume_id, key in keys.items():
            check_id(volume_id, "volume_id")
            if _KEY.fullmatch(key) is None:
                raise InvalidRequest("volume-key", "key: 64 hexadecimal digits", field="keys.key")
        until = self._clock() + KEPT_FOR_S
        with self._lock:
            self._drop_old()
            self._kept.update({volume_id: (key.encode(), until) for volume_id, key in keys.items()})

    def of(self, volume_id: str) -> bytes:
        """Return the key. Unavailable (`volume-key-missing`): it was not given, or too long ago."""
        with self._lock:
            self._drop_old()
            kept = self._kept.get(volume_id)
        if kept is None:
            raise Unavailable("volume-key-missing", f"the key of volume {volume_id} is not on this host; it is given again")
        return kept[0]

    def require(self, volume_ids: Iterable[str]) -> None:
        """Raise as `of` where one of them is missing."""
        for volume_id in volume_ids:
            self.of(volume_id)

    def forget(self, volume_ids: Iterable[str]) -> None:
        with self._lock:
            for volume_id in volume_ids:
                self._kept.pop(volume_id, None)

    def _drop_old(self) -> None:
        now = self._clock()
        for volume_id in [volume_id for volume_id, (_key, until) in self._kept.items() if until <= now]:
            del self._kept[volume_id]

    @contextlib.contextmanager
    def in_libvirt(self, connection: Any, volume_ids: Iterable[str]) -> Iterator[None]:
        """Have libvirt know the keys during the block, in which a QEMU takes them over."""
        ids = tuple(volume_ids)
        self.put_into_libvirt(connection, ids)
        try:
            yield
        finally:
            take_from_libvirt(connection, ids)

    def put_into_libvirt(self, connection: Any, volume_ids: Iterable[str]) -> None:
        """Have libvirt know the keys until they are taken from it. Unavailable as `of`, and then it knows none more than before."""
        keys = {volume_id: self.of(volume_id) for volume_id in volume_ids}
        for volume_id, key in keys.items():
            connection.secretDefineXML(secret_xml(volume_id)).setValue(key)


def take_from_libvirt(connection: Any, volume_ids: Iterable[str]) -> None:
    """Have libvirt forget the keys; a QEMU that has one keeps it."""
    for volume_id in volume_ids:
        try:
            connection.secretLookupByUUIDString(secret_uuid(volume_id)).undefine()
        except libvirt.libvirtError as error:
            if not errors.is_gone(error) and error.get_error_code() != libvirt.VIR_ERR_NO_SECRET:
                raise


def secret_xml(volume_id: str) -> str:
    secret = Element("secret", ephemeral="yes", private="yes")
    SubElement(secret, "uuid").text = secret_uuid(volume_id)
    usage = SubElement(secret, "usage", type="volume")
    SubElement(usage, "volume").text = _USAGE + check_id(volume_id, "volume_id")
    return ElementTree.tostring(secret, encoding="unicode")


def encrypt(source: Element, volume_id: str) -> None:
    """Say in a disk's source that it is opened with the volume's key."""
    encryption = SubElement(source, "encryption", format="luks")
    SubElement(encryption, "secret", type="passphrase", uuid=secret_uuid(volume_id))


def encrypted_in(xml: str) -> tuple[str, ...]:
    """Return the volumes that the definition's disks need keys of."""
    return tuple(volume_id for disk in parse(xml).findall("devices/disk") if (volume_id := encrypted_volume(disk)))


def encrypted_volume(disk: Element) -> str:
    """Return the volume of an encrypted disk of ours, '' for any other."""
    alias = disk.find("alias")
    is_encrypted = disk.find("source/encryption") is not None or disk.find("encryption") is not None
    name = alias.get("name", "") if alias is not None else ""
    return name.removeprefix("ua-") if is_encrypted and name.startswith("ua-vol-") else ""
