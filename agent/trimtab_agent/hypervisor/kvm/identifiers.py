"""What ids and names may look like before they become paths, file names or XML: the agent's own check, whoever asks."""

import re

from trimtab_protos.errors import InvalidRequest

_IDENTIFIER = re.compile(r"[a-z]{1,8}-[0-9a-z][0-9a-z_-]{0,63}")
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_MAC = re.compile(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MACHINE = re.compile(r"pc-q35-[0-9]{1,2}\.[0-9]{1,2}")
_CPU_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,14}")
_MARKER = re.compile(r"[0-9a-z][0-9a-z-]{0,99}")

DOMAIN_PREFIX = "trimtab-"


def check_id(value: str, field: str) -> str:
    """Return `value` when it is an id, such as `vm-01h8x`; it can then stand in a path."""
    return _check(_IDENTIFIER, value, field, "an id such as vm-01h8xgz")


def check_uuid(value: str, field: str = "uuid") -> str:
    return _check(_UUID, value, field, "a lower-case UUID")


def check_mac(value: str, field: str = "mac") -> str:
    return _check(_MAC, value, field, "a lower-case unicast MAC such as 52:54:00:12:34:56")


def check_name(value: str, field: str) -> str:
    return _check(_NAME, value, field, "1 to 128 of letters, digits, '.', '_' and '-'")


def check_machine(value: str) -> str:
    return _check(_MACHINE, value, "machine", "a concrete machine type such as pc-q35-7.2")


def check_cpu_word(value: str, field: str) -> str:
    return _check(_CPU_WORD, value, field, "a name as in libvirt's CPU map, such as Nehalem")


def check_interface(value: str, field: str) -> str:
    return _check(_INTERFACE, value, field, "the name of a network interface, at most 15 characters")


def check_marker(value: str) -> str:
    return _check(_MARKER, value, "marker", "1 to 100 of a-z, 0-9 and '-'")


def check_range(value: int, field: str, *, low: int, high: int) -> int:
    if not low <= value <= high:
        raise InvalidRequest("field-out-of-range", f"{field} is {value}; it must be {low} to {high}", field=field)
    return value


def domain_name(vm_id: str) -> str:
    """Return libvirt's name of a vm's domain; stable whatever the vm is called."""
    return DOMAIN_PREFIX + check_id(vm_id, "vm_id")


def vm_id_of(name: str) -> str:
    """Return the vm id in a domain's name, or "" for a domain that is not called like ours."""
    vm_id = name.removeprefix(DOMAIN_PREFIX)
    return vm_id if name.startswith(DOMAIN_PREFIX) and _IDENTIFIER.fullmatch(vm_id) else ""


def _check(pattern: re.Pattern[str], value: str, field: str, wanted: str) -> str:
    # fullmatch, not match with $: that one lets a trailing newline through.
    if not pattern.fullmatch(value):
        raise InvalidRequest("field-malformed", f"{field} {value[:80]!r} must be {wanted}", field=field)
    return value
