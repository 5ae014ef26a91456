"""Routers with an outer side, floating addresses with their quota, and how far OVN's database has followed."""

import json
import uuid

import sqlalchemy as sa
from alembic import op

revision = "0027"
down_revision = "0022"


def upgrade() -> None:
    op.add_column("project", sa.Column("floating_quota", sa.Integer(), nullable=True))
    op.add_column("project", sa.Column("floating_used", sa.Integer(), server_default="0", nullable=False))
    _router()
    _floating()
    op.create_table(
        "overlay_state",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("is_up", sa.Boolean(), server_default=sa.true(), nullable=False),
        sa.Column("problem", sa.String(length=500), server_default="", nullable=False),
        sa.Column("since", sa.DateTime(timezone=True), nullable=True),
        sa.Column("asked", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("answered", sa.BigInteger(), server_default="0", nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_overlay_state_one")),
        sa.CheckConstraint("answered <= asked", name=op.f("ck_overlay_state_answered")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_overlay_state")),
    )
    _routers_of_networks()


def _router() -> None:
    op.create_table(
        "router",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("outer_network_id", sa.String(length=40), nullable=True),
        sa.Column("outer_address", sa.String(length=45), nullable=True),
        sa.Column("version", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("(outer_network_id IS NULL) = (outer_address IS NULL)", name=op.f("ck_router_outer_side")),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name=op.f("fk_router_project_id")),
        sa.ForeignKeyConstraint(["outer_network_id"], ["network.id"], name=op.f("fk_router_outer_network_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_router")),
    )
    _unique_among_live("uq_router_name_live", "router", ["project_id", "name"])
    _unique_among_live("uq_router_outer_address_live", "router", ["outer_network_id", "outer_address"])


def _floating() -> None:
    op.create_table(
        "floating",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("network_id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("nic_id", sa.String(length=40), nullable=True),
        sa.Column("version", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name=op.f("fk_floating_project_id")),
        sa.ForeignKeyConstraint(["network_id"], ["network.id"], name=op.f("fk_floating_network_id")),
        sa.ForeignKeyConstraint(["nic_id"], ["nic.id"], name=op.f("fk_floating_nic_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_floating")),
    )
    _unique_among_live("uq_floating_name_live", "floating", ["network_id", "name"])
    op.create_index("uq_floating_nic_id", "floating", ["nic_id"], unique=True)


def _unique_among_live(name: str, table: str, columns: list[str]) -> None:
    live = sa.text("deleted_at IS NULL")
    op.create_index(name, table, columns, unique=True, sqlite_where=live, postgresql_where=live)


def _routers_of_networks() -> None:
    """Give each router that overlay networks of a project name a row of its own."""
    networks = op.get_bind().execute(
        sa.text(
            "SELECT project_id, settings, created_at FROM network"
            " WHERE kind = 'overlay' AND deleted_at IS NULL AND project_id <> '' ORDER BY id"
        )
    )
    table = sa.table(
        "router", sa.column("id"), sa.column("project_id"), sa.column("name"), sa.column("created_at", sa.DateTime(timezone=True))
    )
    found: dict[tuple[str, str], object] = {}
    for row in networks.mappings():
        settings = row["settings"] if isinstance(row["settings"], dict) else json.loads(row["settings"])
        if settings.get("router"):
            found.setdefault((row["project_id"], settings["router"]), row["created_at"])
    for project_id, name in found:
        made = {"id": f"rt-{uuid.uuid4().hex[:26]}", "project_id": project_id, "name": name}
        op.execute(table.insert().values(created_at=sa.func.current_timestamp(), **made))
