"""The documents of a cloud-init NoCloud seed, made from typed fields by a YAML dumper, never by pasting text."""

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from trimtab_protos.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedWish:
    """What the user gave; '' where nothing."""

    hostname: str = ""
    user_data: str = ""
    ssh_keys: tuple[str, ...] = ()
    network_config: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedNic:
    """A card as a seed tells of it."""

    nic_index: int
    mac: str
    # With prefix length: `10.0.0.5/24`; none where DHCP, or the guest by itself, is to say it.
    addresses: tuple[str, ...]
    # Of its LAN, told with addresses only: DHCP says its own.
    gateway: str = ""
    dns: tuple[str, ...] = ()


def documents(wish: SeedWish | None, *, vm_id: str, vm_name: str, nics: Sequence[SeedNic]) -> dict[str, str]:
    """Return {meta_yaml, user_yaml, network_yaml}, or {} where no seed is wanted.

    Declared addresses need one: without it nothing tells the guest about them.
    """
    has_addresses = any(nic.addresses for nic in nics)
    if wish is None and not has_addresses:
        return {}
    wish = wish or SeedWish()
    meta: dict[str, Any] = {"instance-id": vm_id, "local-hostname": wish.hostname or vm_name}
    if wish.ssh_keys:
        meta["public-keys"] = list(wish.ssh_keys)
    if wish.user_data.startswith("#cloud-config"):
        _read_yaml(wish.user_data, "seed.user_data", "`hostname: web1`")
    if wish.network_config:
        _check_network_config(wish.network_config, "seed.network_config")
    network_yaml = wish.network_config or (_network_yaml(nics) if has_addresses else "")
    return {"meta_yaml": _dump(meta), "user_yaml": wish.user_data or "#cloud-config\n{}\n", "network_yaml": network_yaml}


def with_addresses(network_yaml: str, nics: Sequence[SeedNic], *, are_taken: bool) -> str:
    """Return a network-config for other cards: the one that was made for the old ones is made anew, one of the user's own stays.

    Addresses of old cards stay where the new ones have none, unless they `are_taken`: then those ask by DHCP.
    """
    document = yaml.safe_load(network_yaml or "{}") or {}
    ethernets = document.get("ethernets") or {}
    is_ours = document.keys() <= {"version", "ethernets"} and all(re.fullmatch("nic[0-9]+", str(name)) for name in ethernets)
    is_anew = any(nic.addresses for nic in nics) or (are_taken and bool(ethernets) and bool(nics))
    return _network_yaml(nics) if is_ours and is_anew else network_yaml


def for_clone(documents: Mapping[str, str], *, vm_id: str, vm_name: str, nics: Sequence[SeedNic]) -> dict[str, str]:
    """Return the seed of a clone: what its source was told, under another identity.

    The new instance-id makes cloud-init draw new ssh host keys and set the hostname; the machine-id, which it leaves alone, is
    drawn anew before anything else runs. Addresses were the source's own: every nic asks by DHCP.
    """
    meta = yaml.safe_load(documents.get("meta_yaml") or "{}") or {}
    meta |= {"instance-id": vm_id, "local-hostname": vm_name}
    had_addresses = bool(documents.get("network_yaml"))
    return {
        "meta_yaml": _dump(meta),
        "user_yaml": as_another(documents.get("user_yaml") or "#cloud-config\n{}\n", vm_name),
        "network_yaml": _network_yaml(nics) if had_addresses else "",
    }


def of_template(settings: Mapping[str, Any]) -> SeedWish:
    """Return what a vm of a template is told: what the one that it was made of was told, and to take another identity."""
    meta = yaml.safe_load(settings.get("meta_yaml") or "{}") or {}
    user_data = as_another(settings.get("user_yaml") or "#cloud-config\n{}\n")
    return SeedWish(user_data=user_data, ssh_keys=tuple(meta.get("public-keys", ())))


def as_another(user_data: str, vm_name: str = "") -> str:
    """Return the user-data of a guest that takes another identity; a script is left as it is.

    A boot command that runs once per instance draws the machine-id anew. A hostname in it would count more than the seed's own, so
    it goes; a domain stays with a name that is known.
    """
    if not user_data.startswith("#cloud-config"):
        return user_data
    document = yaml.safe_load(user_data) or {}
    kept = {key: value for key, value in document.items() if key not in {"hostname", "fqdn", "preserve_hostname"}}
    _, dot, domain = str(document.get("fqdn") or "").partition(".")
    if dot and vm_name:
        kept["fqdn"] = f"{vm_name}.{domain}"
    commands = [one for one in document.get("bootcmd") or [] if one != _NEW_MACHINE_ID]
    return "#cloud-config\n" + _dump({**kept, "bootcmd": [_NEW_MACHINE_ID, *commands], "ssh_deletekeys": True})


_NEW_MACHINE_ID = [
    "cloud-init-per",
    "instance",
    "trimtab-machine-id",
    "sh",
    "-c",
    "rm -f /etc/machine-id /var/lib/dbus/machine-id && systemd-machine-id-setup",
]


_ANYWHERE = {4: ("0.0.0.0/0",), 6: ("::/1", "8000::/1")}
"""By words that every cloud-init takes: `default` is no network to those before 23.1, and `::/0` is `::/64` to all that do not write
for netplan (canonical/cloud-init#4600). The halves of IPv6 are all of it."""


def _network_yaml(nics: Sequence[SeedNic]) -> str:
    """Return network-config version 2: declared addresses static, other nics by DHCP.

    Of each family one card leads out, the first whose LAN has a router: of two ways the guest would take either.
    """
    ethernets: dict[str, Any] = {}
    led_out: set[int] = set()
    for nic in nics:
        interface: dict[str, Any] = {"match": {"macaddress": nic.mac}}
        if nic.addresses:
            interface["addresses"] = list(nic.addresses)
            family = ipaddress.ip_address(nic.gateway).version if nic.gateway else 0
            if family and family not in led_out:
                interface["routes"] = [{"to": network, "via": nic.gateway} for network in _ANYWHERE[family]]
                led_out.add(family)
            if nic.dns:
                interface["nameservers"] = {"addresses": list(nic.dns)}
        else:
            interface["dhcp4"] = True
        ethernets[f"nic{nic.nic_index}"] = interface
    return _dump({"version": 2, "ethernets": ethernets})


def _dump(document: Any) -> str:
    return yaml.safe_dump(document, default_flow_style=False, allow_unicode=True, sort_keys=False)


def _read_yaml(text: str, field: str, example: str) -> dict[str, Any]:
    """Refuse what a guest's cloud-init would choke on, while the user is still there to read why."""
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())[:200]
        raise InvalidRequest("seed-yaml", f"{field}: no YAML: {reason}", field=field) from error
    except (RecursionError, ValueError) as error:  # nested too deep; a date or number that is none
        raise InvalidRequest("seed-yaml", f"{field}: YAML that cannot be read", field=field) from error
    if document is not None and not isinstance(document, dict):
        raise InvalidRequest("seed-yaml", f"{field}: a mapping is expected, as in {example}", field=field)
    return document or {}


def _check_network_config(text: str, field: str) -> None:
    """Refuse what no cloud-init takes for a network-config: a guest told so comes up with no network at all."""
    document = _read_yaml(text, field, "`version: 2`")
    inner = document.get("network", document)
    if not isinstance(inner, dict) or (inner.get("version") not in (1, 2) and inner.get("config") != "disabled"):
        message = f"{field}: `version: 1` or `version: 2` is expected; version 2 has `ethernets` beside it"
        raise InvalidRequest("seed-network-version", message, field=field)


def parse_address(text: str, subnet: str, *, gateway: str = "", field: str) -> tuple[str, int]:
    """Return (address, prefix length) of `10.0.0.5` or `10.0.0.5/24`. InvalidRequest outside the network's subnet, or the gateway's."""
    try:
        interface = ipaddress.ip_interface(text)
    except ValueError as error:
        raise InvalidRequest("address-wrong", f'{field}: {error}; for example "10.0.0.5"', field=field) from error
    address, prefix_length = interface.ip, interface.network.prefixlen
    if subnet:
        network = ipaddress.ip_network(subnet)
        if address not in network:
            raise InvalidRequest("address-outside", f"{field}: {address} is not in the network's subnet {subnet}", field=field)
        if address in {network.network_address, network.broadcast_address} and network.num_addresses > 2:
            raise InvalidRequest("address-reserved", f"{field}: {address} is reserved in {subnet}", field=field)
        if str(address) == gateway:
            raise InvalidRequest("address-gateway", f"{field}: {address} is the gateway of {subnet}; take another", field=field)
        if "/" not in text:
            prefix_length = network.prefixlen
    if address.is_unspecified or address.is_multicast or address.is_loopback:
        raise InvalidRequest("address-wrong", f"{field}: {address} cannot be a guest's address", field=field)
    return str(address), prefix_length
