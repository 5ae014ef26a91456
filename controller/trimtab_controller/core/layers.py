"""What is to be done with the layers of a volume that nothing needs any more. Pure.

A volume is a tree of layers over its bottom one (id ''). A guest writes to one of them; a snapshot is a layer that is kept because a
snapshot names it; a linked clone lies over a layer of another volume. Whatever none of these needs is given up: a layer with nothing
over it is deleted, one with a single layer over it takes that one in. One with several over it stays, until only one is left.

A merge goes downwards (the upper layer into the lower one): the lower one is usually the whole disk, the upper one what was written
since, so that the work and the space needed grow with the change and not with the disk.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from trimtab_controller.core.model import Volume

MAX_LAYERS = 32
"""Layers of one volume: every read of an untouched block asks each of them in turn, and QEMU opens them all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """The layers of one volume."""

    parents: Mapping[str, str]
    """Layer → the one that it lies over; the bottom one, '', is not among the keys."""
    active: str
    """The layer that the vm writes to."""
    pinned: frozenset[str] = frozenset()
    """Layers that snapshots name."""
    clones: frozenset[str] = frozenset()
    """Layers that volumes of other vms lie over."""

    def over(self, layer: str) -> tuple[str, ...]:
        """Return the layers of this volume that lie directly over this one."""
        return tuple(sorted(child for child, parent in self.parents.items() if parent == layer))

    @property
    def is_flat(self) -> bool:
        return not self.parents and not self.clones and not self.pinned


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Delete `top`, or merge it into `base` and lay `children` over that."""

    top: str
    base: str | None = None
    """None: it is deleted."""
    children: tuple[str, ...] = field(default=())


def is_flattened(copied: Iterable[Volume]) -> bool:
    """Tell whether a migration that copies these volumes writes each of them whole into a file of its own.

    libvirt copies all disks of a guest in one way. What a linked clone lies over stays where it is, and so the copy lies over nothing.
    """
    return any(volume.parent_volume_id is not None for volume in copied)


def tidy(tree: Tree) -> tuple[tuple[Work, ...], Tree]:
    """Return what is to be done, in this order, and the tree afterwards. At most one merge is of the active layer."""
    done: list[Work] = []
    while (work := next(_possible(tree), None)) is not None:
        tree = after(tree, work)
        done.append(work)
    return tuple(done), tree


def after(tree: Tree, work: Work) -> Tree:
    """Return the tree once the work is done: whatever named the upper layer names the lower one."""
    parents = {layer: parent for layer, parent in tree.parents.items() if layer != work.top}
    if work.base is None:
        return replace(tree, parents=parents)
    base = work.base

    def renamed(layer: str) -> str:
        return base if layer == work.top else layer

    return Tree(
        parents={layer: renamed(parent) for layer, parent in parents.items()},
        active=renamed(tree.active),
        pinned=frozenset(map(renamed, tree.pinned)),
        clones=frozenset(map(renamed, tree.clones)),
    )


def _possible(tree: Tree) -> Iterator[Work]:
    """Yield deletions first, since they leave less to merge; merges from the bottom up, so that the active layer moves once."""
    kept = tree.pinned | tree.clones | {tree.active}
    for layer in sorted(tree.parents):
        if layer not in kept and not tree.over(layer):
            yield Work(top=layer)
    for layer in _from_the_bottom(tree):
        over = tree.over(layer)
        # What a linked clone lies over cannot go elsewhere: the clone may be open in a guest of any host.
        if layer not in kept and len(over) == 1 and over[0] not in tree.clones:
            yield Work(top=over[0], base=layer, children=tree.over(over[0]))


def _from_the_bottom(tree: Tree) -> Iterator[str]:
    level = [""]
    while level:
        yield from level
        level = [child for layer in level for child in tree.over(layer)]
