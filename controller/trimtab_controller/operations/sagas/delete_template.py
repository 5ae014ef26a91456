"""template.delete: a revision of a template goes, and its image from every pool.

| step   | do                                                           | undo                          |
|--------|--------------------------------------------------------------|-------------------------------|
| own    | refuse if a volume stands on the image, else hide both (pivot) | - from here on only forward   |
| remove | delete every replica, and what a copy left half-done          | -                             |
| finish | forget the replicas                                           | - last                        |
"""

from dataclasses import dataclass

from trimtab_controller.operations.saga import Saga, Transaction, effect, transaction
from trimtab_controller.operations.sagas import delete_image
from trimtab_controller.store import image_replicas, images, reach, templates
from trimtab_protos.errors import Conflict


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    template_id: str
    image_id: str


def _own(context: Transaction[Params]) -> None:
    """Hidden in the transaction that looked, so that no vm is made of it from now on."""
    clones = images.dependants(context.session, context.params.image_id)
    if clones:
        raise Conflict("template-in-use", f"the template is the base of volumes {', '.join(clones)}")
    templates.hide(context.session, context.params.template_id, now=context.now)
    reach.hide_image(context.session, context.params.image_id, now=context.now)


def _finish(context: Transaction[Params]) -> None:
    image_replicas.remove(context.session, context.params.image_id)


SAGA = Saga(
    name="template.delete",
    version=1,
    params=Params,
    steps=(
        transaction("own", _own, None, because="from here on only forward", pivot=True),
        effect("remove", delete_image.remove_replicas, None, because="past the pivot"),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
