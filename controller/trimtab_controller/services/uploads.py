"""Who may read an upload: only a host that a live import has told to."""

from trimtab_controller.services import job_updates
from trimtab_controller.store import operations
from trimtab_controller.store.database import Session
from trimtab_protos.errors import NotFound

_LIVE_IMPORTS_MAX = 1000


def check_reader(session: Session, upload_id: str, host_id: str) -> None:
    """Raise NotFound unless a live `image.import` refers to the upload and concerns the host: others learn nothing."""
    live = operations.page(session, limit=_LIVE_IMPORTS_MAX, kind="image.import", is_done=False)
    for operation in live:
        if job_updates.names(operation.params, upload_id) and job_updates.concerns_host(session, operation, host_id):
            return
    raise NotFound("upload-not-found", "no import of this host refers to such an upload", upload_id=upload_id)
