"""image.delete: an image that no volume stands on goes from every pool.

| step   | do                                                          | undo                          |
|--------|-------------------------------------------------------------|-------------------------------|
| own    | refuse if a volume stands on it, else hide it (pivot)        | - from here on only forward   |
| remove | delete every replica, and what a copy left half-done         | -                             |
| finish | forget the replicas                                          | - last                        |

A host that has a replica and does not answer is waited for: bytes that nobody knows of would stay there for ever.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, effect, transaction
from trimtab_controller.store import describe, image_replicas, images, reach, templates
from trimtab_protos.errors import Conflict, Unavailable


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    image_id: str


def _own(context: Transaction[Params]) -> None:
    """Hidden in the transaction that looked, so that no volume is made on it from now on."""
    clones = images.dependants(context.session, context.params.image_id)
    if clones:
        raise Conflict("image-in-use", f"the image is the base of volumes {', '.join(clones)}")
    template = templates.of_image(context.session, context.params.image_id)
    if template is not None:
        raise Conflict("image-in-use", f"the image belongs to template {template.name}")
    reach.hide_image(context.session, context.params.image_id, now=context.now)


def remove_replicas(context: Effect[Any]) -> Json:
    image = context.read(partial(describe.get_image, image_id=context.params.image_id))
    removed = []
    for replica in context.read(partial(image_replicas.of_image, image_id=image.id)):
        pool = context.read(partial(describe.get_pool, pool_id=replica.pool_id))
        ready = [host.id for host in context.read(partial(reach.ready_hosts, pool_id=pool.id))]
        host_id = replica.host_id if replica.host_id in ready else "" if replica.host_id else next(iter(ready), "")
        if not host_id:
            raise Unavailable("replica-unreachable", f"no host that is up reaches image {image.name} in pool {pool.name}")
        key = context.key(subject_id=image.id, part=f"{pool.id}-{replica.host_id}")
        context.agents.delete_image(host_id, key, image.id, describe.stored_format(image), describe.pool_spec(pool))
        removed.append({"pool_id": pool.id, "host_id": replica.host_id})
    return {"replicas": removed}


def _finish(context: Transaction[Params]) -> None:
    image_replicas.remove(context.session, context.params.image_id)


SAGA = Saga(
    name="image.delete",
    version=1,
    params=Params,
    steps=(
        transaction("own", _own, None, because="from here on only forward", pivot=True),
        effect("remove", remove_replicas, None, because="past the pivot"),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
