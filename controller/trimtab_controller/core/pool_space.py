"""How much may be claimed at one place of a pool. One formula for placement's snapshot and for the claims that rows are written by."""


def claim_limit_bytes(
    *, capacity_bytes: int, available_bytes: int, claimed_bytes: int, written_bytes: int | None, reserve_permille: int
) -> int:
    """Return the most that may be claimed at the place in all; less than what is claimed where others have filled it since.

    Claims count the full size of sparse files. What our volumes have written lies within their claims, so what may be claimed is
    that and what is available: whatever else is taken was written by others, and does not come back. `written_bytes` is None where
    nobody can tell what is ours; then all that is claimed is taken as written, which is too much while volumes are sparse.
    """
    ours_bytes = claimed_bytes if written_bytes is None else min(written_bytes, claimed_bytes)
    return min(capacity_bytes, ours_bytes + available_bytes) - capacity_bytes * reserve_permille // 1000
