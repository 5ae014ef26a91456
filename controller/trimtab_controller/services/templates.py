"""Templates: the settings of a vm and an image of its boot disk, in revisions; many vms made of one at once."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from trimtab_controller.clock import mint
from trimtab_controller.core.ids import kind_of
from trimtab_controller.core.model import Actor, Image, Operation, Project, Template, Vm
from trimtab_controller.operations.accept import accept
from trimtab_controller.services import seeds, snapshots, vm_nics, vms
from trimtab_controller.services.vm_power import Caller
from trimtab_controller.store import describe, images, secgroups, templates
from trimtab_controller.store import vms as vm_store
from trimtab_protos.errors import Conflict, InvalidRequest, NotFound

COUNT_MAX = 100
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
NUMBER = "{n}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateView:
    template: Template
    image: Image
    project_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VmsSpec:
    """Vms to be made: `count` of them, called by `name_pattern` with `{n}` replaced by 1, 2, ..."""

    name_pattern: str
    count: int = 1
    first: int = 1
    revision: int = 0
    pool: str = ""
    to_host: str = ""
    start: bool = True


def create(session: Session, vm: Vm, caller: Caller, *, name: str, project: Project) -> tuple[TemplateView, Operation]:
    """Insert the next revision of a template, and accept its making from the vm as it is now. The vm runs on."""
    if kind_of(name):
        raise InvalidRequest("name-like-an-id", f"name: {name} looks like an id; choose a name", field="name")
    root = describe.state_volume(describe.volumes_of(session, vm.id))
    if root is None:
        raise Conflict("vm-has-no-disks", f"from_vm: vm {vm.name} has no disk to make an image of", field="from_vm")
    revision = templates.next_revision(session, project.id, name)
    template_id, image_id, operation_id = mint("tmpl"), mint("img"), mint("op")
    taken = snapshots.create(session, vm, caller, name=f"template-{template_id[-12:]}", is_temporary=True, wakes=operation_id)
    image = images.insert(
        session,
        image_id=image_id,
        project_id=project.id,
        name=f"{name[:50]}-v{revision}",
        kind="disk",
        format="qcow2",
        source_sha256="",
        labels={},
        now=caller.now,
    )
    template = templates.insert(
        session,
        template_id=template_id,
        now=caller.now,
        project_id=project.id,
        name=name,
        revision=revision,
        image_id=image.id,
        settings=_settings(session, vm, disk_bytes=root.size_bytes, pool_id=root.pool_id),
    )
    pool = describe.get_pool(session, root.pool_id)
    source = {"volume_id": root.id, "layer_id": root.layer_id}
    if not pool.is_shared:
        source["host_id"] = root.host_id
    operation = accept(
        session,
        "template.create",
        subject_id=template.id,
        subject_name=name,
        project_id=project.id,
        params={
            "template_id": template.id,
            "image_id": image.id,
            "pool_id": root.pool_id,
            "source": source,
            "snapshot_id": taken.params["snapshot_id"],
            "after_operation_id": taken.id,
        },
        actor=caller.actor,
        now=caller.now,
        operation_id=operation_id,
    )
    return TemplateView(template=template, image=image, project_name=project.name), operation


def delete(session: Session, name_or_id: str, *, revision: int, project: Project, actor: Actor, now: datetime) -> Operation:
    """Accept that a revision goes with its image. Conflict names the volumes that are clones of it."""
    template = find(session, name_or_id, project=project, revision=revision)
    clones = images.dependants(session, template.image_id)
    if clones:
        raise Conflict(
            "template-in-use",
            f"template {template.name} revision {template.revision} is the base of volumes {', '.join(clones)} "
            f"(those of a deleted vm count for 24 h, or until `trimtab vm purge`)",
        )
    return accept(
        session,
        "template.delete",
        subject_id=template.id,
        subject_name=template.name,
        project_id=project.id,
        params={"template_id": template.id, "image_id": template.image_id},
        actor=actor,
        now=now,
    )


def create_vms(session: Session, name_or_id: str, spec: VmsSpec, *, project: Project, actor: Actor, now: datetime) -> Operation:
    """Accept the making of the vms, each an operation of its own, and one that follows them all, which is returned."""
    template = find(session, name_or_id, project=project, revision=spec.revision)
    names = _names(spec)
    made = [vms.create(session, _vm_spec(template, spec, name), project=project, actor=actor, now=now)[1] for name in names]
    for operation in made:
        vm_store.update(session, operation.subject_id, template_id=template.id)
    if len(made) > 1:
        templates.spread(session, template, [one.subject_id for one in made], group_id=mint("grp"), now=now)
    return accept(
        session,
        "template.create-vms",
        subject_id=template.id,
        subject_name=template.name,
        project_id=project.id,
        params={"template_id": template.id, "operation_ids": [operation.id for operation in made]},
        actor=actor,
        now=now,
    )


def _names(spec: VmsSpec) -> list[str]:
    if spec.count > 1 and NUMBER not in spec.name_pattern:
        raise InvalidRequest(
            "name-pattern",
            f"name_pattern: {spec.count} vms need names of their own, for example web-{NUMBER}",
            field="name_pattern",
        )
    names = [spec.name_pattern.replace(NUMBER, str(spec.first + number)) for number in range(spec.count)]
    wrong = next((name for name in names if not _NAME.fullmatch(name)), None)
    if wrong is not None:
        raise InvalidRequest(
            "name-pattern",
            f"name_pattern: {wrong!r} is no name: 1 to 63 of a-z, 0-9 and '-', a letter first; for example web-{NUMBER}",
            field="name_pattern",
        )
    return names


def find(session: Session, name_or_id: str, *, project: Project, revision: int = 0) -> Template:
    template = templates.find(session, project.id, name_or_id, revision=revision)
    if template is None:
        which = f" with revision {revision}" if revision else ""
        raise NotFound(
            "template-not-found", f"there is no template {name_or_id}{which} in project {project.name}", template=name_or_id
        )
    return template


def view(session: Session, template: Template, *, project: Project) -> TemplateView:
    return TemplateView(template=template, image=describe.get_image(session, template.image_id), project_name=project.name)


def page(session: Session, *, project: Project) -> tuple[TemplateView, ...]:
    return tuple(view(session, one, project=project) for one in templates.of_project(session, project.id))


def _settings(session: Session, vm: Vm, *, disk_bytes: int, pool_id: str) -> dict[str, Any]:
    """Return what a vm of the template is like: the shape and wishes of the one that it was made of, not its identity."""
    return {
        "vcpus": vm.vcpus,
        "vcpus_max": vm.vcpus_max,
        "memory_mib": vm.memory_mib,
        "memory_max_mib": vm.memory_max_mib,
        "disk_bytes": disk_bytes,
        "pool_id": pool_id,
        "network_ids": [nic.network_id for nic in vm_store.nics_of(session, [vm.id])[vm.id]],
        "firmware": vm.firmware.value,
        "has_secure_boot": vm.has_secure_boot,
        "has_tpm": vm.has_tpm,
        "os": vm.os,
        "labels": dict(vm.labels),
        "arch": vm.arch,
        "cpu_model": vm.cpu_model,
        "host_class": vm.host_class,
        "host_selector": dict(vm.host_selector),
        "ha": vm.ha,
        "priority": vm.priority,
        "start_delay_s": vm.start_delay_s,
        "start_group": vm.start_group,
        "start_order": vm.start_order,
        "wishes": dict(vm.wishes),
        "secgroups": list(secgroups.names_of(session, [vm.id]).get(vm.id, ())),
        "user_yaml": vm.seed.get("user_yaml", ""),
        "meta_yaml": vm.seed.get("meta_yaml", ""),
    }


def _vm_spec(template: Template, spec: VmsSpec, name: str) -> vms.VmSpec:
    settings: Mapping[str, Any] = template.settings
    wishes: Mapping[str, Any] = settings.get("wishes", {})
    made = vms.VmSpec(
        name=name,
        image=template.image_id,
        volume="",
        vcpus=settings["vcpus"],
        vcpus_max=settings["vcpus_max"],
        memory_mib=settings["memory_mib"],
        memory_max_mib=settings["memory_max_mib"],
        disk_bytes=settings["disk_bytes"],
        pool=spec.pool or settings["pool_id"],
        networks=tuple(vm_nics.NicWish(network=one) for one in settings["network_ids"]),
        firmware=settings["firmware"],
        labels=settings["labels"],
        host_selector=settings["host_selector"],
        host_class=settings["host_class"],
        arch=settings["arch"],
        cpu_model=settings["cpu_model"],
        seed=seeds.of_template(settings),
        start=spec.start,
        to_host=spec.to_host,
        os=settings["os"],
        has_tpm=settings["has_tpm"],
        has_secure_boot=settings["has_secure_boot"],
        ha=settings["ha"],
        priority=settings["priority"],
        # Templates of earlier releases say nothing of these.
        start_delay_s=settings.get("start_delay_s", 0),
        start_group=settings.get("start_group", ""),
        start_order=settings["start_order"] if settings.get("start_group") else None,
        secgroups=tuple(settings.get("secgroups", ())),
    )
    return replace(
        made,
        tolerations=tuple((str(one["key"]), str(one["value"])) for one in wishes.get("tolerations", ())),
        resources=wishes.get("resources", {}),
    )
