"""The run ledger: one row for each run of a notebook."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "runs",
        sa.Column("id", sa.Integer(), nullable=False),
        *[sa.Column(name, sa.String(), nullable=False) for name in ("run_id", "pair", "interval")],
        sa.Column("cutoff", sa.DateTime(timezone=True), nullable=False),
        *[sa.Column(name, sa.String(), nullable=False) for name in ("recipe", "recipe_hash", "state", "exit_class", "reason", "version")],
        sa.Column("attempts", sa.Integer(), nullable=False),
        *[sa.Column(name, sa.String(), nullable=False) for name in ("host", "notebook", "log")],
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        *[sa.Column(name, sa.DateTime(timezone=True)) for name in ("finished_at", "retry_at")],
        sa.Column("seconds", sa.Double()),
        sa.PrimaryKeyConstraint("id", name="pk_runs"),
        sa.UniqueConstraint("run_id", name="uq_runs_run_id"),
    )
    op.create_index("ix_runs_pair_interval_cutoff", "runs", ["pair", "interval", "cutoff"])


def downgrade() -> None:
    op.drop_table("runs")
