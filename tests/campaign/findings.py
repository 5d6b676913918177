"""What a verdict is made from and made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.campaign.damage import Damage
from tests.campaign.notebook import Followed, Keyed, SentFile, SentUpload, Submitted
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
    lease_s: float = 4
