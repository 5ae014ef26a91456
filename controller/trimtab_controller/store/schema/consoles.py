"""Sessions at guests' consoles, from the token that opens one to its end."""

import sqlalchemy as sa

from trimtab_controller.store.schema.base import UtcDateTime, created_at, id_column, metadata, ref

console = sa.Table(
    "console",
    metadata,
    id_column(),
    ref("project_id", "project.id"),
    ref("vm_id", "vm.id"),
    # Not a reference: the trail of a session outlives its user's token.
    sa.Column("token_id", sa.String(40), nullable=False),
    sa.Column("actor", sa.String(80), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    # Where the vm was when the token was made: it opens no console of a vm that moved or started anew.
    sa.Column("host_id", sa.String(40), nullable=False),
    sa.Column("epoch", sa.BigInteger(), nullable=False),
    sa.Column("secret_sha256", sa.String(64), nullable=False),
    sa.Column("expires_at", UtcDateTime(), nullable=False),
    # Set by the one use of the token.
    sa.Column("opened_at", UtcDateTime()),
    sa.Column("closed_at", UtcDateTime()),
    sa.Column("cause", sa.String(40), nullable=False, server_default=""),
    created_at(),
    sa.CheckConstraint("kind IN ('serial', 'vnc')", name="kind"),
)
sa.Index("ix_console_created_at", console.c.created_at)
