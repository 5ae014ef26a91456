"""What a vm's list of CPU features asks of a host."""

import pytest

from trimtab_controller.core import cpu_features

OWN = frozenset({"aes", "vmx"})


@pytest.mark.parametrize(
    ("features", "missing"),
    [
        ((), ()),
        (("aes", "vmx"), ()),
        (("sha-ni", "aes", "avx2"), ("avx2", "sha-ni")),
        (("-vmx",), ()),
        (("-svm",), ()),
        (("?vmx",), ()),
        (("?svm",), ()),
        (("-svm", "?avx", "sha-ni"), ("sha-ni",)),
    ],
)
def test_a_host_must_have_what_is_required_and_nothing_else(features: tuple[str, ...], missing: tuple[str, ...]) -> None:
    assert cpu_features.missing(features, OWN) == missing


def test_a_running_guest_needs_the_optional_ones_that_its_host_gave_it() -> None:
    assert cpu_features.of_running(("aes", "-svm", "?vmx", "?sha-ni"), OWN) == ("aes", "-svm", "vmx")
    assert cpu_features.has_optional(("aes", "?vmx"))
    assert not cpu_features.has_optional(("aes", "-vmx"))


def test_an_adopted_domains_features_are_kept_and_what_no_vm_can_have_is_told() -> None:
    features, changes = cpu_features.of_adopted(("aes", "-vmx", "?svm", "!mpx", "+hle"))
    assert features == ("aes", "-vmx", "?svm", "-mpx", "hle")
    assert changes == (
        "CPU feature mpx is disabled instead of forbidden: the vm starts also where the host has it",
        "CPU feature hle is required instead of forced: the vm starts only where the host has it",
    )
