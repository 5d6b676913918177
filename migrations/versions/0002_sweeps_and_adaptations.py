"""the sweep's last pass, shared by all sweeps; what running out of memory changed about a run"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "sweeps",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("last_pass_at", sa.Float(53), nullable=False),
        sa.Column("no_expiry_before", sa.Float(53), nullable=False),
        sa.Column("instance", sa.String(64), nullable=False),
    )
    op.add_column("jobs", sa.Column("adapted", sa.JSON))


def downgrade() -> None:
    op.drop_column("jobs", "adapted")
    op.drop_table("sweeps")
