"""The foundation: every table of the first release, those that later issues fill included."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None

_JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
_SEQUENCE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    _audit()
    _event()
    _host_class()
    _host_token()
    _idempotency()
    _image()
    _lease()
    _network()
    _operation()
    _plan()
    _pool()
    _project()
    _turn()
    _usage_rollup()
    _user_account()
    _host()
    _image_replica()
    _operation_journal()
    _pool_space()
    _role_binding()
    _slot()
    _template()
    _token()
    _upload()
    _vm()
    _vm_group()
    _backup()
    _claim()
    _decision()
    _host_certificate()
    _host_part()
    _lease_revocation()
    _migration()
    _network_host()
    _nic()
    _placement_request()
    _pool_host()
    _snapshot()
    _unmanaged_mac()
    _vm_group_member()
    _volume()
    _checkpoint()
    _disk_claim()
    _nic_address()


def _audit() -> None:
    op.create_table(
        "audit",
        sa.Column("seq", _SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("actor", sa.String(length=80), nullable=False),
        sa.Column("request_id", sa.String(length=64), nullable=False),
        sa.Column("project_id", sa.String(length=40), server_default="", nullable=False),
        sa.Column("verb", sa.String(length=80), nullable=False),
        sa.Column("resource", sa.String(length=200), nullable=False),
        sa.Column("outcome", sa.String(length=16), nullable=False),
        sa.Column("cause", sa.String(length=200), server_default="", nullable=False),
        sa.Column("context", _JSON, nullable=False),
        sa.Column("chain_sha256", sa.String(length=64), nullable=True),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_audit")),
    )
    op.create_index("ix_audit_at", "audit", ["at"], unique=False)
    op.create_index(
        "ix_audit_unsealed",
        "audit",
        ["seq"],
        unique=False,
        sqlite_where=sa.text("chain_sha256 IS NULL"),
        postgresql_where=sa.text("chain_sha256 IS NULL"),
    )


def _event() -> None:
    op.create_table(
        "event",
        sa.Column("seq", _SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("kind", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), server_default="", nullable=False),
        sa.Column("subject_id", sa.String(length=40), nullable=False),
        sa.Column("operation_id", sa.String(length=40), server_default="", nullable=False),
        sa.Column("actor", sa.String(length=80), server_default="", nullable=False),
        sa.Column("message", sa.String(length=500), nullable=False),
        sa.Column("context", _JSON, nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_event")),
    )
    op.create_index("ix_event_at", "event", ["at"], unique=False)
    op.create_index("ix_event_subject", "event", ["subject_id", "seq"], unique=False)


def _host_class() -> None:
    op.create_table(
        "host_class",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("cpu_model", sa.String(length=80), nullable=True),
        sa.Column("machine", sa.String(length=80), nullable=True),
        sa.Column("vcpu_ratio_permille", sa.Integer(), server_default="4000", nullable=False),
        sa.Column("memory_ratio_permille", sa.Integer(), server_default="1000", nullable=False),
        sa.Column("memory_reserve_mib", sa.BigInteger(), server_default="1024", nullable=False),
        sa.Column("policy", sa.String(length=40), server_default="best-fit", nullable=False),
        sa.Column("version", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_host_class")),
    )
    op.create_index(
        "uq_host_class_name_live",
        "host_class",
        ["name"],
        unique=True,
        sqlite_where=sa.text("deleted_at IS NULL"),
        postgresql_where=sa.text("deleted_at IS NULL"),
    )


def _host_token() -> None:
    op.create_table(
        "host_token",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("secret_sha256", sa.String(length=64), nullable=False),
        sa.Column("host_id", sa.String(length=40), nullable=True),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("used_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_by", sa.String(length=80), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_host_token")),
    )


def _idempotency() -> None:
    op.create_table(
        "idempotency",
        sa.Column("actor", sa.String(length=80), nullable=False),
        sa.Column("request_id", sa.String(length=64), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("response", _JSON, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("actor", "request_id", name=op.f("pk_idempotency")),
    )
    op.create_index("ix_idempotency_created_at", "idempotency", ["created_at"], unique=False)


def _image() -> None:
    op.create_table(
        "image",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("format", sa.String(length=16), nullable=False),
        sa.Column("virtual_size_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("file_size_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("source_sha256", sa.String(length=64), server_default="", nullable=False),
        sa.Column("stored_sha256", sa.String(length=64), server_default="", nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("labels", _JSON, nullable=False),
        sa.Column("version", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("state IN ('importing', 'ready', 'failed')", name=op.f("ck_image_state")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_image")),
    )
    op.create_index(
        "uq_image_name_live",
        "image",
        ["project_id", "name"],
        unique=True,
        sqlite_where=sa.text("deleted_at IS NULL"),
        postgresql_where=sa.text("deleted_at IS NULL"),
    )


def _lease() -> None:
    op.create_table(
        "lease",
        sa.Column("name", sa.String(length=80), nullable=False),
        sa.Column("owner", sa.String(length=80), nullable=False),
        sa.Column("term", sa.BigInteger(), nullable=False),
        sa.Column("beat", sa.BigInteger(), nullable=False),
        sa.Column("ttl_ms", sa.Integer(), nullable=False),
        sa.Column("context", _JSON, nullable=False),
        sa.Column("renewed_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_lease")),
    )


def _network() -> None:
    op.create_table(
        "network",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("bridge", sa.String(length=15), server_default="", nullable=False),
        sa.Column("vlan", sa.Integer(), server_default="0", nullable=False),
        sa.Column("mtu", sa.Integer(), server_default="1500", nullable=False),
        sa.Column("subnet", sa.String(length=50), server_default="", nullable=False),
        sa.Column("has_dhcp", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("settings", _JSON, nullable=False),
        sa.Column("version", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("kind IN ('bridge', 'vlan', 'nat', 'isolated', 'overlay')", name=op.f("ck_network_kind")),
        sa.CheckConstraint("mtu BETWEEN 576 AND 65535", name=op.f("ck_network_mtu")),
        sa.CheckConstraint("vlan BETWEEN 0 AND 4094", name=op.f("ck_network_vlan")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_network")),
    )
    op.create_index(
        "uq_network_name_live",
        "network",
        ["project_id", "name"],
        unique=True,
        sqlite_where=sa.text("deleted_at IS NULL"),
        postgresql_where=sa.text("deleted_at IS NULL"),
    )


def _operation() -> None:
    op.create_table(
        "operation",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("kind", sa.String(length=40), nullable=False),
        sa.Column("saga_version", sa.Integer(), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("subject_id", sa.String(length=40), nullable=False),
        sa.Column("subject_name", sa.String(length=63), nullable=False),
        sa.Column("is_exclusive", sa.Boolean(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("params", _JSON, nullable=False),
        sa.Column("priority", sa.Integer(), server_default="0", nullable=False),
        sa.Column("driver", sa.String(length=80), server_default="", nullable=False),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("turn", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("next_run", sa.DateTime(timezone=True), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("step", sa.String(length=40), server_default="", nullable=False),
        sa.Column("is_cancel_requested", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("deadline", sa.DateTime(timezone=True), nullable=True),
        sa.Column("waiting_for", sa.String(length=200), server_default="", nullable=False),
        sa.Column("progress", _JSON, nullable=True),
        sa.Column("error", _JSON, nullable=True),
        sa.Column("result", _JSON, nullable=True),
        sa.Column("actor", sa.String(length=80), nullable=False),
        sa.Column("request_id", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'waiting', 'compensating', 'done', 'failed', 'cancelled', 'needs_attention')",
            name=op.f("ck_operation_state"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_operation")),
    )
    op.create_index(
        "ix_operation_due",
        "operation",
        ["next_run"],
        unique=False,
        sqlite_where=sa.text("state IN ('queued', 'running', 'waiting', 'compensating')"),
        postgresql_where=sa.text("state IN ('queued', 'running', 'waiting', 'compensating')"),
    )
    op.create_index("ix_operation_ended_at", "operation", ["ended_at"], unique=False)
    op.create_index("ix_operation_project", "operation", ["project_id", "id"], unique=False)
    op.create_index("ix_operation_subject", "operation", ["subject_id", "id"], unique=False)
    op.create_index(
        "uq_operation_exclusive",
        "operation",
        ["subject_id"],
        unique=True,
        sqlite_where=sa.text("is_exclusive = 1 AND state IN ('queued', 'running', 'waiting', 'compensating', 'needs_attention')"),
        postgresql_where=sa.text("is_exclusive AND state IN ('queued', 'running', 'waiting', 'compensating', 'needs_attention')"),
    )


def _plan() -> None:
    op.create_table(
        "plan",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("changes", _JSON, nullable=False),
        sa.Column("created_by", sa.String(length=80), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_plan")),
    )


def _pool() -> None:
    op.create_table(
        "pool",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("path", sa.String(length=500), nullable=False),
        sa.Column("is_shared", sa.Boolean(), nullable=False),
        sa.Column("sharing_proven_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("reserve_permille", sa.Integer(), server_default="50", nullable=False),
        sa.Column("settings", _JSON, nullable=False),
        sa.Column("version", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("kind IN ('dir')", name=op.f("ck_pool_kind")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_pool")),
    )
    op.create_index(
        "uq_pool_name_live",
        "pool",
        ["name"],
        unique=True,
        sqlite_where=sa.text("deleted_at IS NULL"),
        postgresql_where=sa.text("deleted_at IS NULL"),
    )


def _project() -> None:
    op.create_table(
        "project",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("vms_quota", sa.Integer(), nullable=True),
        sa.Column("vcpus_quota", sa.Integer(), nullable=True),
        sa.Column("memory_mib_quota", sa.BigInteger(), nullable=True),
        sa.Column("disk_bytes_quota", sa.BigInteger(), nullable=True),
        sa.Column("vms_used", sa.Integer(), server_default="0", nullable=False),
        sa.Column("vcpus_used", sa.Integer(), server_default="0", nullable=False),
        sa.Column("memory_mib_used", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("disk_bytes_used", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("version", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "vms_used >= 0 AND vcpus_used >= 0 AND memory_mib_used >= 0 AND disk_bytes_used >= 0",
            name=op.f("ck_project_used_not_negative"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_project")),
    )
    op.create_index(
        "uq_project_name_live",
        "project",
        ["name"],
        unique=True,
        sqlite_where=sa.text("deleted_at IS NULL"),
        postgresql_where=sa.text("deleted_at IS NULL"),
    )


def _turn() -> None:
    op.create_table(
        "turn",
        sa.Column("subject_id", sa.String(length=40), nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("subject_id", name=op.f("pk_turn")),
    )


def _usage_rollup() -> None:
    op.create_table(
        "usage_rollup",
        sa.Column("subject_id", sa.String(length=40), nullable=False),
        sa.Column("metric", sa.String(length=40), nullable=False),
        sa.Column("bucket_s", sa.Integer(), nullable=False),
        sa.Column("bucket_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("mean", sa.Float(), nullable=False),
        sa.Column("peak", sa.Float(), nullable=False),
        sa.Column("samples", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("subject_id", "metric", "bucket_s", "bucket_at", name=op.f("pk_usage_rollup")),
    )
    op.create_index("ix_usage_rollup_bucket_at", "usage_rollup", ["bucket_at"], unique=False)


def _user_account() -> None:
    op.create_table(
        "user_account",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("disabled_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("version", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("kind IN ('user', 'service')", name=op.f("ck_user_account_kind")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_user_account")),
    )
    op.create_index(
        "uq_user_account_name_live",
        "user_account",
        ["name"],
        unique=True,
        sqlite_where=sa.text("deleted_at IS NULL"),
        postgresql_where=sa.text("deleted_at IS NULL"),
    )


def _host() -> None:
    op.create_table(
        "host",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("host_class_id", sa.String(length=40), nullable=False),
        sa.Column("labels", _JSON, nullable=False),
        sa.Column("is_cordoned", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("agent_address", sa.String(length=200), nullable=False),
        sa.Column("migration_address", sa.String(length=80), nullable=False),
        sa.Column("machine_id", sa.String(length=64), nullable=False),
        sa.Column("smbios_uuid", sa.String(length=64), nullable=False),
        sa.Column("connectivity", sa.String(length=16), nullable=False),
        sa.Column("connectivity_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("boot_id", sa.String(length=64), server_default="", nullable=False),
        sa.Column("incarnation", sa.String(length=64), server_default="", nullable=False),
        sa.Column("lease_number", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("inventory", _JSON, nullable=True),
        sa.Column("inventory_digest", sa.String(length=64), server_default="", nullable=False),
        sa.Column("inventory_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("generation", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("vcpus_limit", sa.Integer(), server_default="0", nullable=False),
        sa.Column("memory_limit_mib", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("vcpus_claimed", sa.Integer(), server_default="0", nullable=False),
        sa.Column("memory_claimed_mib", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("unmanaged_vcpus", sa.Integer(), server_default="0", nullable=False),
        sa.Column("unmanaged_memory_mib", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("version", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("connectivity IN ('new', 'up', 'suspect', 'lost', 'fenced')", name=op.f("ck_host_connectivity")),
        sa.CheckConstraint("memory_claimed_mib >= 0 AND memory_claimed_mib <= memory_limit_mib", name=op.f("ck_host_memory")),
        sa.CheckConstraint("vcpus_claimed >= 0 AND vcpus_claimed <= vcpus_limit", name=op.f("ck_host_vcpus")),
        sa.ForeignKeyConstraint(["host_class_id"], ["host_class.id"], name=op.f("fk_host_host_class_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_host")),
    )
    op.create_index(
        "uq_host_machine_id_live",
        "host",
        ["machine_id"],
        unique=True,
        sqlite_where=sa.text("deleted_at IS NULL"),
        postgresql_where=sa.text("deleted_at IS NULL"),
    )
    op.create_index(
        "uq_host_name_live",
        "host",
        ["name"],
        unique=True,
        sqlite_where=sa.text("deleted_at IS NULL"),
        postgresql_where=sa.text("deleted_at IS NULL"),
    )
    op.create_index(
        "uq_host_smbios_uuid_live",
        "host",
        ["smbios_uuid"],
        unique=True,
        sqlite_where=sa.text("deleted_at IS NULL"),
        postgresql_where=sa.text("deleted_at IS NULL"),
    )


def _image_replica() -> None:
    op.create_table(
        "image_replica",
        sa.Column("image_id", sa.String(length=40), nullable=False),
        sa.Column("pool_id", sa.String(length=40), nullable=False),
        sa.Column("host_id", sa.String(length=40), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("owner_operation_id", sa.String(length=40), server_default="", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("state IN ('copying', 'ready', 'deleting')", name=op.f("ck_image_replica_state")),
        sa.ForeignKeyConstraint(["image_id"], ["image.id"], name=op.f("fk_image_replica_image_id")),
        sa.ForeignKeyConstraint(["pool_id"], ["pool.id"], name=op.f("fk_image_replica_pool_id")),
        sa.PrimaryKeyConstraint("image_id", "pool_id", "host_id", name=op.f("pk_image_replica")),
    )


def _operation_journal() -> None:
    op.create_table(
        "operation_journal",
        sa.Column("operation_id", sa.String(length=40), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("step", sa.String(length=40), nullable=False),
        sa.Column("direction", sa.String(length=8), nullable=False),
        sa.Column("outcome", sa.String(length=16), nullable=False),
        sa.Column("turn", sa.BigInteger(), nullable=False),
        sa.Column("result", _JSON, nullable=True),
        sa.Column("error", _JSON, nullable=True),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("direction IN ('do', 'undo')", name=op.f("ck_operation_journal_direction")),
        sa.CheckConstraint("outcome IN ('succeeded', 'failed')", name=op.f("ck_operation_journal_outcome")),
        sa.ForeignKeyConstraint(["operation_id"], ["operation.id"], name=op.f("fk_operation_journal_operation_id")),
        sa.PrimaryKeyConstraint("operation_id", "position", name=op.f("pk_operation_journal")),
        sa.UniqueConstraint(
            "operation_id", "step", "direction", "outcome", name=op.f("uq_operation_journal_operation_id_step_direction_outcome")
        ),
    )


def _pool_space() -> None:
    op.create_table(
        "pool_space",
        sa.Column("pool_id", sa.String(length=40), nullable=False),
        sa.Column("host_id", sa.String(length=40), nullable=False),
        sa.Column("capacity_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("available_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("claimed_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("observed_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("claimed_bytes >= 0", name=op.f("ck_pool_space_claimed_not_negative")),
        sa.ForeignKeyConstraint(["pool_id"], ["pool.id"], name=op.f("fk_pool_space_pool_id")),
        sa.PrimaryKeyConstraint("pool_id", "host_id", name=op.f("pk_pool_space")),
    )


def _role_binding() -> None:
    op.create_table(
        "role_binding",
        sa.Column("user_id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("role", sa.String(length=16), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("role IN ('viewer', 'operator', 'admin')", name=op.f("ck_role_binding_role")),
        sa.ForeignKeyConstraint(["user_id"], ["user_account.id"], name=op.f("fk_role_binding_user_id")),
        sa.PrimaryKeyConstraint("user_id", "project_id", name=op.f("pk_role_binding")),
    )


def _slot() -> None:
    op.create_table(
        "slot",
        sa.Column("host_id", sa.String(length=40), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("operation_id", sa.String(length=40), nullable=False),
        sa.ForeignKeyConstraint(["operation_id"], ["operation.id"], name=op.f("fk_slot_operation_id")),
        sa.PrimaryKeyConstraint("host_id", "kind", "number", name=op.f("pk_slot")),
    )
    op.create_index("ix_slot_operation_id", "slot", ["operation_id"], unique=False)


def _template() -> None:
    op.create_table(
        "template",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("revision", sa.Integer(), server_default="1", nullable=False),
        sa.Column("image_id", sa.String(length=40), nullable=False),
        sa.Column("settings", _JSON, nullable=False),
        sa.Column("version", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["image_id"], ["image.id"], name=op.f("fk_template_image_id")),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name=op.f("fk_template_project_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_template")),
    )
    op.create_index(
        "uq_template_name_live",
        "template",
        ["project_id", "name", "revision"],
        unique=True,
        sqlite_where=sa.text("deleted_at IS NULL"),
        postgresql_where=sa.text("deleted_at IS NULL"),
    )


def _token() -> None:
    op.create_table(
        "token",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("user_id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("secret_sha256", sa.String(length=64), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["user_account.id"], name=op.f("fk_token_user_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_token")),
    )
    op.create_index("ix_token_user_id", "token", ["user_id"], unique=False)


def _upload() -> None:
    op.create_table(
        "upload",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("gateway_address", sa.String(length=200), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), server_default="", nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name=op.f("fk_upload_project_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_upload")),
    )


def _vm() -> None:
    op.create_table(
        "vm",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("uuid", sa.String(length=36), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("labels", _JSON, nullable=False),
        sa.Column("origin", sa.String(length=16), server_default="created", nullable=False),
        sa.Column("arch", sa.String(length=16), nullable=False),
        sa.Column("machine", sa.String(length=80), server_default="", nullable=False),
        sa.Column("cpu_model", sa.String(length=80), server_default="", nullable=False),
        sa.Column("cpu_features", _JSON, nullable=False),
        sa.Column("vcpus", sa.Integer(), nullable=False),
        sa.Column("vcpus_max", sa.Integer(), nullable=False),
        sa.Column("memory_mib", sa.BigInteger(), nullable=False),
        sa.Column("memory_max_mib", sa.BigInteger(), nullable=False),
        sa.Column("firmware", sa.String(length=8), nullable=False),
        sa.Column("has_secure_boot", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("nvram_pool_id", sa.String(length=40), server_default="", nullable=False),
        sa.Column("device_addresses", _JSON, nullable=False),
        sa.Column("image_id", sa.String(length=40), nullable=True),
        sa.Column("template_id", sa.String(length=40), nullable=True),
        sa.Column("seed", _JSON, nullable=False),
        sa.Column("host_selector", _JSON, nullable=False),
        sa.Column("host_class", sa.String(length=63), server_default="", nullable=False),
        sa.Column("ha", sa.String(length=16), server_default="none", nullable=False),
        sa.Column("priority", sa.Integer(), server_default="0", nullable=False),
        sa.Column("drain_policy", sa.String(length=16), server_default="migrate", nullable=False),
        sa.Column("desired_power", sa.String(length=16), nullable=False),
        sa.Column("host_id", sa.String(length=40), server_default="", nullable=False),
        sa.Column("epoch", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("observed_state", sa.String(length=16), nullable=False),
        sa.Column("observed_reason", sa.String(length=32), server_default="", nullable=False),
        sa.Column("observed_host_id", sa.String(length=40), server_default="", nullable=False),
        sa.Column("observed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("observed_addresses", _JSON, nullable=False),
        sa.Column("problem", sa.String(length=1000), server_default="", nullable=False),
        sa.Column("version", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("purge_after", sa.DateTime(timezone=True), nullable=True),
        sa.Column("purged_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("desired_power IN ('running', 'stopped', 'paused', 'deleted')", name=op.f("ck_vm_desired_power")),
        sa.CheckConstraint("firmware IN ('bios', 'uefi')", name=op.f("ck_vm_firmware")),
        sa.CheckConstraint("ha IN ('restart', 'none')", name=op.f("ck_vm_ha")),
        sa.CheckConstraint("memory_mib >= 16 AND memory_max_mib >= memory_mib", name=op.f("ck_vm_memory")),
        sa.CheckConstraint("vcpus BETWEEN 1 AND 1024 AND vcpus_max >= vcpus", name=op.f("ck_vm_vcpus")),
        sa.ForeignKeyConstraint(["image_id"], ["image.id"], name=op.f("fk_vm_image_id")),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name=op.f("fk_vm_project_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_vm")),
        sa.UniqueConstraint("uuid", name=op.f("uq_vm_uuid")),
    )
    op.create_index("ix_vm_host_id", "vm", ["host_id"], unique=False)
    op.create_index(
        "uq_vm_name_live",
        "vm",
        ["project_id", "name"],
        unique=True,
        sqlite_where=sa.text("deleted_at IS NULL"),
        postgresql_where=sa.text("deleted_at IS NULL"),
    )


def _vm_group() -> None:
    op.create_table(
        "vm_group",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("rule", _JSON, nullable=False),
        sa.Column("generation", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("version", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name=op.f("fk_vm_group_project_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_vm_group")),
    )
    op.create_index(
        "uq_vm_group_name_live",
        "vm_group",
        ["project_id", "name"],
        unique=True,
        sqlite_where=sa.text("deleted_at IS NULL"),
        postgresql_where=sa.text("deleted_at IS NULL"),
    )


def _backup() -> None:
    op.create_table(
        "backup",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("vm_id", sa.String(length=40), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("manifest", _JSON, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name=op.f("fk_backup_project_id")),
        sa.ForeignKeyConstraint(["vm_id"], ["vm.id"], name=op.f("fk_backup_vm_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_backup")),
    )


def _claim() -> None:
    op.create_table(
        "claim",
        sa.Column("vm_id", sa.String(length=40), nullable=False),
        sa.Column("host_id", sa.String(length=40), nullable=False),
        sa.Column("role", sa.String(length=16), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("vcpus", sa.Integer(), nullable=False),
        sa.Column("memory_mib", sa.BigInteger(), nullable=False),
        sa.Column("operation_id", sa.String(length=40), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("role IN ('home', 'target')", name=op.f("ck_claim_role")),
        sa.CheckConstraint("vcpus >= 0 AND memory_mib >= 0", name=op.f("ck_claim_not_negative")),
        sa.ForeignKeyConstraint(["host_id"], ["host.id"], name=op.f("fk_claim_host_id")),
        sa.ForeignKeyConstraint(["vm_id"], ["vm.id"], name=op.f("fk_claim_vm_id")),
        sa.PrimaryKeyConstraint("vm_id", "host_id", name=op.f("pk_claim")),
    )
    op.create_index("ix_claim_host_id", "claim", ["host_id"], unique=False)
    op.create_index("uq_claim_vm_role", "claim", ["vm_id", "role"], unique=True)


def _decision() -> None:
    op.create_table(
        "decision",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("vm_id", sa.String(length=40), nullable=False),
        sa.Column("operation_id", sa.String(length=40), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("chosen_host_id", sa.String(length=40), server_default="", nullable=False),
        sa.Column("policy", sa.String(length=40), nullable=False),
        sa.Column("verdicts", _JSON, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["vm_id"], ["vm.id"], name=op.f("fk_decision_vm_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_decision")),
    )
    op.create_index("ix_decision_created_at", "decision", ["created_at"], unique=False)
    op.create_index("ix_decision_vm_id", "decision", ["vm_id", "created_at"], unique=False)


def _host_certificate() -> None:
    op.create_table(
        "host_certificate",
        sa.Column("serial", sa.String(length=64), nullable=False),
        sa.Column("host_id", sa.String(length=40), nullable=False),
        sa.Column("purpose", sa.String(length=16), nullable=False),
        sa.Column("not_after", sa.DateTime(timezone=True), nullable=False),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["host_id"], ["host.id"], name=op.f("fk_host_certificate_host_id")),
        sa.PrimaryKeyConstraint("serial", name=op.f("pk_host_certificate")),
    )
    op.create_index("ix_host_certificate_host_id", "host_certificate", ["host_id"], unique=False)


def _host_part() -> None:
    op.create_table(
        "host_part",
        sa.Column("host_id", sa.String(length=40), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("part", sa.String(length=40), nullable=False),
        sa.Column("facts", _JSON, nullable=False),
        sa.Column("vm_id", sa.String(length=40), nullable=True),
        sa.CheckConstraint("kind IN ('cpu', 'numa_cell', 'pci')", name=op.f("ck_host_part_kind")),
        sa.ForeignKeyConstraint(["host_id"], ["host.id"], name=op.f("fk_host_part_host_id")),
        sa.PrimaryKeyConstraint("host_id", "kind", "part", name=op.f("pk_host_part")),
    )


def _lease_revocation() -> None:
    op.create_table(
        "lease_revocation",
        sa.Column("host_id", sa.String(length=40), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("term", sa.BigInteger(), nullable=False),
        sa.Column("acknowledgements", _JSON, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["host_id"], ["host.id"], name=op.f("fk_lease_revocation_host_id")),
        sa.PrimaryKeyConstraint("host_id", name=op.f("pk_lease_revocation")),
    )


def _migration() -> None:
    op.create_table(
        "migration",
        sa.Column("vm_id", sa.String(length=40), nullable=False),
        sa.Column("operation_id", sa.String(length=40), nullable=False),
        sa.Column("source_host_id", sa.String(length=40), nullable=False),
        sa.Column("target_host_id", sa.String(length=40), nullable=False),
        sa.Column("source_epoch", sa.BigInteger(), nullable=False),
        sa.Column("target_epoch", sa.BigInteger(), nullable=False),
        sa.Column("copied_volumes", _JSON, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["operation_id"], ["operation.id"], name=op.f("fk_migration_operation_id")),
        sa.ForeignKeyConstraint(["source_host_id"], ["host.id"], name=op.f("fk_migration_source_host_id")),
        sa.ForeignKeyConstraint(["target_host_id"], ["host.id"], name=op.f("fk_migration_target_host_id")),
        sa.ForeignKeyConstraint(["vm_id"], ["vm.id"], name=op.f("fk_migration_vm_id")),
        sa.PrimaryKeyConstraint("vm_id", name=op.f("pk_migration")),
    )


def _network_host() -> None:
    op.create_table(
        "network_host",
        sa.Column("network_id", sa.String(length=40), nullable=False),
        sa.Column("host_id", sa.String(length=40), nullable=False),
        sa.Column("bridge", sa.String(length=15), server_default="", nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("problem", sa.String(length=500), server_default="", nullable=False),
        sa.Column("observed_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("state IN ('unknown', 'ready', 'failed')", name=op.f("ck_network_host_state")),
        sa.ForeignKeyConstraint(["host_id"], ["host.id"], name=op.f("fk_network_host_host_id")),
        sa.ForeignKeyConstraint(["network_id"], ["network.id"], name=op.f("fk_network_host_network_id")),
        sa.PrimaryKeyConstraint("network_id", "host_id", name=op.f("pk_network_host")),
    )


def _nic() -> None:
    op.create_table(
        "nic",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("vm_id", sa.String(length=40), nullable=False),
        sa.Column("network_id", sa.String(length=40), nullable=False),
        sa.Column("nic_index", sa.Integer(), nullable=False),
        sa.Column("mac", sa.String(length=17), nullable=False),
        sa.Column("model", sa.String(length=16), server_default="virtio", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["network_id"], ["network.id"], name=op.f("fk_nic_network_id")),
        sa.ForeignKeyConstraint(["vm_id"], ["vm.id"], name=op.f("fk_nic_vm_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_nic")),
        sa.UniqueConstraint("mac", name=op.f("uq_nic_mac")),
        sa.UniqueConstraint("vm_id", "nic_index", name=op.f("uq_nic_vm_id_nic_index")),
    )
    op.create_index("ix_nic_network_id", "nic", ["network_id"], unique=False)


def _placement_request() -> None:
    op.create_table(
        "placement_request",
        sa.Column("operation_id", sa.String(length=40), nullable=False),
        sa.Column("vm_id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("requirement", _JSON, nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("chosen_host_id", sa.String(length=40), server_default="", nullable=False),
        sa.Column("epoch", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("decision_id", sa.String(length=40), server_default="", nullable=False),
        sa.Column("refusal", sa.String(length=2000), server_default="", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("decided_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("state IN ('pending', 'placed', 'refused')", name=op.f("ck_placement_request_state")),
        sa.ForeignKeyConstraint(["operation_id"], ["operation.id"], name=op.f("fk_placement_request_operation_id")),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name=op.f("fk_placement_request_project_id")),
        sa.ForeignKeyConstraint(["vm_id"], ["vm.id"], name=op.f("fk_placement_request_vm_id")),
        sa.PrimaryKeyConstraint("operation_id", name=op.f("pk_placement_request")),
    )
    op.create_index("ix_placement_request_state", "placement_request", ["state", "created_at"], unique=False)


def _pool_host() -> None:
    op.create_table(
        "pool_host",
        sa.Column("pool_id", sa.String(length=40), nullable=False),
        sa.Column("host_id", sa.String(length=40), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("problem", sa.String(length=500), server_default="", nullable=False),
        sa.Column("observed_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("state IN ('unknown', 'ready', 'failed')", name=op.f("ck_pool_host_state")),
        sa.ForeignKeyConstraint(["host_id"], ["host.id"], name=op.f("fk_pool_host_host_id")),
        sa.ForeignKeyConstraint(["pool_id"], ["pool.id"], name=op.f("fk_pool_host_pool_id")),
        sa.PrimaryKeyConstraint("pool_id", "host_id", name=op.f("pk_pool_host")),
    )


def _snapshot() -> None:
    op.create_table(
        "snapshot",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("vm_id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("parent_id", sa.String(length=40), nullable=True),
        sa.Column("has_memory", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("volumes", _JSON, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["parent_id"], ["snapshot.id"], name=op.f("fk_snapshot_parent_id")),
        sa.ForeignKeyConstraint(["vm_id"], ["vm.id"], name=op.f("fk_snapshot_vm_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_snapshot")),
    )
    op.create_index(
        "uq_snapshot_name_live",
        "snapshot",
        ["vm_id", "name"],
        unique=True,
        sqlite_where=sa.text("deleted_at IS NULL"),
        postgresql_where=sa.text("deleted_at IS NULL"),
    )


def _unmanaged_mac() -> None:
    op.create_table(
        "unmanaged_mac",
        sa.Column("host_id", sa.String(length=40), nullable=False),
        sa.Column("mac", sa.String(length=17), nullable=False),
        sa.ForeignKeyConstraint(["host_id"], ["host.id"], name=op.f("fk_unmanaged_mac_host_id")),
        sa.PrimaryKeyConstraint("host_id", "mac", name=op.f("pk_unmanaged_mac")),
    )
    op.create_index("ix_unmanaged_mac_mac", "unmanaged_mac", ["mac"], unique=False)


def _vm_group_member() -> None:
    op.create_table(
        "vm_group_member",
        sa.Column("vm_group_id", sa.String(length=40), nullable=False),
        sa.Column("vm_id", sa.String(length=40), nullable=False),
        sa.ForeignKeyConstraint(["vm_group_id"], ["vm_group.id"], name=op.f("fk_vm_group_member_vm_group_id")),
        sa.ForeignKeyConstraint(["vm_id"], ["vm.id"], name=op.f("fk_vm_group_member_vm_id")),
        sa.PrimaryKeyConstraint("vm_group_id", "vm_id", name=op.f("pk_vm_group_member")),
    )


def _volume() -> None:
    op.create_table(
        "volume",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("pool_id", sa.String(length=40), nullable=False),
        sa.Column("host_id", sa.String(length=40), server_default="", nullable=False),
        sa.Column("format", sa.String(length=16), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("base_image_id", sa.String(length=40), nullable=True),
        sa.Column("parent_volume_id", sa.String(length=40), nullable=True),
        sa.Column("generation", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("observed_state", sa.String(length=16), server_default="absent", nullable=False),
        sa.Column("allocated_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("vm_id", sa.String(length=40), nullable=True),
        sa.Column("disk_index", sa.Integer(), nullable=True),
        sa.Column("bus", sa.String(length=16), server_default="virtio", nullable=False),
        sa.Column("boot_order", sa.Integer(), server_default="0", nullable=False),
        sa.Column("is_read_only", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("is_deleted_with_vm", sa.Boolean(), server_default=sa.true(), nullable=False),
        sa.Column("version", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("format IN ('raw', 'qcow2')", name=op.f("ck_volume_format")),
        sa.CheckConstraint("observed_state IN ('absent', 'present', 'unknown')", name=op.f("ck_volume_observed_state")),
        sa.CheckConstraint("size_bytes > 0", name=op.f("ck_volume_size")),
        sa.ForeignKeyConstraint(["base_image_id"], ["image.id"], name=op.f("fk_volume_base_image_id")),
        sa.ForeignKeyConstraint(["parent_volume_id"], ["volume.id"], name=op.f("fk_volume_parent_volume_id")),
        sa.ForeignKeyConstraint(["pool_id"], ["pool.id"], name=op.f("fk_volume_pool_id")),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name=op.f("fk_volume_project_id")),
        sa.ForeignKeyConstraint(["vm_id"], ["vm.id"], name=op.f("fk_volume_vm_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_volume")),
    )
    op.create_index("ix_volume_base_image_id", "volume", ["base_image_id"], unique=False)
    op.create_index(
        "uq_volume_name_live",
        "volume",
        ["project_id", "name"],
        unique=True,
        sqlite_where=sa.text("deleted_at IS NULL"),
        postgresql_where=sa.text("deleted_at IS NULL"),
    )
    op.create_index("uq_volume_vm_disk", "volume", ["vm_id", "disk_index"], unique=True)


def _checkpoint() -> None:
    op.create_table(
        "checkpoint",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("volume_id", sa.String(length=40), nullable=False),
        sa.Column("volume_generation", sa.BigInteger(), nullable=False),
        sa.Column("parent_id", sa.String(length=40), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["parent_id"], ["checkpoint.id"], name=op.f("fk_checkpoint_parent_id")),
        sa.ForeignKeyConstraint(["volume_id"], ["volume.id"], name=op.f("fk_checkpoint_volume_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_checkpoint")),
    )


def _disk_claim() -> None:
    op.create_table(
        "disk_claim",
        sa.Column("volume_id", sa.String(length=40), nullable=False),
        sa.Column("pool_id", sa.String(length=40), nullable=False),
        sa.Column("host_id", sa.String(length=40), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["pool_id"], ["pool.id"], name=op.f("fk_disk_claim_pool_id")),
        sa.ForeignKeyConstraint(["volume_id"], ["volume.id"], name=op.f("fk_disk_claim_volume_id")),
        sa.PrimaryKeyConstraint("volume_id", "pool_id", "host_id", name=op.f("pk_disk_claim")),
    )


def _nic_address() -> None:
    op.create_table(
        "nic_address",
        sa.Column("network_id", sa.String(length=40), nullable=False),
        sa.Column("address", sa.String(length=45), nullable=False),
        sa.Column("prefix_length", sa.Integer(), nullable=False),
        sa.Column("nic_id", sa.String(length=40), nullable=False),
        sa.ForeignKeyConstraint(["network_id"], ["network.id"], name=op.f("fk_nic_address_network_id")),
        sa.ForeignKeyConstraint(["nic_id"], ["nic.id"], name=op.f("fk_nic_address_nic_id")),
        sa.PrimaryKeyConstraint("network_id", "address", name=op.f("pk_nic_address")),
    )
    op.create_index("ix_nic_address_nic_id", "nic_address", ["nic_id"], unique=False)
