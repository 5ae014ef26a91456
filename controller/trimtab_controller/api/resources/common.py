"""What several resources share."""

from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ListOf(Generic[T]):
    """One page of a list."""

    items: tuple[T, ...]
    # '' on the last page.
    next_page_token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    id: str
    name: str
