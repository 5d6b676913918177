"""claims find the next job by index alone; a creation can be told to one retry after the other"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_index("jobs_by_status", "jobs")
    op.create_index("jobs_by_status", "jobs", ["status", sa.text("priority DESC"), "created_at", "id"])
    op.add_column("creations", sa.Column("told_to", sa.Integer, nullable=False, server_default="0"))
    op.execute("UPDATE creations SET told_to = 1 WHERE told_again")
    op.drop_column("creations", "told_again")


def downgrade() -> None:
    op.add_column("creations", sa.Column("told_again", sa.Boolean, nullable=False, server_default=sa.false()))
    op.execute("UPDATE creations SET told_again = (told_to > 0)")
    op.drop_column("creations", "told_to")
    op.drop_index("jobs_by_status", "jobs")
    op.create_index("jobs_by_status", "jobs", ["status", "priority", "created_at", "id"])
