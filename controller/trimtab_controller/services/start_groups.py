"""Start groups: a name within a project that vms share; after a loss they start in order. No row stands for one: it is its members."""

from trimtab_protos.errors import InvalidRequest

NONE = ("", 0)


def place(start_group: str | None, start_order: int | None, *, before: tuple[str, int] = NONE) -> tuple[str, int]:
    """Return the group and order of a vm that was asked to have these; None leaves as it is, '' takes it out of its group.

    InvalidRequest for an order of a vm that is in no group.
    """
    group = before[0] if start_group is None else start_group
    if group:
        return group, before[1] if start_order is None else start_order
    if start_order is not None:
        raise InvalidRequest(
            "start-order-alone",
            "start_order: it is the order within a start group; name the group too: `--start-group NAME --start-order N`",
            field="start_order",
        )
    return NONE
