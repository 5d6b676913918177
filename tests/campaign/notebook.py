"""What the campaign's clients were told, for the verdict to compare with what the service has."""

import threading
from dataclasses import dataclass, field

from tests.campaign.batch_plan import BatchPlan
from tests.campaign.plan import JobPlan


@dataclass
class Submitted:
    """A job a client knows of."""

    plan: JobPlan
    job_id: str
    cancel_answer: str | None = None
    """The status in the answer to its cancellation: `conflict` if it had ended by then."""
    pause_answer: str | None = None
    """The same of its pause."""
    last_seen: str = ""


@dataclass
class Followed:
    """What somebody read on a job's live stream, over however many connections."""

    job_id: str
    numbers: list[int] = field(default_factory=list)
    is_complete: bool = False
    connections: int = 0


@dataclass
class Keyed:
    """A creation that was sent with an Idempotency-Key, as often as it took."""

    kind: str
    """`job`, `file`, `upload` or `batch`."""
    mark: str
    """The key. What is created carries it too: a job or batch in its metadata, a file or an upload as its name."""
    times: int = 0
    answers: set[str] = field(default_factory=set)
    """Every id it was answered with."""


@dataclass
class SentFile:
    """A file whose creation was acknowledged."""

    file_id: str
    sha256: str
    is_deleted: bool = False


@dataclass
class SentUpload:
    """An upload in parts."""

    upload_id: str
    parts: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each part that was acknowledged, by its id."""
    end: str = "pending"
    """What its client made of it: `completed`, `cancelled`, `abandoned`; `pending` if it gave up on the way."""
    file_id: str | None = None


@dataclass
class SentBatch:
    """A batch whose creation was acknowledged."""

    plan: BatchPlan
    batch_id: str
    cancel_answer: str | None = None
    """The status in the answer to its cancellation: `conflict` if it had ended by then."""
    last_seen: str = ""


class Notebook:
    """What all clients were told. Whoever writes more than one field holds `lock`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.submitted: list[Submitted] = []
        self.followed: list[Followed] = []
        self.keyed: list[Keyed] = []
        self.files: list[SentFile] = []
        self.uploads: list[SentUpload] = []
        self.batches: list[SentBatch] = []
        self.refusals: list[str] = []
        self.internal_errors: list[str] = []
        self.parts_gone: list[str] = []
        """Acknowledged parts of pending uploads that were not there any more."""
        self.sent = 0
