"""What the environment may say, and how a mistake in it is told."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from shared.settings import Settings


@pytest.mark.parametrize(
    ("url", "folder"),
    [
        (None, "/data/storage"),
        ("/srv/anneal", "/srv/anneal"),
        ("file:///srv/a b", "/srv/a b"),
        ("local:///srv", "/srv"),
    ],
)
def test_a_path_or_a_file_url_is_a_folder(url: str | None, folder: str) -> None:
    settings = Settings(data=Path("/data"), storage_url=url)
    assert settings.storage_is_folder
    assert settings.storage_root == Path(folder)


def test_a_bucket_is_no_folder() -> None:
    settings = Settings(storage_url="s3://bucket/prefix")
    assert not settings.storage_is_folder
    with pytest.raises(ValueError, match="no folder"):
        _ = settings.storage_root


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s4://bucket", "no folder and no object store; give a path, or a bucket as in s3://bucket/prefix"),
        ("s3://", "give a path, or a bucket"),
        ("s3:///prefix", "give a path, or a bucket"),
        ("simplecache::s3://bucket", "give a path, or a bucket"),
        ("oci://bucket", "needs the package ocifs; run `pip install ocifs`"),
    ],
)
def test_storage_that_can_not_be_opened_is_refused_at_once_with_the_next_step(url: str, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Settings(storage_url=url)
