"""A running API over SQLite, and over each kind of database for what depends on it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.api.kit import Api, running_api


@pytest.fixture
async def api(sqlite_url: str, tmp_path: Path) -> AsyncIterator[Api]:
    async with running_api(sqlite_url, tmp_path) as running:
        yield running


@pytest.fixture
async def api_on_each(database_url: str, tmp_path: Path) -> AsyncIterator[Api]:
    async with running_api(database_url, tmp_path) as running:
        yield running
