"""What becomes of a vm whose pool is not usable on its host, and what its owner can do. Pure."""

USABLE = "ready"
UNRESPONSIVE = "unresponsive"


def way_back(
    name: str, *, state: str, reason: str, pool_state: str, is_usable_elsewhere: bool, is_wished_paused: bool = False
) -> str:
    """Return the sentence for one vm; "" where nothing is wrong for it.

    `is_wished_paused`: an operator asked for the pause.
    `pool_state`: the pool's on the vm's home ("" for a vm without one); `state`, `reason`: of the vm as it was observed.
    """
    if reason == "io_error" and is_wished_paused:
        return f"paused by a failed write, and as was asked since; `trimtab vm resume {name}` when the pool has room and answers"
    if reason == "io_error":
        return "paused by a failed write; it resumes by itself when the pool has room and answers"
    if pool_state in {"", USABLE}:
        return ""
    if state in {"running", "stopping", "paused", "unknown"}:
        here = (
            "it waits for the storage and goes on when that answers"
            if pool_state == UNRESPONSIVE
            else "it has its disks open still, and does not start here again until the pool is back"
        )
        return (
            f"{here}; sooner: `trimtab vm stop {name} --force`, then `trimtab vm start {name}`" if is_usable_elsewhere else here
        )
    if is_usable_elsewhere:
        return f"`trimtab vm start {name}` starts it on a host that reaches the pool"
    return f"it starts when the pool is back; a backup restores it elsewhere: `trimtab backup list --vm {name}`"
