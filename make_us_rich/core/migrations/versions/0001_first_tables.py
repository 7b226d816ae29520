"""The first tables: people, their tokens and calls, forecasts, demotions, the audit."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def moment(name: str, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def words(name: str, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.String(), nullable=nullable)


def number(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.Double())


def upgrade() -> None:
    op.create_table(
        "users",
        sa.Column("id", sa.Integer(), nullable=False),
        words("name"),
        words("role"),
        words("password_hash", nullable=True),
        sa.Column("disabled", sa.Boolean(), nullable=False),
        sa.Column("monthly_calls", sa.Integer()),
        moment("created_at"),
        sa.PrimaryKeyConstraint("id", name="pk_users"),
        sa.UniqueConstraint("name", name="uq_users_name"),
    )
    op.create_table(
        "tokens",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("user_id", sa.Integer(), nullable=False),
        words("name"),
        words("prefix"),
        words("sha256"),
        moment("created_at"),
        moment("expires_at", nullable=True),
        moment("revoked_at", nullable=True),
        moment("last_used_at", nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_tokens"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_tokens_user_id"),
        sa.UniqueConstraint("sha256", name="uq_tokens_sha256"),
    )
    op.create_index("ix_tokens_user_id", "tokens", ["user_id"])
    op.create_table(
        "usage",
        sa.Column("user_id", sa.Integer(), nullable=False),
        words("month"),
        sa.Column("used", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("user_id", "month", name="pk_usage"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_usage_user_id"),
        sa.CheckConstraint("used >= 0", name=op.f("ck_usage_used")),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer(), nullable=False),
        moment("at"),
        *[words(name) for name in ("actor", "action", "target", "detail")],
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )
    op.create_table(
        "forecasts",
        sa.Column("id", sa.Integer(), nullable=False),
        *[words(name) for name in ("pair", "interval")],
        *[moment(name) for name in ("as_of", "target_open", "target_close")],
        words("model_version"),
        moment("issued_at"),
        *[words(name) for name in ("status", "reason")],
        number("last_close"),
        sa.Column("quantiles", sa.JSON()),
        sa.Column("base_quantiles", sa.JSON()),
        *[number(name) for name in ("width", "p_up")],
        *[words(name) for name in ("source", "label", "run_id")],
        moment("settled_at", nullable=True),
        *[number(name) for name in ("actual", "crps", "crps_base", "abs_error", "abs_error_naive")],
        *[sa.Column(name, sa.Boolean()) for name in ("in50", "in80", "in95", "up_hit")],
        sa.PrimaryKeyConstraint("id", name="pk_forecasts"),
        sa.UniqueConstraint(
            "pair", "interval", "target_open", "model_version", name="uq_forecasts_pair_interval_target_open_model_version"
        ),
    )
    op.create_index("ix_forecasts_pair_interval_settled_at", "forecasts", ["pair", "interval", "settled_at"])
    op.create_table(
        "demotions",
        sa.Column("id", sa.Integer(), nullable=False),
        *[words(name) for name in ("pair", "interval")],
        moment("at"),
        *[words(name) for name in ("from_version", "to_version", "reason")],
        sa.PrimaryKeyConstraint("id", name="pk_demotions"),
    )


def downgrade() -> None:
    for table in ("demotions", "forecasts", "audit", "usage", "tokens", "users"):
        op.drop_table(table)
