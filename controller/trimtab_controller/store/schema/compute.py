"""Vms, their claims on hosts, groups, placement decisions, and what later issues hang on a vm."""

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

vm = sa.Table(
    "vm",
    metadata,
    id_column(),
    sa.Column("uuid", sa.String(36), nullable=False, unique=True),
    ref("project_id", "project.id"),
    sa.Column("name", sa.String(63), nullable=False),
    sa.Column("labels", Json, nullable=False),
    sa.Column("origin", sa.String(16), nullable=False, server_default="created"),  # created, adopted
    # Shape.
    sa.Column("arch", sa.String(16), nullable=False),
    sa.Column("machine", sa.String(80), nullable=False, server_default=""),  # concrete, fixed at first placement
    sa.Column("cpu_model", sa.String(80), nullable=False, server_default=""),  # named, fixed at first placement
    sa.Column("cpu_features", Json, nullable=False),
    sa.Column("vcpus", sa.Integer(), nullable=False),
    sa.Column("vcpus_max", sa.Integer(), nullable=False),
    sa.Column("memory_mib", sa.BigInteger(), nullable=False),
    sa.Column("memory_max_mib", sa.BigInteger(), nullable=False),
    # What it becomes at its next stop; 0: stays as it is.
    sa.Column("next_vcpus", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("next_memory_mib", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("firmware", sa.String(8), nullable=False),
    sa.Column("has_secure_boot", sa.Boolean(), nullable=False, server_default=sa.false()),
    # TPM 2.0 by swtpm; its state is on the vm's host, which it therefore starts on.
    sa.Column("has_tpm", sa.Boolean(), nullable=False, server_default=sa.false()),
    # As given (`win11`, of osinfo's names), and what follows from it: linux, windows, generic.
    sa.Column("os", sa.String(80), nullable=False, server_default=""),
    sa.Column("os_family", sa.String(16), nullable=False, server_default="linux"),
    # One drive; an image '' is none in it.
    sa.Column("has_cdrom", sa.Boolean(), nullable=False, server_default=sa.false()),
    sa.Column("cdrom_image_id", sa.String(40), nullable=False, server_default=""),
    # A second drive, for the drivers that an installer asks for; '' is none.
    sa.Column("drivers_image_id", sa.String(40), nullable=False, server_default=""),
    # Least memory that the balloon leaves it; 0: no balloon. And its class of cpu time: '', low, normal, high.
    sa.Column("balloon_min_mib", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("cpu_class", sa.String(16), nullable=False, server_default=""),
    sa.Column("nvram_pool_id", sa.String(40), nullable=False, server_default=""),
    sa.Column("device_addresses", Json, nullable=False),
    sa.Column("image_id", sa.String(40), sa.ForeignKey("image.id")),
    sa.Column("template_id", sa.String(40)),
    # Seed documents (meta, user, network) as given; they may hold secrets: only `admin` and the vm's operators read them.
    sa.Column("seed", Json, nullable=False),
    # Placement wishes.
    sa.Column("host_selector", Json, nullable=False),
    sa.Column("host_class", sa.String(63), nullable=False, server_default=""),
    # What few vms ask for: pinning, huge pages, cells, devices, counted resources, tolerations; only what is asked stands here.
    sa.Column("wishes", Json, nullable=False, server_default="{}"),
    sa.Column("ha", sa.String(16), nullable=False, server_default="none"),
    sa.Column("priority", sa.Integer(), nullable=False, server_default="0"),
    # Seconds between the proof that its host is off and its restart elsewhere.
    sa.Column("start_delay_s", sa.Integer(), nullable=False, server_default="0"),
    # Its start group, a name within the project, '' for none: after a loss it starts once those of lower order in it run.
    sa.Column("start_group", sa.String(63), nullable=False, server_default=""),
    sa.Column("start_order", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("drain_policy", sa.String(16), nullable=False, server_default="migrate"),
    # '' for none; and when its policy last asked for a backup (or was given): the schedule counts from there.
    sa.Column("backup_policy_id", sa.String(40), nullable=False, server_default=""),
    sa.Column("backup_asked_at", UtcDateTime()),
    # Desired.
    sa.Column("desired_power", sa.String(16), nullable=False),
    # Placement: host '' is none. The epoch grows with every assignment and is checked by agents.
    sa.Column("host_id", sa.String(40), nullable=False, server_default=""),
    sa.Column("epoch", sa.BigInteger(), nullable=False, server_default="0"),
    # Observed, with its age.
    sa.Column("observed_state", sa.String(16), nullable=False),
    sa.Column("observed_reason", sa.String(32), nullable=False, server_default=""),
    sa.Column("observed_host_id", sa.String(40), nullable=False, server_default=""),
    sa.Column("observed_at", UtcDateTime()),
    sa.Column("observed_addresses", Json, nullable=False),
    # What its balloon left it then; 0 for one without a balloon.
    sa.Column("observed_balloon_mib", sa.BigInteger(), nullable=False, server_default="0"),
    # What is known of its guest's agent (`core/guest_agents.py`), and since when.
    sa.Column("guest_agent", sa.String(16), nullable=False, server_default=""),
    sa.Column("guest_agent_since", UtcDateTime()),
    # Why it is not as desired; shown to the user.
    sa.Column("problem", sa.String(1000), nullable=False, server_default=""),
    # Failover gave it up ('' : no); its owner's next start or stop takes that back.
    sa.Column("attention", sa.String(32), nullable=False, server_default=""),
    # Fields of its domain that somebody changed by hand, as the last look found; none: it is as it shall be.
    sa.Column("hand_changes", Json, nullable=False, server_default="[]"),
    version(),
    created_at(),
    deleted_at(),
    # The snapshot that what it writes now began from; '' for none.
    sa.Column("current_snapshot_id", sa.String(40), nullable=False, server_default=""),
    # Files are removed after this instant; until then `undelete` brings the vm back.
    sa.Column("purge_after", UtcDateTime()),
    sa.Column("purged_at", UtcDateTime()),
    sa.CheckConstraint("vcpus BETWEEN 1 AND 1024 AND vcpus_max >= vcpus", name="vcpus"),
    sa.CheckConstraint("memory_mib >= 16 AND memory_max_mib >= memory_mib", name="memory"),
    sa.CheckConstraint("desired_power IN ('running', 'stopped', 'paused', 'deleted')", name="desired_power"),
    sa.CheckConstraint("firmware IN ('bios', 'uefi')", name="firmware"),
    sa.CheckConstraint("ha IN ('restart', 'none')", name="ha"),
)
unique_among_live("uq_vm_name_live", vm.c.project_id, vm.c.name)
sa.Index("ix_vm_host_id", vm.c.host_id)
# Few vms are in one; failover asks for the members of some groups each second while one of them waits.
_in_start_group = sa.text("start_group != ''")
sa.Index("ix_vm_start_group", vm.c.start_group, sqlite_where=_in_start_group, postgresql_where=_in_start_group)

# One row per (vm, host) that holds it: two during a migration. Compute figures are zero for a stopped vm.
claim = sa.Table(
    "claim",
    metadata,
    ref("vm_id", "vm.id", primary_key=True),
    ref("host_id", "host.id", primary_key=True),
    sa.Column("role", sa.String(16), nullable=False),  # home, target
    sa.Column("epoch", sa.BigInteger(), nullable=False),
    sa.Column("vcpus", sa.Integer(), nullable=False),
    sa.Column("memory_mib", sa.BigInteger(), nullable=False),
    sa.Column("operation_id", sa.String(40), nullable=False),
    created_at(),
    sa.CheckConstraint("role IN ('home', 'target')", name="role"),
    sa.CheckConstraint("vcpus >= 0 AND memory_mib >= 0", name="not_negative"),
)
sa.Index("uq_claim_vm_role", claim.c.vm_id, claim.c.role, unique=True)
sa.Index("ix_claim_host_id", claim.c.host_id)

# What a vm holds of a host's stock; goes with the claim.
claim_stock = sa.Table(
    "claim_stock",
    metadata,
    ref("vm_id", "vm.id", primary_key=True),
    ref("host_id", "host.id", primary_key=True),
    sa.Column("resource", sa.String(120), primary_key=True),
    sa.Column("amount", sa.BigInteger(), nullable=False),
    sa.CheckConstraint("amount > 0", name="amount"),
)

# Space of volumes; survives a stop.
disk_claim = sa.Table(
    "disk_claim",
    metadata,
    ref("volume_id", "volume.id", primary_key=True),
    ref("pool_id", "pool.id", primary_key=True),
    sa.Column("host_id", sa.String(40), primary_key=True),
    sa.Column("size_bytes", sa.BigInteger(), nullable=False),
)

# What the saga's placement step waits for and the leader's batch loop answers.
placement_request = sa.Table(
    "placement_request",
    metadata,
    ref("operation_id", "operation.id", primary_key=True),
    ref("vm_id", "vm.id"),
    ref("project_id", "project.id"),
    sa.Column("kind", sa.String(16), nullable=False),  # create, start, migrate
    sa.Column("requirement", Json, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),  # pending, placed, refused
    sa.Column("chosen_host_id", sa.String(40), nullable=False, server_default=""),
    sa.Column("epoch", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("decision_id", sa.String(40), nullable=False, server_default=""),
    sa.Column("refusal", sa.String(2000), nullable=False, server_default=""),
    sa.Column("refusal_code", sa.String(40), nullable=False, server_default="no-host-fits"),
    created_at(),
    sa.Column("decided_at", UtcDateTime()),
    sa.CheckConstraint("state IN ('pending', 'placed', 'refused')", name="state"),
)
sa.Index("ix_placement_request_state", placement_request.c.state, placement_request.c.created_at)

# Why a vm is where it is: every host's verdict. Kept 14 days.
decision = sa.Table(
    "decision",
    metadata,
    id_column(),
    ref("vm_id", "vm.id"),
    sa.Column("operation_id", sa.String(40), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("chosen_host_id", sa.String(40), nullable=False, server_default=""),
    sa.Column("policy", sa.String(40), nullable=False),
    sa.Column("verdicts", Json, nullable=False),
    # Of everything that it was decided on: the fleet, what was claimed before it in its batch, the request.
    sa.Column("inputs_sha256", sa.String(64), nullable=False, server_default=""),
    # The newest event when the fleet was read: what came later may not have been known. NULL where none was kept with it.
    sa.Column("fleet_revision", sa.BigInteger()),
    created_at(),
)
sa.Index("ix_decision_vm_id", decision.c.vm_id, decision.c.created_at)
sa.Index("ix_decision_created_at", decision.c.created_at)

# While a row is here both hosts are holders; only proof removes it.
migration = sa.Table(
    "migration",
    metadata,
    ref("vm_id", "vm.id", primary_key=True),
    ref("operation_id", "operation.id"),
    ref("source_host_id", "host.id"),
    ref("target_host_id", "host.id"),
    sa.Column("source_epoch", sa.BigInteger(), nullable=False),
    sa.Column("target_epoch", sa.BigInteger(), nullable=False),
    sa.Column("copied_volumes", Json, nullable=False),
    created_at(),
)

vm_group = sa.Table(
    "vm_group",
    metadata,
    id_column(),
    ref("project_id", "project.id"),
    sa.Column("name", sa.String(63), nullable=False),
    sa.Column("rule", Json, nullable=False),
    # Checked and raised by every claim of a member: two placements cannot both miss each other.
    sa.Column("generation", sa.BigInteger(), nullable=False, server_default="0"),
    version(),
    created_at(),
    deleted_at(),
)
unique_among_live("uq_vm_group_name_live", vm_group.c.project_id, vm_group.c.name)

vm_group_member = sa.Table(
    "vm_group_member",
    metadata,
    ref("vm_group_id", "vm_group.id", primary_key=True),
    ref("vm_id", "vm.id", primary_key=True),
)

template = sa.Table(
    "template",
    metadata,
    id_column(),
    ref("project_id", "project.id"),
    sa.Column("name", sa.String(63), nullable=False),
    sa.Column("revision", sa.Integer(), nullable=False, server_default="1"),
    ref("image_id", "image.id"),
    sa.Column("settings", Json, nullable=False),
    version(),
    created_at(),
    deleted_at(),
)
unique_among_live("uq_template_name_live", template.c.project_id, template.c.name, template.c.revision)

snapshot = sa.Table(
    "snapshot",
    metadata,
    id_column(),
    ref("vm_id", "vm.id"),
    sa.Column("name", sa.String(63), nullable=False),
    sa.Column("parent_id", sa.String(40), sa.ForeignKey("snapshot.id")),
    sa.Column("has_memory", sa.Boolean(), nullable=False, server_default=sa.false()),
    sa.Column("volumes", Json, nullable=False),
    created_at(),
    deleted_at(),
    sa.Column("state", sa.String(16), nullable=False, server_default="ready"),  # making, ready, deleting
    # crash, filesystem, memory, stopped; '' while it is made. The note says why it is less than was wished.
    sa.Column("consistency", sa.String(16), nullable=False, server_default=""),
    sa.Column("note", sa.String(500), nullable=False, server_default=""),
    # Kept only until what is made from it (a clone, a template) is there.
    sa.Column("is_temporary", sa.Boolean(), nullable=False, server_default=sa.false()),
    # The vm's shape then: a memory fits no other.
    sa.Column("vcpus", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("memory_mib", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("memory_bytes", sa.BigInteger(), nullable=False, server_default="0"),
)
sa.Index("ix_snapshot_vm_id", snapshot.c.vm_id)
unique_among_live("uq_snapshot_name_live", snapshot.c.vm_id, snapshot.c.name)

checkpoint = sa.Table(
    "checkpoint",
    metadata,
    id_column(),
    ref("volume_id", "volume.id"),
    sa.Column("volume_generation", sa.BigInteger(), nullable=False),
    sa.Column("parent_id", sa.String(40), sa.ForeignKey("checkpoint.id")),
    created_at(),
    deleted_at(),
)

plan = sa.Table(
    "plan",
    metadata,
    id_column(),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),  # open, applying, applied, incomplete, cancelled
    sa.Column("changes", Json, nullable=False),  # `core.planning.Plan` in its stored form
    sa.Column("created_by", sa.String(80), nullable=False),
    created_at(),
    sa.Column("summary", sa.String(1000), nullable=False, server_default=""),
    # The operation that applied it last; '' before.
    sa.Column("operation_id", sa.String(40), nullable=False, server_default=""),
)

# How far the steps of a plan that is applied have come; a running one names its child operation.
plan_step = sa.Table(
    "plan_step",
    metadata,
    ref("plan_id", "plan.id", primary_key=True),
    sa.Column("position", sa.Integer(), primary_key=True),
    # pending, stopping, running, done, skipped, failed, cancelled
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("host_id", sa.String(40), nullable=False),
    # The forecast; what the step got once it is done.
    sa.Column("target_host_id", sa.String(40), nullable=False, server_default=""),
    sa.Column("operation_id", sa.String(40), nullable=False, server_default=""),
    sa.Column("attempts", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("message", sa.String(1000), nullable=False, server_default=""),
    sa.CheckConstraint("state IN ('pending', 'stopping', 'running', 'done', 'skipped', 'failed', 'cancelled')", name="state"),
)
# Slots: the moves under way of all plans.
sa.Index("ix_plan_step_state", plan_step.c.state)

# Hosts that operators hold out of service; a row ends with `host maintenance end`.
host_maintenance = sa.Table(
    "host_maintenance",
    metadata,
    ref("host_id", "host.id", primary_key=True),
    sa.Column("plan_id", sa.String(40), nullable=False, server_default=""),
    sa.Column("was_cordoned", sa.Boolean(), nullable=False, server_default=sa.false()),
    sa.Column("created_by", sa.String(80), nullable=False),
    created_at(),
)

# Usage history in SQL, since Prometheus is optional: mean and peak per subject, per bucket.
usage_rollup = sa.Table(
    "usage_rollup",
    metadata,
    sa.Column("subject_id", sa.String(40), primary_key=True),
    sa.Column("metric", sa.String(40), primary_key=True),
    sa.Column("bucket_s", sa.Integer(), primary_key=True),
    sa.Column("bucket_at", UtcDateTime(), primary_key=True),
    sa.Column("mean", sa.Float(), nullable=False),
    sa.Column("peak", sa.Float(), nullable=False),
    sa.Column("samples", sa.Integer(), nullable=False),
)
sa.Index("ix_usage_rollup_bucket_at", usage_rollup.c.bucket_at)
