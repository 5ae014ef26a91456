"""Projects, users, tokens, roles and the audit trail."""

import sqlalchemy as sa

from trimtab_controller.store.schema.base import (
    BigInt,
    Json,
    UtcDateTime,
    created_at,
    deleted_at,
    id_column,
    metadata,
    ref,
    unique_among_live,
    version,
)

project = sa.Table(
    "project",
    metadata,
    id_column(),
    sa.Column("name", sa.String(63), nullable=False),
    # Quotas: NULL is unlimited. Used figures move by conditional UPDATE in the transaction that inserts what they guard.
    sa.Column("vms_quota", sa.Integer()),
    sa.Column("vcpus_quota", sa.Integer()),
    sa.Column("memory_mib_quota", sa.BigInteger()),
    sa.Column("disk_bytes_quota", sa.BigInteger()),
    sa.Column("snapshots_quota", sa.Integer()),
    sa.Column("floating_quota", sa.Integer()),
    sa.Column("vms_used", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("vcpus_used", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("memory_mib_used", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("disk_bytes_used", sa.BigInteger(), nullable=False, server_default="0"),
    # Of the project's vms, without those that a clone needs for a while.
    sa.Column("snapshots_used", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("floating_used", sa.Integer(), nullable=False, server_default="0"),
    version(),
    created_at(),
    deleted_at(),
    sa.CheckConstraint(
        "vms_used >= 0 AND vcpus_used >= 0 AND memory_mib_used >= 0 AND disk_bytes_used >= 0", name="used_not_negative"
    ),
)
unique_among_live("uq_project_name_live", project.c.name)

user = sa.Table(
    "user_account",
    metadata,
    id_column(),
    sa.Column("name", sa.String(63), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),  # user, service
    sa.Column("disabled_at", UtcDateTime()),
    version(),
    created_at(),
    deleted_at(),
    sa.CheckConstraint("kind IN ('user', 'service')", name="kind"),
)
unique_among_live("uq_user_account_name_live", user.c.name)

role_binding = sa.Table(
    "role_binding",
    metadata,
    ref("user_id", "user_account.id", primary_key=True),
    # '' binds the role on every project and on the fleet itself.
    sa.Column("project_id", sa.String(40), primary_key=True, nullable=False),
    sa.Column("role", sa.String(16), nullable=False),
    created_at(),
    sa.CheckConstraint("role IN ('viewer', 'operator', 'admin')", name="role"),
)

token = sa.Table(
    "token",
    metadata,
    id_column(),
    ref("user_id", "user_account.id"),
    sa.Column("name", sa.String(63), nullable=False),
    # SHA-256 of the secret part; the secret has 256 random bits, so a slow hash would add nothing.
    sa.Column("secret_sha256", sa.String(64), nullable=False),
    sa.Column("expires_at", UtcDateTime()),
    sa.Column("last_used_at", UtcDateTime()),
    sa.Column("revoked_at", UtcDateTime()),
    created_at(),
)
sa.Index("ix_token_user_id", token.c.user_id)

audit = sa.Table(
    "audit",
    metadata,
    sa.Column("seq", BigInt, primary_key=True, autoincrement=True),
    sa.Column("at", UtcDateTime(), nullable=False),
    sa.Column("actor", sa.String(80), nullable=False),
    sa.Column("request_id", sa.String(64), nullable=False),
    sa.Column("project_id", sa.String(40), nullable=False, server_default=""),
    sa.Column("verb", sa.String(80), nullable=False),
    sa.Column("resource", sa.String(200), nullable=False),
    sa.Column("outcome", sa.String(16), nullable=False),  # accepted, denied, failed
    sa.Column("cause", sa.String(200), nullable=False, server_default=""),
    sa.Column("context", Json, nullable=False),
    # Set when the leader seals a batch: SHA-256 over the previous hash and this row.
    sa.Column("chain_sha256", sa.String(64)),
)
sa.Index("ix_audit_at", audit.c.at)
sa.Index(
    "ix_audit_unsealed",
    audit.c.seq,
    sqlite_where=sa.text("chain_sha256 IS NULL"),
    postgresql_where=sa.text("chain_sha256 IS NULL"),
)
