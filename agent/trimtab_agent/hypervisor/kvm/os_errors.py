"""Turns failed calls on files into the ten kinds. Apart from libvirt's errors, so that paths need no libvirt."""

import errno

from trimtab_protos.errors import Internal, InvalidRequest, NoCapacity, NotFound, TrimtabError, Unavailable


def from_os(error: OSError, *, doing: str) -> TrimtabError:
    """Return the error of ours for a failed call on files."""
    context = {"errno": error.errno or 0, "path": str(error.filename or "")}
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return NoCapacity("pool-full", f"could not {doing}: the pool has no room left", **context)
        case errno.ENOENT | errno.ENOTDIR:
            return NotFound("file-not-found", f"could not {doing}: a file or directory is missing", **context)
        case errno.ELOOP:
            return InvalidRequest("symlink-refused", f"could not {doing}: a symbolic link stands in its place", **context)
        case errno.EROFS | errno.EIO | errno.ESTALE:
            return Unavailable("pool-broken", f"could not {doing}: the storage fails ({error.strerror})", **context)
        case _:
            return Internal("storage-error", f"could not {doing}: {error.strerror}", **context)
