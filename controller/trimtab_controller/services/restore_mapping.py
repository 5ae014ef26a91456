"""What a restored vm has here of what it had where it was backed up: pools and networks, by the names that the backup says."""

from collections.abc import Mapping

from sqlalchemy.orm import Session

from trimtab_controller.core.model import Network, Pool, Project
from trimtab_controller.services import networks as network_service
from trimtab_controller.services import pools
from trimtab_controller.store import describe
from trimtab_protos.errors import InvalidRequest, NotFound


def network_for(session: Session, saved: str, renamed: Mapping[str, str], *, project: Project) -> Network:
    """Return the network that a card of network `saved` joins. InvalidRequest `network-not-mapped` where there is none of its name."""
    name = renamed.get(saved, saved)
    try:
        return network_service.find(session, name, project=project)
    except NotFound as error:
        raise InvalidRequest(
            "network-not-mapped",
            f"networks: project {project.name} sees no network {name} here; say which one its card joins: `--network {saved}=NETWORK`",
            field="networks",
        ) from error


def pool_for(session: Session, saved: str, renamed: Mapping[str, str]) -> Pool:
    """Return the pool that a disk of pool `saved` goes to. InvalidRequest `pool-not-mapped` where there is none of its name."""
    name = renamed.get(saved, saved)
    try:
        found = pools.find(session, name)
        # What is restored is a file: unless it was told where to go, it goes where files go by default.
        if name == saved and found.kind in describe.BLOCK_KINDS:
            return _of_files(session, saved)
        return pools.choose(session, name)
    except NotFound as error:
        raise InvalidRequest(
            "pool-not-mapped",
            f"pools: there is no pool {name} here; say where its disks go: `--pool {saved}=POOL`",
            field="pools",
        ) from error


def _of_files(session: Session, saved: str) -> Pool:
    try:
        return pools.choose(session, "")
    except InvalidRequest as error:
        raise InvalidRequest(
            "pool-not-mapped",
            f"pools: {saved} holds no files, which restored disks are, and no pool is the default; say where they go: `--pool {saved}=POOL`",
            field="pools",
        ) from error
