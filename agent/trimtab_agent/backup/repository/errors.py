"""What can be wrong with a repository, each as the kind that a caller acts on. The only place that words it."""

from trimtab_protos.errors import (
    AlreadyExists,
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    NoCapacity,
    NotFound,
    PermissionDenied,
    TrimtabError,
    Unavailable,
)

VERIFY = "`trimtab backup verify` lists every backup that needs it; the next backup of the vm repairs what it can"


def blob_missing(name: str) -> NotFound:
    return NotFound("repository-blob-missing", f"the repository has no {name}", blob=name)


def blob_exists(name: str) -> AlreadyExists:
    return AlreadyExists("repository-blob-exists", f"the repository has {name} already", blob=name)


def repository_full(name: str, detail: str) -> NoCapacity:
    return NoCapacity(
        "repository-full",
        "the repository's storage has no room left; backups that were listed are not touched. Make room with "
        "`trimtab backup prune` or more storage, then run the backup again",
        blob=name,
        detail=detail,
    )


def repository_unreachable(name: str, detail: str) -> Unavailable:
    return Unavailable("repository-unreachable", f"the repository's storage fails: {detail}", blob=name)


def repository_refused(name: str, detail: str) -> PermissionDenied:
    return PermissionDenied(
        "repository-access-refused",
        f"the repository's storage refuses this host: {detail}; check owner or credentials",
        blob=name,
    )


def not_a_repository(where: str) -> NotFound:
    return NotFound("repository-not-found", f"{where} holds no repository; `trimtab backup repo create` makes one", where=where)


def repository_exists(where: str) -> AlreadyExists:
    return AlreadyExists(
        "repository-exists", f"{where} holds a repository already; open it or choose an empty place", where=where
    )


def format_unknown(what: str, found: object) -> InvalidRequest:
    return InvalidRequest("repository-format-unknown", f"{what} has format {found}; this agent reads format 1. Update the agent")


def key_malformed(why: str) -> InvalidRequest:
    return InvalidRequest("repository-key-malformed", f"this is no repository key: {why}; it looks like ttk1-…", field="key")


def key_wrong(*, given: str, wanted: str) -> PermissionDenied:
    return PermissionDenied(
        "repository-key-wrong",
        f"the repository is locked with the key {wanted}, the one given is {given}; give the key that was saved when the "
        "repository was created or its key last changed",
        given=given,
        wanted=wanted,
    )


def of_another_fleet(*, found: str, given: str) -> PermissionDenied:
    return PermissionDenied(
        "repository-of-another-fleet",
        f"the repository belongs to the fleet {found}, not to {given}; two fleets never write to one repository. "
        "Restoring from it is possible read-only: `trimtab backup repo rebuild --read-only`",
        found=found,
        given=given,
    )


def of_another_project(*, found: str, given: str) -> PermissionDenied:
    return PermissionDenied(
        "repository-of-another-project",
        f"the repository keeps backups of the project {found} only, the vm belongs to {given}",
        found=found,
        given=given,
    )


def read_only() -> PermissionDenied:
    return PermissionDenied("repository-read-only", "the repository was opened for reading only")


def damaged(what: str, why: str) -> Conflict:
    return Conflict("repository-damaged", f"{what} is damaged: {why}", what=what)


def chunk_damaged(chunk: bytes, pack: str, why: str) -> Conflict:
    return Conflict("chunk-damaged", f"a part of the backup is damaged: {why} ({pack}); {VERIFY}", chunk=chunk.hex(), pack=pack)


def chunk_missing(chunk: bytes) -> Conflict:
    return Conflict(
        "chunk-missing",
        f"a part of the backup is in no pack of the repository; `trimtab backup repo rebuild` reads the packs anew, {VERIFY}",
        chunk=chunk.hex(),
    )


def index_damaged(names: list[str]) -> Conflict:
    return Conflict(
        "repository-index-damaged",
        f"{len(names)} index file(s) cannot be read; nothing is pruned before `trimtab backup repo rebuild` has written them anew",
        first=names[0] if names else "",
    )


def manifests_damaged(names: list[str]) -> Conflict:
    return Conflict(
        "repository-manifest-damaged",
        f"{len(names)} manifest(s) cannot be read, so what they need is unknown; nothing is pruned before each of them is "
        "repaired or removed with `trimtab backup delete --damaged`",
        first=names[0] if names else "",
    )


def backup_missing(backup_id: str) -> NotFound:
    return NotFound("backup-not-found", f"the repository has no backup {backup_id}", backup_id=backup_id)


def backup_exists(backup_id: str) -> AlreadyExists:
    return AlreadyExists("backup-exists", f"another backup is listed as {backup_id}", backup_id=backup_id)


def session_revoked(backup_id: str) -> Conflict:
    return Conflict(
        "backup-session-revoked",
        f"the backup {backup_id} was silent for so long that prune ended it; run the backup again",
        backup_id=backup_id,
    )


def commit_unknown(backup_id: str, detail: str) -> DeadlineExceeded:
    return DeadlineExceeded(
        "backup-commit-unknown",
        f"whether {backup_id} was listed is not known: {detail}; list the backups, then decide",
        backup_id=backup_id,
    )


def prune_busy(holder: str) -> Conflict:
    return Conflict("prune-is-running", f"{holder} prunes this repository now; try again when it has ended", holder=holder)


def is_damage(error: TrimtabError) -> bool:
    """Tell whether a chunk cannot be had any more, in contrast to storage that fails for now."""
    return error.code in {"chunk-damaged", "chunk-missing", "repository-damaged", "repository-blob-missing"}
