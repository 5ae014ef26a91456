"""Vms: lists, creation, labels, deletion. Power: `vm_verbs.py`."""

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from pydantic import Field
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller.api import streams
from trimtab_controller.api.fields import (
    Address,
    BalloonMib,
    Body,
    Bool,
    Counts,
    CpuClassOrNone,
    CpuModelOrNone,
    DiskBytes,
    LabelChanges,
    LabelKey,
    Labels,
    LabelValue,
    Mac,
    MemoryMib,
    Name,
    OsOrNone,
    Part,
    Ref,
    RefOrNone,
    StartGroupOrNone,
    StartOrder,
    Vcpus,
)
from trimtab_controller.api.lists import ListQuery
from trimtab_controller.api.mutate import Order, accepted, answered, mutate
from trimtab_controller.api.params import Asked, InRuntime, Listing
from trimtab_controller.api.paths import NamePath
from trimtab_controller.api.render import dump, dump_list, etag_of, json_response, page_of
from trimtab_controller.api.resources.common import ListOf
from trimtab_controller.api.resources.operations import render
from trimtab_controller.api.resources.vm_summaries import VmSummaryResource
from trimtab_controller.api.resources.vms import VmAnswer, VmResource, render_vm
from trimtab_controller.api.runtime import Runtime
from trimtab_controller.api.security import requires
from trimtab_controller.core.firewall import GROUPS_MAX
from trimtab_controller.core.model import Actor, Operation, Project, Role, Vm
from trimtab_controller.services import placement_advisor, seeds, vm_nics, vm_power, vm_views, vms
from trimtab_controller.services.authorise import Access, Scope
from trimtab_controller.services.mutations import Answer
from trimtab_controller.services.vm_views import VmView

router = APIRouter(tags=["vms"])
ProjectViewer = Annotated[Access, requires(Role.VIEWER, Scope.PROJECT)]
ProjectOperator = Annotated[Access, requires(Role.OPERATOR, Scope.PROJECT)]
# What cloud-init takes; a seed image holds no more than a few hundred KiB.
SeedText = Annotated[str, Field(max_length=64 * 1024, examples=["#cloud-config\npackage_update: true\n"])]
SshKey = Annotated[
    str,
    Field(
        pattern=r"^[a-z0-9@.-]{4,40} [A-Za-z0-9+/=]{16,8000}( [ -~]{0,200})?$",
        examples=["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA me"],
    ),
]


DeviceKind = Annotated[str, Field(pattern=r"^[0-9a-f]{4}-[0-9a-f]{4}$", examples=["10de-20b0"])]


class NicBody(Part):
    """`mac` is chosen where it is left out. `ip` declares an address, which no other nic on the network may have; where it is left out
    and the network has a subnet, a free one is given."""

    network: Ref
    mac: Mac = ""
    ip: Address = ""
    # It may send as others, as a router does; takes an administrator of the fleet.
    allow_spoofing: Bool = False

    def wish(self) -> vm_nics.NicWish:
        return vm_nics.NicWish(network=self.network, mac=self.mac, ip=self.ip, allows_spoofing=self.allow_spoofing)


class SeedBody(Part):
    """A NoCloud seed for cloud-init; the hostname is the vm's name where it is left out."""

    hostname: RefOrNone = ""
    user_data: SeedText = ""
    ssh_keys: Annotated[tuple[SshKey, ...], Field(max_length=50, examples=[["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA me"]])] = ()
    network_config: SeedText = ""

    def wish(self) -> seeds.SeedWish:
        return seeds.SeedWish(
            hostname=self.hostname,
            user_data=self.user_data,
            ssh_keys=self.ssh_keys,
            network_config=self.network_config,
        )


class TolerationBody(Part):
    """Taints of hosts that the vm puts up with: of this key, and of this value unless it is left out."""

    key: LabelKey
    value: LabelValue = ""


class VmBody(Body):
    """Boots from a new clone of `image`, or from `volume`, or is installed from `iso` onto an empty disk of `disk_bytes`.

    `os` (a family: linux, windows, generic; or a name of osinfo's, such as win11) decides disks, cards, clock and firmware, and the
    memory where `memory_mib` is left out: what osinfo recommends for it, else its least; a family's own is 2048, 4096, 1024.
    """

    name: Name
    image: RefOrNone = ""
    volume: RefOrNone = ""
    iso: RefOrNone = ""
    # An ISO image in a second drive, with the drivers that an installer asks for.
    drivers_iso: RefOrNone = ""
    os: OsOrNone = ""
    tpm: Bool = False
    secure_boot: Bool = False
    # Its new disk lies encrypted (LUKS); from an image it is an independent copy then.
    encrypted: Bool = False
    vcpus: Vcpus = 1
    vcpus_max: Vcpus | None = None
    memory_mib: MemoryMib | None = None
    memory_max_mib: MemoryMib | None = None
    # Its balloon may leave it so little while its host is short of memory; 0: it keeps all of it.
    balloon_min_mib: BalloonMib = 0
    cpu_class: CpuClassOrNone = ""
    disk_bytes: DiskBytes | None = None
    pool: RefOrNone = ""
    networks: Annotated[tuple[NicBody, ...], Field(max_length=16, examples=[[{"network": "default"}]])] = ()
    firmware: Literal["bios", "uefi", ""] = ""
    labels: Labels = Field(default_factory=dict)
    host_selector: Labels = Field(default_factory=dict)
    host_class: RefOrNone = ""
    arch: Literal["x86_64", "aarch64"] = "x86_64"
    cpu_model: CpuModelOrNone = ""
    seed: Annotated[SeedBody, Field(examples=[{"ssh_keys": ["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA me"]}])] | None = None
    start: Bool = True
    to_host: RefOrNone = ""
    tolerations: Annotated[tuple[TolerationBody, ...], Field(max_length=32, examples=[[{"key": "gpu"}]])] = ()
    resources: Counts = Field(default_factory=dict)
    # PCI devices of its host, by kind: `10de-20b0`, vendor and product. It cannot move while it runs.
    devices: Annotated[
        dict[DeviceKind, Annotated[int, Field(strict=True, ge=1, le=16, examples=[1])]],
        Field(max_length=8, examples=[{"10de-20b0": 1}]),
    ] = Field(default_factory=dict)
    # Each vcpu gets a cpu of its own, of those that hosts keep for it (`host update --dedicated-cpus`).
    dedicated: Bool = False
    # Huge pages behind all of its memory: 2 MiB or 1 GiB each; 0 for ordinary memory.
    hugepages_kib: Literal[0, 2048, 1048576] = 0
    numa_cells: Annotated[int, Field(strict=True, ge=1, le=64, examples=[2])] = 1
    # A vm group of the project.
    group: RefOrNone = ""
    # Security groups of the project; none: anything may reach it.
    secgroups: Annotated[tuple[Ref, ...], Field(max_length=GROUPS_MAX, examples=[["web"]])] = ()
    ha: Literal["restart", "none"] = "none"
    priority: Annotated[int, Field(strict=True, ge=-1000, le=1000, examples=[10])] = 0
    start_delay_s: Annotated[int, Field(strict=True, ge=0, le=86400, examples=[30])] = 0
    # After a loss it starts once every kept vm of lower order in its start group runs, its delay after them.
    start_group: StartGroupOrNone = ""
    start_order: StartOrder | None = None

    def spec(self) -> vms.VmSpec:
        return vms.VmSpec(
            name=self.name,
            image=self.image,
            volume=self.volume,
            vcpus=self.vcpus,
            vcpus_max=self.vcpus_max,
            memory_mib=self.memory_mib or 0,
            memory_max_mib=self.memory_max_mib,
            disk_bytes=self.disk_bytes,
            pool=self.pool,
            networks=tuple(one.wish() for one in self.networks),
            firmware=self.firmware,
            labels=self.labels,
            host_selector=self.host_selector,
            host_class=self.host_class,
            arch=self.arch,
            cpu_model=self.cpu_model,
            seed=self.seed.wish() if self.seed else None,
            start=self.start,
            to_host=self.to_host,
            iso=self.iso,
            os=self.os,
            has_tpm=self.tpm,
            has_secure_boot=self.secure_boot,
            drivers_iso=self.drivers_iso,
            balloon_min_mib=self.balloon_min_mib,
            cpu_class=self.cpu_class,
            is_encrypted=self.encrypted,
            tolerations=tuple((one.key, one.value) for one in self.tolerations),
            resources=self.resources,
            secgroups=self.secgroups,
            group=self.group,
            devices=self.devices,
            is_dedicated=self.dedicated,
            hugepages_kib=self.hugepages_kib,
            numa_cells=self.numa_cells,
            ha=self.ha,
            priority=self.priority,
            start_delay_s=self.start_delay_s,
            start_group=self.start_group,
            start_order=self.start_order,
        )


class VmChanges(Body):
    """A field left out stays as it is. Labels are merged in; null takes one away."""

    labels: LabelChanges | None = None
    # What a drain may do with it.
    drain_policy: Literal["migrate", "restart", "wait"] | None = None
    # '' takes it off.
    backup_policy: RefOrNone | None = None
    # '' takes the drive with drivers away, at its next start.
    drivers_iso: Literal[""] | None = None


@router.get("/v1/projects/{project}/vms", response_model=ListOf[VmResource] | ListOf[VmSummaryResource])
async def list_vms(
    request: Request,
    runtime: InRuntime,
    access: ProjectViewer,
    query: Listing,
    show_deleted: Annotated[bool, Query(description="Also those that undelete can still bring back.")] = False,
    watch: Annotated[bool, Query(description="A stream of events: every vm now, then each change.")] = False,
    view: Annotated[
        Literal["full", "basic"], Query(description="`basic`: of each vm the part that a list of many shows.")
    ] = "full",
) -> Response:
    """List the project's vms; filter by name, host, state, desired, image, network, arch."""
    if watch:
        return await streams.watch_vms(request, runtime, access, query.page)
    if view == "basic":
        return await _list_summaries(runtime, access, query, with_deleted=show_deleted)
    found, after = await runtime.context.db.read(
        lambda session: vm_views.page(session, query.page, project_id=access.project_id, with_deleted=show_deleted)
    )
    now, heard = runtime.context.clock.now(), runtime.context.heard()
    items = [render_vm(view, now=now, heard=heard) for view in found]
    return json_response(dump_list(VmResource, items, query.next_token(after)))


async def _list_summaries(runtime: Runtime, access: Access, query: ListQuery, *, with_deleted: bool) -> Response:
    owner = access.own_project
    found, after = await runtime.context.db.read(
        lambda session: vm_views.summaries(session, query.page, project_id=owner.id, with_deleted=with_deleted)
    )
    now, heard = runtime.context.clock.now(), runtime.context.heard()
    body = runtime.summaries.dump(found, project=owner.name, now=now, heard=heard)
    return json_response(page_of(body, query.next_token(after)))


@router.post("/v1/projects/{project}/vms", status_code=202, response_model=VmAnswer)
async def create_vm(request: Request, runtime: InRuntime, access: ProjectOperator, body: VmBody, asked: Asked) -> Response:
    """Create a vm: the scheduler places it, its root disk is cloned, it is started."""
    owner, spec, box = access.own_project, body.spec(), runtime.context.secrets
    fleet = await runtime.context.db.read(placement_advisor.read_fleet) if asked.is_dry_run else None

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        view, operation = vms.create(session, spec, project=owner, actor=actor, now=now, box=box)
        placed_on = _preview(session, fleet, view.vm, operation) if fleet is not None else _NOWHERE
        answer = _answer(runtime, view, operation, project=owner, placed_on=placed_on)
        return accepted(answer, is_due=False)  # the leader places it first

    order = Order(request=request, access=access, wish=asked, verb="vm.create", body=body, name=body.name)
    return await mutate(order, work)


@router.get("/v1/projects/{project}/vms/{name}", response_model=VmResource)
async def get_vm(runtime: InRuntime, access: ProjectViewer, name: NamePath) -> Response:
    owner = access.own_project

    def read(session: Session) -> VmView:
        return vm_views.read(session, vm_power.find(session, name, project=owner).id)

    view = await runtime.context.db.read(read)
    resource = render_vm(view, now=runtime.context.clock.now(), heard=runtime.context.heard())
    return json_response(dump(resource), etag=etag_of(view.vm.version))


@router.patch("/v1/projects/{project}/vms/{name}", response_model=VmResource)
async def change_vm(
    request: Request,
    runtime: InRuntime,
    access: ProjectOperator,
    name: NamePath,
    body: VmChanges,
    asked: Asked,
) -> Response:
    """Change labels, what a drain may do with the vm, and the policy that backs it up."""
    owner = access.own_project

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        vm = vm_power.find(session, name, project=owner)
        changed = vms.change(
            session,
            vm,
            labels=body.labels,
            drain_policy=body.drain_policy,
            backup_policy=body.backup_policy,
            has_drivers_iso=body.drivers_iso is None,
            expected_version=asked.if_match,
            actor=actor,
            now=now,
        )
        view = vm_views.views(session, [changed])[0]
        resource = render_vm(view, now=now, heard=runtime.context.heard())
        return answered(resource, version=changed.version)

    return await mutate(Order(request=request, access=access, wish=asked, verb="vm.change", body=body), work)


@router.delete("/v1/projects/{project}/vms/{name}", status_code=202, response_model=VmAnswer)
async def delete_vm(request: Request, runtime: InRuntime, access: ProjectOperator, name: NamePath, asked: Asked) -> Response:
    """Delete a vm, whatever else is under way; `:undelete` brings it back within 24 h."""
    owner = access.own_project

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        vm = vm_power.find(session, name, project=owner)
        caller = vm_power.Caller(actor=actor, expected_version=asked.if_match, now=now)
        operation = vm_power.delete(session, vm, caller)
        return accepted(_answer(runtime, vm_views.read(session, vm.id), operation, project=owner))

    return await mutate(Order(request=request, access=access, wish=asked, verb="vm.delete"), work)


_NOWHERE = ("", "")


def _answer(
    runtime: Runtime, view: VmView, operation: Operation, *, project: Project, placed_on: tuple[str, str] = _NOWHERE
) -> VmAnswer:
    now, heard = operation.created_at, runtime.context.heard()
    return VmAnswer(
        operation=render(operation, project_name=project.name),
        vm=render_vm(view, now=now, heard=heard),
        would_be_placed_on=placed_on[0],
        placement_summary=placed_on[1],
    )


def _preview(session: Session, fleet: placement_advisor.FleetView, vm: Vm, operation: Operation) -> tuple[str, str]:
    """Return where the vm would go, and why there. NoCapacity with the reasons where no host fits."""
    decision = placement_advisor.preview(session, fleet, vm, to_host_id=str(operation.params.get("to_host_id", "")))
    assert decision.chosen is not None
    return decision.chosen.host_name, decision.summary()
