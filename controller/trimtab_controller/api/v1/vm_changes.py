"""What changes a vm besides its power: its shape, its disks and its network cards."""

from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller.api.fields import (
    BalloonMib,
    Body,
    CpuClassOrNone,
    MemoryMib,
    RefOrNone,
    StartGroupOrNone,
    StartOrder,
    Vcpus,
)
from trimtab_controller.api.params import Asked
from trimtab_controller.api.paths import NamePath
from trimtab_controller.api.resources.operations import OperationAnswer
from trimtab_controller.api.security import requires
from trimtab_controller.api.v1.vm_verbs import run_verb
from trimtab_controller.api.v1.vms import NicBody
from trimtab_controller.core.model import Operation, Role, Vm
from trimtab_controller.core.resize import When
from trimtab_controller.services import vm_devices, vm_ha, vm_resize, vm_resources
from trimtab_controller.services.authorise import Access, Scope
from trimtab_controller.services.vm_power import Caller
from trimtab_protos.errors import InvalidRequest

router = APIRouter(tags=["vms"])
ProjectOperator = Annotated[Access, requires(Role.OPERATOR, Scope.PROJECT)]
_VM = "/v1/projects/{project}/vms/{name}"


class ResizeBody(Body):
    """What is left out stays as it is. `auto`: in the running guest as far as it follows, the rest at its next stop."""

    vcpus: Vcpus | None = None
    memory_mib: MemoryMib | None = None
    when: Annotated[Literal["auto", "live", "next-stop"], Field(examples=["auto"])] = "auto"


class ResourcesBody(Body):
    """What is left out stays as it is."""

    # Its balloon may leave it so little while its host is short of memory; 0: it keeps all of it.
    balloon_min_mib: BalloonMib | None = None
    # '' for none.
    cpu_class: CpuClassOrNone | None = None


class HaBody(Body):
    """What is left out stays as it is."""

    # Whether it restarts elsewhere when its host dies.
    ha: Literal["restart", "none"] | None = None
    # Higher ones restart first.
    priority: Annotated[int, Field(strict=True, ge=-1000, le=1000, examples=[10])] | None = None
    # So long after its host was proven off; in a start group, after those of lower order run.
    start_delay_s: Annotated[int, Field(strict=True, ge=0, le=86400, examples=[30])] | None = None
    # A name within the project; '' takes it out.
    start_group: StartGroupOrNone | None = None
    # It starts once every kept vm of lower order in its group runs.
    start_order: StartOrder | None = None

    def wish(self) -> vm_ha.HaWish:
        return vm_ha.HaWish(
            ha=self.ha,
            priority=self.priority,
            start_delay_s=self.start_delay_s,
            start_group=self.start_group,
            start_order=self.start_order,
        )


class AttachBody(Body):
    """One of the two, or both: they come together or not at all."""

    volume: RefOrNone = ""
    network: NicBody | None = None


class DetachBody(Body):
    """Exactly one of the two: a volume by name, a nic by id or MAC."""

    volume: RefOrNone = ""
    nic: Annotated[str, Field(pattern=r"^([0-9A-Za-z:-]{1,63})?$", examples=["nic-01jd3x0v5zt0m3y0a1b2c3d4e5"])] = ""


class CdromBody(Body):
    """An ISO image; '' ejects."""

    iso: RefOrNone = ""


@router.post(f"{_VM}:resize", status_code=202, response_model=OperationAnswer)
async def resize_vm(request: Request, access: ProjectOperator, name: NamePath, asked: Asked, body: ResizeBody) -> Response:
    """Give a vm other vcpus and memory; the operation's result says what the guest took and what waits for its next stop."""
    return await run_verb(
        request,
        access,
        name,
        asked,
        body,
        "vm.resize",
        lambda *parts: vm_resize.resize(*parts, vcpus=body.vcpus or 0, memory_mib=body.memory_mib or 0, when=When(body.when)),
    )


@router.post(f"{_VM}:resources", status_code=202, response_model=OperationAnswer)
async def set_resources(request: Request, access: ProjectOperator, name: NamePath, asked: Asked, body: ResourcesBody) -> Response:
    """Give a vm another class of cpu time, or another floor of its balloon; a running guest has it at once."""
    return await run_verb(
        request,
        access,
        name,
        asked,
        body,
        "vm.set_resources",
        lambda *parts: vm_resources.change(*parts, balloon_min_mib=body.balloon_min_mib, cpu_class=body.cpu_class),
    )


@router.post(f"{_VM}:ha", status_code=202, response_model=OperationAnswer)
async def set_ha(request: Request, access: ProjectOperator, name: NamePath, asked: Asked, body: HaBody) -> Response:
    """Say whether a vm restarts elsewhere when its host dies, and how early; it goes on meanwhile."""
    return await run_verb(
        request,
        access,
        name,
        asked,
        body,
        "vm.set_ha",
        lambda session, vm, caller: vm_ha.change(session, vm, caller, body.wish()),
    )


@router.post(f"{_VM}:attach", status_code=202, response_model=OperationAnswer)
async def attach_device(request: Request, access: ProjectOperator, name: NamePath, asked: Asked, body: AttachBody) -> Response:
    """Give a vm a volume that no vm has, a card on a network, or both as one; a running guest gets them at once."""
    owner, wish = access.own_project, body.network.wish() if body.network is not None else None
    return await run_verb(
        request,
        access,
        name,
        asked,
        body,
        "vm.attach",
        lambda *parts: vm_devices.attach(*parts, volume=body.volume, wish=wish, project=owner),
    )


@router.post(f"{_VM}:detach", status_code=202, response_model=OperationAnswer)
async def detach_device(request: Request, access: ProjectOperator, name: NamePath, asked: Asked, body: DetachBody) -> Response:
    """Take a volume or a card from a vm; a running guest is asked, and the operation waits for what it does."""
    owner = access.own_project

    def act(session: Session, vm: Vm, caller: Caller) -> Operation:
        _require_one("volume", body.volume, body.nic)
        if body.nic:
            return vm_devices.detach_nic(session, vm, caller, nic=body.nic)
        return vm_devices.detach_volume(session, vm, caller, volume=body.volume, project=owner)

    return await run_verb(request, access, name, asked, body, "vm.detach", act)


@router.post(f"{_VM}:cdrom", status_code=202, response_model=OperationAnswer)
async def change_cdrom(request: Request, access: ProjectOperator, name: NamePath, asked: Asked, body: CdromBody) -> Response:
    """Put another ISO image into a vm's drive, or eject what is in it."""
    owner = access.own_project
    return await run_verb(
        request,
        access,
        name,
        asked,
        body,
        "vm.change_cdrom",
        lambda *parts: vm_devices.change_cdrom(*parts, iso=body.iso, project=owner),
    )


def _require_one(field: str, first: object, second: object) -> None:
    if bool(first) == bool(second):
        raise InvalidRequest("device-missing", f"{field}: name one device: a volume or a network card", field=field)
