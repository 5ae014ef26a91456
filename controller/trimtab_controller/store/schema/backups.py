"""Repositories of backups, what is in them, and the policies that fill them. All but the wrapped keys can be made anew from a
repository and its key: the rows are a view.
"""

import sqlalchemy as sa

from trimtab_controller.store.schema.base import (
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

backup_repo = sa.Table(
    "backup_repo",
    metadata,
    id_column(),
    sa.Column("name", sa.String(63), nullable=False),
    # Whose vms it keeps; '' for all of the fleet.
    sa.Column("project_id", sa.String(40), nullable=False, server_default=""),
    sa.Column("kind", sa.String(16), nullable=False),  # folder, bucket
    sa.Column("url", sa.String(500), nullable=False),
    # A folder that only this host has; '' where every host reaches it (NFS, a bucket).
    sa.Column("host_id", sa.String(40), nullable=False, server_default=""),
    # Of a bucket: endpoint, region, access key id, whether http is allowed. Never a secret.
    sa.Column("settings", Json, nullable=False),
    # Sealed with the fleet's secret file, which is not in this database.
    sa.Column("wrapped_key", sa.String(300), nullable=False),
    sa.Column("wrapped_secret", sa.String(500), nullable=False, server_default=""),
    # Names the key without telling it.
    sa.Column("key_id", sa.String(16), nullable=False),
    # The key that the next rotation locks it with; kept from when it was shown until it is the one that counts.
    sa.Column("wrapped_next_key", sa.String(300), nullable=False, server_default=""),
    sa.Column("next_key_id", sa.String(16), nullable=False, server_default=""),
    # It came back, so somebody saved it: from then on it may be the one that opens the repository, and is never dropped.
    sa.Column("is_next_key_saved", sa.Boolean(), nullable=False, server_default=sa.false()),
    sa.Column("key_changed_at", UtcDateTime()),
    # The fleet that the repository belongs to, as written in it.
    sa.Column("fleet_id", sa.String(40), nullable=False),
    # As its own configuration says; '' until it was opened once.
    sa.Column("repository_id", sa.String(64), nullable=False, server_default=""),
    # unconfirmed: its key was shown, and nobody has shown that it was saved.
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("problem", sa.String(1000), nullable=False, server_default=""),
    # Found there when the row was made, rather than made with it.
    sa.Column("is_adopted", sa.Boolean(), nullable=False, server_default=sa.false()),
    sa.Column("kept_bytes", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("pruned_at", UtcDateTime()),
    version(),
    created_at(),
    deleted_at(),
    sa.CheckConstraint("kind IN ('folder', 'bucket')", name="kind"),
    sa.CheckConstraint("state IN ('unconfirmed', 'opening', 'ready', 'failed')", name="state"),
)
unique_among_live("uq_backup_repo_name_live", backup_repo.c.name)

backup_policy = sa.Table(
    "backup_policy",
    metadata,
    id_column(),
    ref("project_id", "project.id"),
    sa.Column("name", sa.String(63), nullable=False),
    ref("repo_id", "backup_repo.id"),
    sa.Column("schedule", sa.String(120), nullable=False),
    sa.Column("zone", sa.String(64), nullable=False, server_default="UTC"),
    sa.Column("jitter_s", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("keep_last", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("keep_hourly", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("keep_daily", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("keep_weekly", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("keep_monthly", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("keep_yearly", sa.Integer(), nullable=False, server_default="0"),
    # What is done after each backup: none, read, boot.
    sa.Column("verify", sa.String(8), nullable=False, server_default="none"),
    # What a boot test waits for, all of it: a regular expression on the serial port, a TCP port; of neither, the guest agent.
    sa.Column("verify_pattern", sa.String(200), nullable=False, server_default=""),
    sa.Column("verify_tcp", sa.Integer(), nullable=False, server_default="0"),
    # Fail rather than keep a backup that is only crash-consistent.
    sa.Column("needs_filesystem", sa.Boolean(), nullable=False, server_default=sa.false()),
    # Fail rather than keep one for which the guest's own hook did not hold its applications.
    sa.Column("needs_application", sa.Boolean(), nullable=False, server_default=sa.false()),
    # 0: unlimited.
    sa.Column("bandwidth_mib_s", sa.Integer(), nullable=False, server_default="0"),
    # All its vms at one instant, rather than each by itself.
    sa.Column("is_together", sa.Boolean(), nullable=False, server_default=sa.false()),
    # A vm whose disks are lost with its host comes back from its last good backup by itself.
    sa.Column("recovers_lost", sa.Boolean(), nullable=False, server_default=sa.false()),
    # A vm whose last good backup is older than this is told of; 0: never.
    sa.Column("max_age_s", sa.Integer(), nullable=False, server_default="0"),
    version(),
    created_at(),
    deleted_at(),
    sa.CheckConstraint("verify IN ('none', 'read', 'boot')", name="verify"),
)
unique_among_live("uq_backup_policy_name_live", backup_policy.c.project_id, backup_policy.c.name)

backup_instant = sa.Table(
    "backup_instant",
    metadata,
    id_column(),
    ref("project_id", "project.id"),
    ref("repo_id", "backup_repo.id"),
    # For people: of the policy, or as it was asked for.
    sa.Column("name", sa.String(63), nullable=False),
    # running, consistent, broken: broken where no moment was common to all, or a member's backup came to nothing.
    sa.Column("state", sa.String(16), nullable=False),
    # [{vm_id, vm_name, backup_id}] in order.
    sa.Column("members", Json, nullable=False),
    # Between the first and the last member's instant, by the clocks of their hosts.
    sa.Column("skew_ms", sa.BigInteger(), nullable=False, server_default="0"),
    # The longest that a guest stood still.
    sa.Column("pause_ms", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("problem", sa.String(1000), nullable=False, server_default=""),
    # Of the last member: all were still then.
    sa.Column("taken_at", UtcDateTime()),
    created_at(),
    deleted_at(),
    sa.CheckConstraint("state IN ('running', 'consistent', 'broken')", name="state"),
)
sa.Index("ix_backup_instant_project_id", backup_instant.c.project_id, backup_instant.c.created_at)

recovery_plan = sa.Table(
    "recovery_plan",
    metadata,
    id_column(),
    ref("project_id", "project.id"),
    sa.Column("name", sa.String(63), nullable=False),
    ref("repo_id", "backup_repo.id"),
    # [{name, vms, delay_s, wait, pattern, timeout_s}] in the order in which they are brought back.
    sa.Column("groups", Json, nullable=False),
    # Names in the backups -> names here.
    sa.Column("networks", Json, nullable=False),
    sa.Column("pools", Json, nullable=False),
    sa.Column("cpu_model", sa.String(80), nullable=False, server_default="auto"),
    # What the last run brought, as its operation's result says; {} before the first.
    sa.Column("last_run", Json, nullable=False),
    version(),
    created_at(),
    deleted_at(),
)
unique_among_live("uq_recovery_plan_name_live", recovery_plan.c.project_id, recovery_plan.c.name)

backup = sa.Table(
    "backup",
    metadata,
    id_column(),
    ref("project_id", "project.id"),
    ref("repo_id", "backup_repo.id"),
    # No reference: a view that was rebuilt names vms that this fleet never had.
    sa.Column("vm_id", sa.String(40), nullable=False),
    sa.Column("vm_name", sa.String(63), nullable=False),
    # running, ready, damaged, failed. A row that is deleted waits for prune, or is gone.
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("consistency", sa.String(16), nullable=False, server_default=""),
    # What the increment was read against; '' for none. Every backup is whole without it.
    sa.Column("base_id", sa.String(40), nullable=False, server_default=""),
    # Why a disk was read in full; '' where none was.
    sa.Column("full_reason", sa.String(500), nullable=False, server_default=""),
    # Why it is less than was wished for: a guest without an agent.
    sa.Column("downgrade", sa.String(500), nullable=False, server_default=""),
    sa.Column("size_bytes", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("dirty_bytes", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("read_bytes", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("stored_bytes", sa.BigInteger(), nullable=False, server_default="0"),
    # What has been proven of it: 0 written, 1 read back, 2 restored and compared, 3 booted; and when, last.
    sa.Column("level", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("verified_at", UtcDateTime()),
    sa.Column("booted_at", UtcDateTime()),
    # Of the last boot test: from its order to the guest's sign of life.
    sa.Column("recovery_ms", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("problem", sa.String(1000), nullable=False, server_default=""),
    # Not pruned before; far in the future for a hold without an end.
    sa.Column("held_until", UtcDateTime()),
    # Disks and the vm's settings, as in its manifest.
    sa.Column("manifest", Json, nullable=False),
    # The instant of its content.
    sa.Column("taken_at", UtcDateTime()),
    created_at(),
    deleted_at(),
    sa.CheckConstraint("state IN ('running', 'ready', 'damaged', 'failed')", name="state"),
    sa.CheckConstraint("level BETWEEN 0 AND 3", name="level"),
)
sa.Index("ix_backup_vm_id", backup.c.vm_id, backup.c.created_at)
sa.Index("ix_backup_repo_id", backup.c.repo_id)
