"""Sets of cpus as text and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab_controller.core import cpu_sets
from trimtab_protos.errors import InvalidRequest


@given(st.frozensets(st.integers(0, 300)))
def test_text_and_set_say_the_same(cpus: frozenset[int]) -> None:
    assert cpu_sets.parse(cpu_sets.text_of(cpus), field="f") == cpus


def test_neighbours_are_one_range() -> None:
    assert cpu_sets.text_of({4, 5, 6, 9, 11, 12}) == "4-6,9,11-12"


@pytest.mark.parametrize("text", ["a", "4-", "-4", "7-4", "9000", "1-99999", "٤"])
def test_what_is_no_set_of_cpus_is_refused_with_the_field(text: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        cpu_sets.parse(text, field="dedicated_cpus")
    assert refused.value.context["field"] == "dedicated_cpus"
