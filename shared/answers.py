"""What POSTs were answered, kept so that sending one again creates nothing.

    with an Idempotency-Key   `Answer`: kept for a day, told as often as it is asked for
    without one               `Creation`: kept for a minute, told once to each try that says it is one more

Both are written in the transaction that creates the object: there is no instant at which one is there without the
other, whatever crashes, and of two requests that do the same at once one commits and the other finds its answer.
`worker.sweeper` removes what is too old.
"""

from dataclasses import dataclass

from sqlalchemy import ColumnElement, delete, func, insert, select, tuple_, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from shared.db import clock, now
from shared.errors import Conflict
from shared.models import Answer, Creation, table_of

KEPT_S = 24 * 3600
RETRIED_WITHIN_S = 60
REMOVED_AFTER_S = 3600
"""Of creations. Later than they count, so that a retry that is being answered finds its row."""


_REMEMBER = insert(table_of(Creation)).values(created_at=now())
"""Made once: making it takes longer than running it."""


class KeyReused(Conflict):
    """The key belongs to another request."""

    code = "idempotency_key_reused"


@dataclass(frozen=True, slots=True)
class Request:
    """A POST with a key. `sha256` is of what it asks for; two with the same key must agree on it."""

    project_id: str
    route: str
    """Method and path."""
    key: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Kept:
    """An answer to give again."""

    status_code: int
    body: str


def find(session: Session, request: Request) -> Kept | None:
    """The answer this request got before.

    Raises:
        KeyReused: its key was used for something else.
    """
    row = session.execute(
        select(Answer.request_sha256, Answer.status_code, Answer.body).where(
            Answer.project_id == request.project_id,
            Answer.route == request.route,
            Answer.key == request.key,
            Answer.created_at > now() - KEPT_S,
        )
    ).one_or_none()
    if row is None:
        return None
    if row.request_sha256 != request.sha256:
        raise KeyReused(
            f"the Idempotency-Key {request.key!r} was used within the last day for another request to "
            f"{request.route}; send a new key with a new request",
            param="Idempotency-Key",
        )
    return Kept(row.status_code, row.body)


def keep(session: Session, request: Request, status_code: int, body: str) -> bool:
    """Keep an answer. False if there is one already; then nothing of this transaction may be committed.

    PostgreSQL: waits for a transaction that keeps one for the same key.
    """
    values = {
        "request_sha256": request.sha256,
        "status_code": status_code,
        "body": body,
        "created_at": now(),
    }
    place = {"project_id": request.project_id, "route": request.route, "key": request.key}
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    written = session.execute(
        dialect.insert(Answer)
        .values(**place, **values)
        .on_conflict_do_update(
            index_elements=list(place),
            set_=values,
            where=Answer.created_at <= now() - KEPT_S,  # too old: key is free
        )
        .returning(Answer.key)
    )
    return written.one_or_none() is not None


def remember_creation(
    session: Session, project_id: str, sha256: str, object_id: str, body: str, retries: int = 0
) -> None:
    """Keep what a POST without a key created, for the retry of a client that does not get the answer."""
    values = {
        "object_id": object_id,
        "project_id": project_id,
        "request_sha256": sha256,
        "body": body,
        "told_to": retries,
    }
    session.execute(_REMEMBER, values)


def tell_again(session: Session, project_id: str, sha256: str, retries: int) -> str | None:
    """The body of the answer that a retried POST has probably lost, however often; each try is told once."""
    lost = (
        select(Creation.object_id)
        .where(
            Creation.project_id == project_id,
            Creation.request_sha256 == sha256,
            Creation.created_at > now() - RETRIED_WITHIN_S,
            Creation.told_to < retries,
        )
        # Who tries for the nth time was told by its last try, if any of two that ask for the same was.
        .order_by(Creation.told_to.desc(), Creation.created_at.desc())
        .limit(1)
    )
    return session.scalar(
        update(Creation)
        .where(Creation.object_id == lost.scalar_subquery(), Creation.told_to < retries)
        .values(told_to=retries)
        .returning(Creation.body)
    )


def forget_creation(session: Session, object_id: str) -> None:
    """A client that ends or deletes an object has its id, and so did not lose the answer that had it."""
    session.execute(delete(Creation).where(Creation.object_id == object_id))


def forget_lost(session: Session, object_id: str) -> None:
    """An object is gone again before its client was answered: nobody may be told that it was created."""
    forget_creation(session, object_id)
    session.execute(delete(Answer).where(Answer.body.contains(object_id, autoescape=True)))  # reads all; all but never


def any_old(session: Session) -> bool:
    """Whether there is anything to `remove_old`. Looks at the oldest of each only, which an index finds."""
    oldest = (select(func.min(model.created_at)).scalar_subquery() for model in (Answer, Creation))
    at, answer, creation = session.execute(select(now(), *oldest)).one()
    return (answer is not None and answer <= at - KEPT_S) or (creation is not None and creation <= at - REMOVED_AFTER_S)


def remove_old(session: Session, limit: int) -> None:
    """Remove at most that many of each that count no more. Rows that somebody else is about to change are left."""
    at = clock(session)  # a number: PostgreSQL uses no index for a comparison with a clock that goes on
    answer_key = (Answer.project_id, Answer.route, Answer.key)
    old = _too_old(Answer, at)
    answers = select(*answer_key).where(old).order_by(Answer.created_at).limit(limit)
    session.execute(delete(Answer).where(tuple_(*answer_key).in_(answers.with_for_update(skip_locked=True)), old))
    old = _too_old(Creation, at)
    creations = select(Creation.object_id).where(old).order_by(Creation.created_at).limit(limit)
    session.execute(delete(Creation).where(Creation.object_id.in_(creations.with_for_update(skip_locked=True)), old))


def _too_old(model: type[Answer] | type[Creation], at: float) -> ColumnElement[bool]:
    return model.created_at <= at - (KEPT_S if model is Answer else REMOVED_AFTER_S)
