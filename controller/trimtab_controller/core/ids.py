"""Ids: the kind, then 26 characters that sort by time of creation. Never reused, never shown shortened."""

import random
import uuid
from collections.abc import Callable
from typing import NewType

HostId = NewType("HostId", str)
VmId = NewType("VmId", str)
OperationId = NewType("OperationId", str)
ProjectId = NewType("ProjectId", str)
PoolId = NewType("PoolId", str)
VolumeId = NewType("VolumeId", str)
ImageId = NewType("ImageId", str)
NetworkId = NewType("NetworkId", str)
NicId = NewType("NicId", str)

KINDS = frozenset(
    [
        "host",
        "vm",
        "op",
        "proj",
        "user",
        "tok",
        "pool",
        "vol",
        "img",
        "net",
        "nic",
        "grp",
        "sg",
        "rt",
        "fip",
        "plan",
        "bk",
        "inst",
        "rplan",
        "repo",
        "bpol",
        "fo",
        "dec",
        "tmpl",
        "snap",
        "lay",
        "ckpt",
        "hc",
        "up",
        "gw",
        "audit",
        "join",
        "req",
        "con",
    ]
)

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32, lower case: no i, l, o, u to misread
_VM_NAMESPACE = uuid.UUID("6f1b3c1e-7c1f-5d0a-9a53-0a4b5c6d7e8f")


def new_id(kind: str, *, now_ms: int, rng: random.Random) -> str:
    """Return a fresh id of `kind`: 48 bits of Unix milliseconds and 80 random bits (as ULID)."""
    if kind not in KINDS:
        raise ValueError(f"unknown id kind {kind!r}")
    number = (now_ms << 80) | rng.getrandbits(80)
    characters = []
    for _ in range(26):
        characters.append(_ALPHABET[number & 31])
        number >>= 5
    return f"{kind}-{''.join(reversed(characters))}"


def kind_of(identifier: str) -> str:
    """Return the kind of an id, or "" if this is none of ours (a name, perhaps)."""
    kind, _, rest = identifier.partition("-")
    return kind if kind in KINDS and len(rest) == 26 and all(c in _ALPHABET for c in rest) else ""


def domain_uuid(vm_id: str) -> str:
    """Return the libvirt UUID of a vm: derived, so that it can be recomputed from a backup of either side."""
    return str(uuid.uuid5(_VM_NAMESPACE, vm_id))


DRAWS = 16
"""Of 100,000 cards one draw in 168 hits another's: sixteen in a row never do."""


def free_mac_address(rng: random.Random, *, is_taken: Callable[[str], bool]) -> str:
    """Return a MAC that nobody has, by lot. 24 bits are few: of 5,000 cards two are alike more often than not.

    The database has the last word: who is answered for between this and the insertion is refused there.
    """
    found = mac_address(rng)
    for _ in range(DRAWS - 1):
        if not is_taken(found):
            break
        found = mac_address(rng)
    return found


def mac_address(rng: random.Random) -> str:
    """Return a locally administered unicast MAC in QEMU's customary prefix; uniqueness is the database's to enforce."""
    tail = ":".join(f"{rng.getrandbits(8):02x}" for _ in range(3))
    return f"52:54:00:{tail}"
