"""Cursor paging as OpenAI has it: newest first, `after` the last id of the page before."""

from typing import Annotated, Any, TypeVar

from fastapi import Query
from sqlalchemy import Select, tuple_
from sqlalchemy.orm import Session

from shared.errors import BadRequest

Limit = Annotated[int, Query(ge=1, le=100)]
FilesLimit = Annotated[int, Query(ge=1, le=10_000)]
"""OpenAI's bounds differ from noun to noun."""
After = Annotated[str | None, Query(max_length=128)]
Row = TypeVar("Row")


def page(
    session: Session,
    query: Select[Row],
    model: Any,
    *,
    after: str | None,
    limit: int,
    ascending: bool = False,
) -> tuple[list[Row], bool]:
    """One page of `query` ordered by (created_at, id), and whether more follow.

    The cursor is a row, not an offset: rows that arrive in between neither repeat nor hide any.

    Raises:
        BadRequest: `after` names no row of the list, or one that is gone by now.
    """
    key = tuple_(model.created_at, model.id)
    if after is not None:
        cursor: Any = session.scalar(query.where(model.id == after))  # within the caller's project, by the query itself
        if cursor is None:
            raise BadRequest(
                f"after={after!r} is not the id of an object in this list: it is unknown here, or was deleted, or has "
                "expired; begin again without `after`",
                param="after",
            )
        mark = tuple_(cursor.created_at, cursor.id)
        query = query.where(key > mark if ascending else key < mark)
    columns = (model.created_at, model.id)
    ordered = query.order_by(*(column.asc() if ascending else column.desc() for column in columns))
    rows = list(session.scalars(ordered.limit(limit + 1)))
    return rows[:limit], len(rows) > limit
