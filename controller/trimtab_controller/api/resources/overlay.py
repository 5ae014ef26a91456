"""Routers and floating addresses as JSON."""

from dataclasses import dataclass
from datetime import datetime

from trimtab_controller.api.render import etag_of
from trimtab_controller.services.floating import FloatingView
from trimtab_controller.services.routers import RouterView


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldAddressResource:
    """An address that a router answers for: its own, or a floating one that comes in by it."""

    address: str
    network: str
    # Whom it leads to; '' where it is the router's own. `is_vm_deleted`: it leads nowhere until the vm comes back.
    vm: str
    is_vm_deleted: bool
    # The vm's address on its network.
    inner: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterResource:
    id: str
    name: str
    project: str
    # Overlay networks that reach each other by it.
    networks: tuple[str, ...]
    # The network on which it has an outer side, and its address there; '' for none.
    outer: str
    outer_address: str
    # Hosts that may carry its outer side; the first one that lives does.
    gateways: tuple[str, ...]
    # The router's own first, then floating ones.
    addresses: tuple[HeldAddressResource, ...]
    version: int
    etag: str
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatingResource:
    id: str
    # The address.
    name: str
    project: str
    network: str
    # Whom it leads to; '' for nobody. `is_vm_deleted`: it leads nowhere until the vm comes back.
    vm: str
    is_vm_deleted: bool
    nic: str
    address: str
    version: int
    etag: str
    created_at: datetime


def render_router(view: RouterView) -> RouterResource:
    router = view.router
    return RouterResource(
        id=router.id,
        name=router.name,
        project=view.project_name,
        networks=view.networks,
        outer=view.outer_name,
        outer_address=router.outer_address or "",
        gateways=view.gateways,
        addresses=tuple(
            HeldAddressResource(
                address=one.address,
                network=one.network,
                vm=one.led.vm_name if one.led else "",
                is_vm_deleted=one.led.is_deleted if one.led else False,
                inner=one.led.address if one.led else "",
            )
            for one in view.addresses
        ),
        version=router.version,
        etag=etag_of(router.version),
        created_at=router.created_at,
    )


def render_floating(view: FloatingView) -> FloatingResource:
    found, led = view.floating, view.led
    return FloatingResource(
        id=found.id,
        name=found.name,
        project=view.project_name,
        network=view.network_name,
        vm=led.vm_name if led else "",
        is_vm_deleted=led.is_deleted if led else False,
        nic=led.nic_id if led else "",
        address=led.address if led else "",
        version=found.version,
        etag=etag_of(found.version),
        created_at=found.created_at,
    )
