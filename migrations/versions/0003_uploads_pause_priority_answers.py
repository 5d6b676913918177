"""uploads in parts, files that expire, pause and priority of jobs, answers kept for retries"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("files", sa.Column("expires_at", sa.Float(53)))
    op.create_index("files_by_expiry", "files", ["expires_at"])
    op.create_table(
        "uploads",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("project_id", sa.String(64), nullable=False),
        sa.Column("filename", sa.String(512), nullable=False),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("mime_type", sa.String(256), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("expires_at", sa.Float(53), nullable=False),
        sa.Column("file_id", sa.String(64)),
        sa.Column("completion_sha256", sa.String(64)),
        sa.Column("file_expires_after_s", sa.BigInteger),
    )
    op.create_index("uploads_by_status", "uploads", ["status", "expires_at"])
    op.create_table(
        "upload_parts",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("upload_id", sa.String(64), sa.ForeignKey("uploads.id"), nullable=False),
        sa.Column("project_id", sa.String(64), nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
    )
    op.create_index("upload_parts_by_upload", "upload_parts", ["upload_id"])
    op.add_column("jobs", sa.Column("pause_requested_at", sa.Float(53)))
    op.add_column("jobs", sa.Column("priority", sa.Integer, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("integrations", sa.JSON))
    op.drop_index("jobs_by_status", "jobs")
    op.create_index("jobs_by_status", "jobs", ["status", "priority", "created_at", "id"])
    op.create_index("jobs_by_end", "jobs", ["status", "finished_at"])
    op.create_table(
        "answers",
        sa.Column("project_id", sa.String(64), primary_key=True),
        sa.Column("route", sa.String(256), primary_key=True),
        sa.Column("key", sa.String(256), primary_key=True),
        sa.Column("request_sha256", sa.String(64), nullable=False),
        sa.Column("status_code", sa.Integer, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
    )
    op.create_index("answers_by_age", "answers", ["created_at"])
    op.create_table(
        "creations",
        sa.Column("object_id", sa.String(64), primary_key=True),
        sa.Column("project_id", sa.String(64), nullable=False),
        sa.Column("request_sha256", sa.String(64), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("told_again", sa.Boolean, nullable=False),
    )
    op.create_index("creations_by_request", "creations", ["project_id", "request_sha256", "created_at"])
    op.create_index("creations_by_age", "creations", ["created_at"])


def downgrade() -> None:
    op.drop_table("creations")
    op.drop_table("answers")
    op.drop_index("jobs_by_status", "jobs")
    op.create_index("jobs_by_status", "jobs", ["status", "created_at", "id"])
    op.drop_index("jobs_by_end", "jobs")
    op.drop_column("jobs", "integrations")
    op.drop_column("jobs", "priority")
    op.drop_column("jobs", "pause_requested_at")
    op.drop_table("upload_parts")
    op.drop_table("uploads")
    op.drop_index("files_by_expiry", "files")
    op.drop_column("files", "expires_at")
