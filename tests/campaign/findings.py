"""What a verdict is made from and made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tests.campaign.batch_plan import BatchPlan
from tests.campaign.batch_watch import Recorded
from tests.campaign.damage import Damage
from tests.campaign.notebook import Followed, Keyed, SentBatch, SentFile, SentUpload, Submitted
from tests.campaign.plan import JobPlan
from tests.campaign.toy_model import Reference


@dataclass(frozen=True)
class Finding:
    """Something that must not be."""

    check: str
    subject: str
    what: str


@dataclass(frozen=True)
class Known:
    """What the harness itself did and knows, beside the evidence."""

    plans: dict[int, JobPlan]
    references: Callable[[JobPlan], Reference]
    submitted: Sequence[Submitted] = ()
    followed: Sequence[Followed] = ()
    damages: Sequence[Damage] = ()
    keyed: Sequence[Keyed] = ()
    files: Sequence[SentFile] = ()
    uploads: Sequence[SentUpload] = ()
    batch_plans: Mapping[int, BatchPlan] = field(default_factory=dict)
    batches: Sequence[SentBatch] = ()
    lines_recorded: Mapping[tuple[str, int], Recorded] = field(default_factory=dict)
    """Results of lines that were seen while their batches were run, by batch and number of the line."""
    lines_changed: Sequence[str] = ()
    lease_s: float = 4
