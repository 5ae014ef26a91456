"""Layers of a volume that is an image of a Ceph pool, which is one thing and no chain of files.

What is written to now is the image itself, its head; a layer that has another one over it is a snapshot of the image, made by Ceph under
the layer's id. Which layer the head is stands in the image's metadata, written after the snapshot that it lies over:

    keep       layer N over the head P ─▶ snapshot P, head = N      (a guest goes on; frozen for the instant where its agent answers)
    go back    layer N over a kept P   ─▶ roll back to P, head = N  (nobody writes; as long as the copying of what differs)
    merge      N into P                ─▶ snapshot P goes; the head, or the snapshot, that was N is P

The controller's rows say what is below; the head's name only tells whether a verb was done. So each verb may be repeated after a cut at
any point, and keeping never goes back, whatever an attempt that was cut off left behind. A rollback that was cut leaves an image that is
neither the one nor the other: the mark that is set before it and goes after it keeps every guest from it until somebody goes back again.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from trimtab_agent.hypervisor.kvm import block_pools
from trimtab_agent.hypervisor.kvm.block_pools import Run, run_command
from trimtab_agent.hypervisor.kvm.identifiers import check_id
from trimtab_protos.errors import Conflict, InvalidRequest, NotFound
from trimtab_protos.messages import PoolKind, PoolSpec

HEAD_KEY, HALF_KEY = "trimtab.layer", "trimtab.rolling-back"
BOTTOM = "bottom"
"""Name of the layer that has no id."""
_FLOOR_BYTES_S = 4 << 20
"""A cluster slower than this is broken; bounds how long a rollback may take."""


def has_layers(pool: PoolSpec) -> bool:
    return pool.kind is PoolKind.RBD


@dataclass(frozen=True, slots=True)
class Image:
    """One image of a pool, and how commands about it are run."""

    volume_id: str
    pool: PoolSpec
    secret: bytes | None
    run: Run = run_command

    def head(self) -> str:
        """Return the layer that is written to."""
        return self._marks().get(HEAD_KEY, "")

    def refuse_half(self) -> None:
        """Raise Conflict where a rollback was begun and not ended: what the image holds is no state that it ever had."""
        if HALF_KEY in self._marks():
            raise Conflict(
                "rollback-unfinished",
                f"volume {self.volume_id} was cut off while it went back to a snapshot, and holds half of either; "
                "`trimtab vm snapshot revert` once more makes it whole",
                volume_id=self.volume_id,
            )

    def _marks(self) -> dict[str, str]:
        return {key: str(value) for key, value in json.loads(self._ask("image-meta", "list", "--format", "json") or "{}").items()}

    def snapshots(self) -> dict[str, int]:
        """Return {name of a layer that is a snapshot: bytes of the image then}."""
        return {one["name"]: int(one["size"]) for one in json.loads(self._ask("snap", "ls", "--format", "json"))}

    def keep(self, over: str, layer_id: str) -> None:
        """Keep what was written until now as layer `over`; what is written from now on is `layer_id`."""
        head = self.head()
        if head == layer_id:
            return
        kept = self.snapshots()
        if _name(over) in kept and head != over:
            # The rows say that `over` is written to: a snapshot of that name is of an attempt that was given up.
            self._drop(over, kept)
            kept = {}
        if _name(over) not in kept:
            self._ask("snap", "create", "--no-progress", snapshot=over)
        self._set_head(layer_id)

    def go_back(self, over: str, layer_id: str) -> None:
        """Have the image hold what layer `over` keeps, and be `layer_id` from now on. NotFound: nothing is kept of it."""
        marks = self._marks()
        if marks.get(HEAD_KEY, "") == layer_id and HALF_KEY not in marks:
            return
        kept = self.snapshots()
        if _name(over) not in kept:
            known = ", ".join(sorted(kept)) or "it has none"
            message = f"volume {self.volume_id} has no layer {_name(over)} to go back to; its layers: {known}"
            raise NotFound("layer-not-found", message, volume_id=self.volume_id)
        self._ask("image-meta", "set", after=(HALF_KEY, check_id(layer_id, "layer_id")))
        seconds = 60 + kept[_name(over)] / _FLOOR_BYTES_S
        patient = replace(self, run=partial(run_command, timeout_s=seconds)) if self.run is run_command else self
        patient._ask("snap", "rollback", "--no-progress", snapshot=over)
        self._set_head(layer_id)
        self._ask("image-meta", "remove", after=(HALF_KEY,))

    def merge(self, top: str, base: str) -> None:
        """Give up what only `base` is needed for: what was `top` is `base`."""
        head, kept = self.head(), self.snapshots()
        is_frozen = _name(top) in kept
        if head in {top, base}:
            self._drop(base, kept)
            if head == top:
                self._drop(top, kept)
                self._set_head(base)
        elif is_frozen:
            self._drop(base, kept)
            self._ask("snap", "rename", "--", self._spec(top), self._spec(base), names_itself=True)

    def delete(self, layer_id: str) -> None:
        """Give up a snapshot. Conflict: it is what is written to."""
        if not layer_id:
            raise InvalidRequest("layer-missing", "the bottom layer of a volume goes with the volume", field="layer_id")
        if self.head() == layer_id:
            raise Conflict("layer-in-use", f"layer {layer_id} of volume {self.volume_id} is what its vm writes to")
        self._drop(layer_id, self.snapshots())

    def _drop(self, layer_id: str, kept: dict[str, int]) -> None:
        if _name(layer_id) in kept:
            self._ask("snap", "rm", "--no-progress", snapshot=layer_id)

    def _set_head(self, layer_id: str) -> None:
        if layer_id:
            self._ask("image-meta", "set", after=(HEAD_KEY, check_id(layer_id, "layer_id")))
        elif self.head():
            self._ask("image-meta", "remove", after=(HEAD_KEY,))

    def _ask(self, *words: str, snapshot: str | None = None, after: Sequence[str] = (), names_itself: bool = False) -> str:
        named = () if names_itself else ("--", self._spec(snapshot), *after)
        return block_pools.ask_rbd((*words, *named), self.pool, self.secret, self.run)

    def _spec(self, snapshot: str | None) -> str:
        image = block_pools.rbd_image(self.pool, self.volume_id)
        return image if snapshot is None else f"{image}@{_name(snapshot)}"


def _name(layer_id: str) -> str:
    return check_id(layer_id, "layer_id") if layer_id else BOTTOM
