"""client.fine_tuning.jobs.list and list_events: pages, filters, order."""

from typing import Any

import pytest
from openai import BadRequestError, OpenAI
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent

from tests.sdk.behaviours.conftest import CreateJob
from tests.sdk.runs import Runs


@pytest.fixture
def five(create_job: CreateJob, tag: dict[str, str]) -> list[FineTuningJob]:
    """Oldest first."""
    return [create_job(metadata=tag | {"number": str(number)}) for number in range(5)]


def test_the_list_begins_with_the_newest(five: list[FineTuningJob], client: OpenAI) -> None:
    page = client.fine_tuning.jobs.list(limit=5)
    assert [job.id for job in page.data] == [job.id for job in reversed(five)]
    assert page.has_more is True
    assert all(type(job) is FineTuningJob for job in page.data)


@pytest.mark.parametrize("limit", [1, 2, 4, 5, 100])
def test_pages_of_any_size_hold_every_job_once(
    limit: int, five: list[FineTuningJob], client: OpenAI, tag: dict[str, str]
) -> None:
    listed = list(client.fine_tuning.jobs.list(limit=limit, metadata=tag))
    assert [job.id for job in listed] == [job.id for job in reversed(five)]


def test_after_takes_the_last_id_of_the_page_before(five: list[FineTuningJob], client: OpenAI) -> None:
    page = client.fine_tuning.jobs.list(after=five[3].id, limit=2)
    assert [job.id for job in page.data] == [five[2].id, five[1].id]


def test_pages_are_turned_by_hand(five: list[FineTuningJob], client: OpenAI, tag: dict[str, str]) -> None:
    page = client.fine_tuning.jobs.list(limit=3, metadata=tag)
    assert page.has_next_page()
    following = page.get_next_page()
    assert [job.id for job in following.data] == [five[1].id, five[0].id]
    assert not following.has_next_page()


def test_a_job_created_while_paging_neither_repeats_nor_hides_one(
    five: list[FineTuningJob], client: OpenAI, create_job: CreateJob, tag: dict[str, str]
) -> None:
    seen = []
    for job in client.fine_tuning.jobs.list(limit=2, metadata=tag):
        seen.append(job.id)
        create_job(metadata=tag)
    assert seen == [job.id for job in reversed(five)]


def test_metadata_filters_by_every_key(five: list[FineTuningJob], client: OpenAI, tag: dict[str, str]) -> None:
    listed = list(client.fine_tuning.jobs.list(metadata=tag | {"number": "3"}))
    assert [job.id for job in listed] == [five[3].id]


@pytest.mark.parametrize("value", ["", "with space", "Ünïcödé", "a&b=c", "[x]", "null"])
def test_metadata_filters_by_any_value(value: str, client: OpenAI, create_job: CreateJob, tag: dict[str, str]) -> None:
    job = create_job(metadata=tag | {"odd": value})
    create_job(metadata=tag | {"odd": "another"})
    assert [one.id for one in client.fine_tuning.jobs.list(metadata=tag | {"odd": value})] == [job.id]


@pytest.mark.parametrize("key", ["dotted.key", "with space", 'quo"te', "Ünï"])
def test_metadata_filters_by_any_key(key: str, client: OpenAI, create_job: CreateJob) -> None:
    job = create_job(metadata={key: "v"})
    assert job.id in [one.id for one in client.fine_tuning.jobs.list(metadata={key: "v"})]


def test_a_filter_that_nothing_meets_lists_nothing(client: OpenAI) -> None:
    page = client.fine_tuning.jobs.list(metadata={"nobody": "has it"})
    assert (page.data, page.has_more) == ([], False)


def test_jobs_without_metadata_are_listed_by_null(client: OpenAI, create_job: CreateJob) -> None:
    job = create_job()
    with_some = create_job(metadata={"some": "thing"})
    listed = [one.id for one in client.fine_tuning.jobs.list(extra_query={"metadata": "null"}, limit=100)]
    assert job.id in listed
    assert with_some.id not in listed


@pytest.mark.parametrize(
    ("query", "param"), [({"limit": 0}, "limit"), ({"limit": 101}, "limit"), ({"after": "ftjob-nope"}, "after")]
)
def test_a_bound_of_the_list_is_told(query: dict[str, Any], param: str, client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as raised:
        client.fine_tuning.jobs.list(**query)
    assert raised.value.param == param


def test_events_begin_with_the_newest(client: OpenAI, create_job: CreateJob) -> None:
    job = create_job()
    client.fine_tuning.jobs.cancel(job.id)
    page = client.fine_tuning.jobs.list_events(job.id)
    assert all(type(event) is FineTuningJobEvent for event in page.data)
    assert [event.level for event in page.data] == ["info"] * len(page.data)
    assert "cancelled" in page.data[0].message
    assert page.data[-1].message == f"Created fine-tuning job: {job.id}"
    assert page.has_more is False


@pytest.mark.parametrize("limit", [1, 3, 7, 100])
def test_pages_of_any_size_hold_every_event_once(limit: int, client: OpenAI, runs: Runs) -> None:
    job = runs.finished.result(600)
    whole = [event.id for event in client.fine_tuning.jobs.list_events(job.id, limit=1000)]
    assert len(set(whole)) == len(whole) > 7
    assert [event.id for event in client.fine_tuning.jobs.list_events(job.id, limit=limit)] == whole


def test_events_after_one_are_older(client: OpenAI, create_job: CreateJob) -> None:
    job = create_job()
    newest, *older = client.fine_tuning.jobs.list_events(job.id).data
    assert client.fine_tuning.jobs.list_events(job.id, after=newest.id).data == older


def test_after_must_be_an_event_of_the_job(client: OpenAI, create_job: CreateJob) -> None:
    stranger = client.fine_tuning.jobs.list_events(create_job().id).data[0]
    with pytest.raises(BadRequestError) as raised:
        client.fine_tuning.jobs.list_events(create_job().id, after=stranger.id)
    assert raised.value.param == "after"
