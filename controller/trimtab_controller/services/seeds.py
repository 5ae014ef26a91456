"""The documents of a cloud-init NoCloud seed, made from typed fields by a YAML dumper, never by pasting text."""

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from trimtab_controller.core.model import Nic
from trimtab_protos.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedWish:
    """What the user gave; '' where nothing."""

    hostname: str = ""
    user_data: str = ""
    ssh_keys: tuple[str, ...] = ()
    network_config: str = ""


def documents(wish: SeedWish | None, *, vm_id: str, vm_name: str, nics: Sequence[Nic]) -> dict[str, str]:
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
        _check_yaml(wish.user_data, "seed.user_data")
    if wish.network_config:
        _check_yaml(wish.network_config, "seed.network_config")
    network_yaml = wish.network_config or (_network_yaml(nics) if has_addresses else "")
    return {"meta_yaml": _dump(meta), "user_yaml": wish.user_data or "#cloud-config\n{}\n", "network_yaml": network_yaml}


def with_addresses(network_yaml: str, nics: Sequence[Nic]) -> str:
    """Return a network-config for other cards: the one that was made for the old ones is made anew, one of the user's own stays."""
    ethernets = (yaml.safe_load(network_yaml or "{}") or {}).get("ethernets") or {}
    is_ours = all(re.fullmatch("nic[0-9]+", str(name)) for name in ethernets)
    return _network_yaml(nics) if is_ours and any(nic.addresses for nic in nics) else network_yaml


def for_clone(documents: Mapping[str, str], *, vm_id: str, vm_name: str, nics: Sequence[Nic]) -> dict[str, str]:
    """Return the seed of a clone: what its source was told, under another identity.

    The new instance-id makes cloud-init draw new ssh host keys and set the hostname; the machine-id, which it leaves alone, is
    drawn anew before anything else runs. Addresses were the source's own: every nic asks by DHCP.
    """
    meta = yaml.safe_load(documents.get("meta_yaml") or "{}") or {}
    meta |= {"instance-id": vm_id, "local-hostname": vm_name}
    had_addresses = bool(documents.get("network_yaml"))
    return {
        "meta_yaml": _dump(meta),
        "user_yaml": _with_new_machine_id(documents.get("user_yaml") or "#cloud-config\n{}\n"),
        "network_yaml": _network_yaml(nics) if had_addresses else "",
    }


def of_template(settings: Mapping[str, Any]) -> SeedWish:
    """Return what a vm of a template is told: what the one that it was made of was told, and to take another identity."""
    meta = yaml.safe_load(settings.get("meta_yaml") or "{}") or {}
    user_data = _with_new_machine_id(settings.get("user_yaml") or "#cloud-config\n{}\n")
    return SeedWish(user_data=user_data, ssh_keys=tuple(meta.get("public-keys", ())))


def _with_new_machine_id(user_data: str) -> str:
    """Return the user-data with a boot command that runs once per instance; a script is left as it is."""
    if not user_data.startswith("#cloud-config"):
        return user_data
    document = yaml.safe_load(user_data) or {}
    commands = [one for one in document.get("bootcmd") or [] if one != _NEW_MACHINE_ID]
    return "#cloud-config\n" + _dump({**document, "bootcmd": [_NEW_MACHINE_ID, *commands], "ssh_deletekeys": True})


_NEW_MACHINE_ID = [
    "cloud-init-per",
    "instance",
    "trimtab-machine-id",
    "sh",
    "-c",
    "rm -f /etc/machine-id /var/lib/dbus/machine-id && systemd-machine-id-setup",
]


def _network_yaml(nics: Sequence[Nic]) -> str:
    """Return network-config version 2: declared addresses static, other nics by DHCP."""
    ethernets: dict[str, Any] = {}
    for nic in nics:
        interface: dict[str, Any] = {"match": {"macaddress": nic.mac}}
        if nic.addresses:
            interface["addresses"] = list(nic.addresses)
        else:
            interface["dhcp4"] = True
        ethernets[f"nic{nic.nic_index}"] = interface
    return _dump({"version": 2, "ethernets": ethernets})


def _dump(document: Any) -> str:
    return yaml.safe_dump(document, default_flow_style=False, allow_unicode=True, sort_keys=False)


def _check_yaml(text: str, field: str) -> None:
    """Refuse what a guest's cloud-init would choke on, while the user is still there to read why."""
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())[:200]
        raise InvalidRequest("seed-yaml", f"{field}: no YAML: {reason}", field=field) from error
    except (RecursionError, ValueError) as error:  # nested too deep; a date or number that is none
        raise InvalidRequest("seed-yaml", f"{field}: YAML that cannot be read", field=field) from error
    if document is not None and not isinstance(document, dict):
        raise InvalidRequest("seed-yaml", f"{field}: a mapping is expected, as in `hostname: web1`", field=field)


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
