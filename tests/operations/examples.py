"""One valid operation of every kind, and of the variants that take other paths. A saga without an example fails `test_every_saga`.

`arrange` accepts the operation on a fleet where nothing else is under way, and may be called many times on one fleet. `done` and
`undone` check what this kind promises beyond the invariants that `invariants.audit_invariants` asks for.
"""

from tests.operations import block_kit, examples_adoption, examples_backups, examples_fleet, examples_storage, examples_vms
from tests.operations import examples_changes as changes
from tests.operations import examples_snapshots as snaps
from tests.operations.example import Example, name_of
from tests.operations.examples_storage import present_volume, volume_is_there
from tests.operations.examples_vms import created, not_created, stopped
from tests.operations.kit import GIB
from trimtab_controller.core.resize import When

__all__ = ["EXAMPLES", "Example"]

EXAMPLES: dict[str, Example] = {
    **examples_vms.EXAMPLES,
    **examples_storage.EXAMPLES,
    **examples_fleet.EXAMPLES,
    **examples_backups.EXAMPLES,
    **examples_adoption.EXAMPLES,
    **block_kit.EXAMPLES,
    "vm.create from an ISO": Example(
        kind="vm.create", arrange=lambda story: changes.installs(story, name_of("web")), done=created, undone=not_created
    ),
    "vm.change_cdrom": Example(
        kind="vm.change_cdrom",
        arrange=lambda story: changes.changes_cdrom(story, name_of("web")),
        done=changes.has_medium("second"),
        undone=changes.has_medium("first"),
    ),
    "vm.set_resources": Example(
        kind="vm.set_resources",
        arrange=lambda story: changes.sets_resources(story, name_of("web")),
        done=changes.has_resources(256, 25),
        undone=changes.has_resources(0, 0),
    ),
    "vm.set_ha": Example(
        kind="vm.set_ha",
        arrange=lambda story: changes.sets_ha(story, name_of("web"), before="none", after="restart"),
        done=changes.is_kept("restart", 10, "yard", 2),
        undone=changes.is_kept("none", 0, "shop", 1),
    ),
    "vm.set_ha to none": Example(
        kind="vm.set_ha",
        arrange=lambda story: changes.sets_ha(story, name_of("web"), before="restart", after="none"),
        done=changes.is_kept("none", 10, "yard", 2),
        undone=changes.is_kept("restart", 0, "shop", 1),
    ),
    "vm.resize": Example(
        kind="vm.resize",
        arrange=lambda story: changes.resizes(story, name_of("web"), vcpus=4, memory_mib=2048),
        done=changes.has_shape(4, 2048),
        undone=changes.has_shape(2, 1024),
    ),
    "vm.resize to less": Example(
        kind="vm.resize",
        arrange=lambda story: changes.resizes(story, name_of("web"), vcpus=1, memory_mib=512),
        done=changes.has_shape(1, 512),
        undone=changes.has_shape(2, 1024),
    ),
    "vm.resize at its next stop": Example(
        kind="vm.resize",
        arrange=lambda story: changes.resizes(story, name_of("web"), vcpus=8, when=When.NEXT_STOP),
        done=changes.has_shape(2, 1024, later=(8, 0)),
        undone=changes.has_shape(2, 1024),
    ),
    "vm.resize of a stopped vm": Example(
        kind="vm.resize",
        arrange=lambda story: changes.resizes(story, name_of("web"), before=stopped, vcpus=8),
        done=changes.has_shape(8, 1024),
        undone=changes.has_shape(2, 1024),
    ),
    "vm.attach of a volume": Example(
        kind="vm.attach",
        arrange=lambda story: changes.attaches(story, name_of("web"), volume_id=present_volume(story)),
        done=changes.has_devices(2, 1),
        undone=changes.has_devices(1, 1),
    ),
    "vm.attach of a card to a stopped vm": Example(
        kind="vm.attach",
        arrange=lambda story: changes.attaches(story, name_of("web"), before=stopped),
        done=changes.has_devices(1, 2),
        undone=changes.has_devices(1, 1),
    ),
    "vm.attach of a volume and a card": Example(
        kind="vm.attach",
        arrange=lambda story: changes.attaches(story, name_of("web"), volume_id=present_volume(story), has_card=True),
        done=changes.has_devices(2, 2),
        undone=changes.has_devices(1, 1),
    ),
    "vm.detach of a volume": Example(
        kind="vm.detach",
        arrange=lambda story: changes.detaches(story, name_of("web"), volume_id=present_volume(story)),
        done=changes.has_devices(1, 1),
        undone=changes.has_devices(2, 1),
    ),
    "vm.detach of a card": Example(
        kind="vm.detach",
        arrange=lambda story: changes.detaches(story, name_of("web")),
        done=changes.has_devices(1, 1),
        undone=changes.has_devices(1, 2),
    ),
    "volume.resize under a guest": Example(
        kind="volume.resize",
        arrange=lambda story: changes.grows_root(story, name_of("web")),
        done=changes.root_size(3 * GIB),
        undone=changes.root_size(2 * GIB),
        takes_place=frozenset({"grow"}),
    ),
    "volume.limit under a guest": Example(
        kind="volume.limit",
        arrange=lambda story: changes.limits_root(story, name_of("web")),
        done=changes.root_limits(500, 100),
        undone=changes.root_limits(0, 0),
    ),
    "volume.resize of one apart": Example(
        kind="volume.resize",
        arrange=lambda story: changes.accept_volume_resize(story, present_volume(story), 3 * GIB),
        done=volume_is_there,
        undone=volume_is_there,
        takes_place=frozenset({"grow"}),
    ),
    "snapshot.create": Example(
        kind="snapshot.create",
        arrange=lambda story: snaps.creates(story, name_of("web")),
        done=snaps.created("filesystem"),
        undone=snaps.not_created,
    ),
    "snapshot.create with memory": Example(
        kind="snapshot.create",
        arrange=lambda story: snaps.creates(story, name_of("web"), has_memory=True),
        done=snaps.created("memory"),
        undone=snaps.not_created,
    ),
    "snapshot.create of a stopped vm": Example(
        kind="snapshot.create",
        arrange=lambda story: snaps.creates(story, name_of("web"), stopped=True),
        done=snaps.created("stopped"),
        undone=snaps.not_created,
    ),
    "snapshot.delete below another": Example(
        kind="snapshot.delete",
        arrange=lambda story: snaps.deletes(story, name_of("web")),
        done=snaps.deleted(1, "after"),
        undone=snaps.not_deleted,
    ),
    "snapshot.delete of the last": Example(
        kind="snapshot.delete",
        arrange=lambda story: snaps.deletes_last(story, name_of("web")),
        done=snaps.deleted(0),
        undone=snaps.not_deleted,
    ),
    "snapshot.revert": Example(
        kind="snapshot.revert",
        arrange=lambda story: snaps.reverts(story, name_of("web")),
        done=snaps.reverted,
        undone=snaps.not_reverted,
        takes_place=frozenset({"off"}),
    ),
    "snapshot.revert with memory": Example(
        kind="snapshot.revert",
        arrange=lambda story: snaps.reverts(story, name_of("web"), has_memory=True),
        done=snaps.reverted,
        undone=snaps.not_reverted,
        takes_place=frozenset({"off"}),
    ),
    "vm.create as a linked clone": Example(
        kind="vm.create",
        arrange=lambda story: snaps.is_cloned(story, name_of("web"), is_linked=True),
        done=snaps.cloned,
        undone=snaps.not_cloned,
    ),
    "vm.migrate of a linked clone": Example(
        kind="vm.migrate",
        arrange=lambda story: snaps.migrates_clone(story, name_of("web")),
        done=snaps.clone_migrated,
        undone=snaps.clone_stayed,
        takes_place=frozenset({"move"}),
    ),
    "vm.create as a full clone": Example(
        kind="vm.create",
        arrange=lambda story: snaps.is_cloned(story, name_of("web"), is_linked=False),
        done=snaps.cloned,
        undone=snaps.not_cloned,
    ),
    "template.create": Example(
        kind="template.create",
        arrange=lambda story: snaps.makes_template(story, name_of("web")),
        done=snaps.template_made,
        undone=snaps.template_gone,
    ),
    "template.delete": Example(
        kind="template.delete",
        arrange=lambda story: snaps.deletes_template(story, name_of("web")),
        done=snaps.template_gone,
        undone=snaps.template_made,
    ),
    "template.create-vms": Example(
        kind="template.create-vms", arrange=lambda story: snaps.makes_vms(story, name_of("web")), done=snaps.vms_made
    ),
}
