"""batches: files of requests that generators answer when they have time"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "batches",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("project_id", sa.String(64), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("endpoint", sa.String(64), nullable=False),
        sa.Column("completion_window", sa.String(16), nullable=False),
        sa.Column("input_file_id", sa.String(64), nullable=False),
        sa.Column("output_file_id", sa.String(64)),
        sa.Column("error_file_id", sa.String(64)),
        sa.Column("output_expires_after_s", sa.BigInteger),
        sa.Column("metadata", sa.JSON),
        sa.Column("errors", sa.JSON),
        sa.Column("model", sa.String(512)),
        sa.Column("total", sa.BigInteger, nullable=False),
        sa.Column("completed", sa.BigInteger, nullable=False),
        sa.Column("failed", sa.BigInteger, nullable=False),
        sa.Column("input_tokens", sa.BigInteger, nullable=False),
        sa.Column("output_tokens", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("expires_at", sa.Float(53), nullable=False),
        sa.Column("in_progress_at", sa.Float(53)),
        sa.Column("finalizing_at", sa.Float(53)),
        sa.Column("completed_at", sa.Float(53)),
        sa.Column("failed_at", sa.Float(53)),
        sa.Column("expired_at", sa.Float(53)),
        sa.Column("cancelling_at", sa.Float(53)),
        sa.Column("cancelled_at", sa.Float(53)),
        sa.Column("fence", sa.BigInteger, nullable=False),
        sa.Column("lease_until", sa.Float(53)),
        sa.Column("worker", sa.String(256)),
        sa.Column("not_before", sa.Float(53)),
        sa.Column("faults", sa.BigInteger, nullable=False),
        sa.Column("has_lines", sa.Boolean, nullable=False),
    )
    op.create_index("batches_by_project", "batches", ["project_id", "created_at", "id"])
    op.create_index("batches_by_status", "batches", ["status", "created_at", "id"])
    op.create_index("batches_by_lines", "batches", ["has_lines", "status"])
    op.create_table(
        "batch_lines",
        sa.Column("batch_id", sa.String(64), sa.ForeignKey("batches.id"), primary_key=True),
        sa.Column("line", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("is_error", sa.Boolean, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("batch_lines")
    op.drop_table("batches")
