"""Parses what lists are asked with: size, token, filter, selector, order."""

import base64
import binascii
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Annotated

from fastapi import Query, Request

from trimtab_controller.api.fields import LABEL_KEY_PATTERN, LABEL_VALUE_PATTERN, is_bad_text
from trimtab_controller.store import keyset
from trimtab_protos.errors import InvalidRequest

PAGE_SIZE = 100
PAGE_SIZE_MAX = 1000
_LABEL_KEY, _LABEL_VALUE = re.compile(LABEL_KEY_PATTERN), re.compile(LABEL_VALUE_PATTERN)

PageSize = Annotated[int, Query(ge=1, le=PAGE_SIZE_MAX, examples=[100], description="Items per page.")]
PageToken = Annotated[
    str,
    Query(
        max_length=1000,
        examples=["WyI5ZjAyIiwid2ViMSIsInZtLTEiXQ"],
        description="`next_page_token` of the page before, with the same parameters.",
    ),
]
FilterText = Annotated[
    str, Query(alias="filter", max_length=1000, examples=["state=running"], description="Comma list of `field=value`.")
]
SelectorText = Annotated[str, Query(max_length=1000, examples=["tier=web"], description="Labels: comma list of `key=value`.")]
OrderBy = Annotated[
    str, Query(max_length=100, examples=["created_at desc"], description="`name` or `created_at`, ` desc` after it or not.")
]


@dataclass(frozen=True, slots=True)
class ListQuery:
    """The parsed parameters of a list; `digest` ties page tokens to them."""

    page: keyset.Page
    digest: str

    def next_token(self, next_after: tuple[str, str] | None) -> str:
        """Return the token of the page after; '' on the last."""
        if next_after is None:
            return ""
        return base64.urlsafe_b64encode(json.dumps([self.digest, *next_after]).encode()).decode().rstrip("=")


async def list_query(
    request: Request,
    page_size: PageSize = PAGE_SIZE,
    page_token: PageToken = "",
    filter_text: FilterText = "",
    selector: SelectorText = "",
    order_by: OrderBy = "",
) -> ListQuery:
    """Parse the parameters common to lists of named things."""
    return parse(
        request,
        page_size=page_size,
        page_token=page_token,
        filter_text=filter_text,
        selector=selector,
        order_by=order_by or "name",
    )


def parse(request: Request, *, page_size: int, page_token: str, filter_text: str, selector: str, order_by: str) -> ListQuery:
    column, _, direction = order_by.strip().partition(" ")
    if direction not in {"", "asc", "desc"}:
        raise InvalidRequest("order-unknown", 'order_by: `FIELD` or `FIELD desc`, as in "created_at desc"', field="order_by")
    digest = hashlib.sha256("\n".join((request.url.path, filter_text, selector, order_by)).encode()).hexdigest()[:16]
    page = keyset.Page(
        limit=page_size,
        order_by=column,
        is_descending=direction == "desc",
        after=_parse_token(page_token, digest) if page_token else None,
        filters=parse_pairs(filter_text, field="filter"),
        labels=_parse_selector(selector),
    )
    return ListQuery(page, digest)


def parse_pairs(text: str, *, field: str) -> dict[str, str]:
    """Return {field: value} of `a=1,b=2`. InvalidRequest says what is wrong with it."""
    if is_bad_text(text):
        raise InvalidRequest(f"{field}-wrong", f"{field}: text with a NUL or half of a surrogate pair", field=field)
    found: dict[str, str] = {}
    for part in filter(None, (one.strip() for one in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals or not name or name in found:
            raise InvalidRequest(
                f"{field}-wrong", f'{field}: a comma list of name=value, each name once, as in "a=1,b=2"', field=field
            )
        found[name.strip()] = value.strip()
    return found


def _parse_selector(text: str) -> dict[str, str]:
    labels = parse_pairs(text, field="selector")
    for key, value in labels.items():
        if not _LABEL_KEY.fullmatch(key) or not _LABEL_VALUE.fullmatch(value):
            raise InvalidRequest("selector-wrong", f"selector: {key[:63]!r} or its value is no label", field="selector")
    return labels


def _parse_token(text: str, digest: str) -> tuple[str, str]:
    refusal = InvalidRequest(
        "page-token", "page_token: not of this list with these parameters; start again without it", field="page_token"
    )
    try:
        parts = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (ValueError, binascii.Error, RecursionError) as error:
        raise refusal from error
    if not (isinstance(parts, list) and len(parts) == 3 and all(isinstance(one, str) and not is_bad_text(one) for one in parts)):
        raise refusal
    if parts[0] != digest:
        raise refusal
    return parts[1], parts[2]
