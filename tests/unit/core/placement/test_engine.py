"""Batches, questions, and what a decision keeps."""

import json
from collections.abc import Callable

import numpy as np
import pytest

from trimtab_controller.core.placement import (
    BEST_FIT,
    POLICIES,
    Books,
    Decision,
    DiskNeed,
    FleetSnapshot,
    HostSnapshot,
    HostVerdict,
    NetworkNeed,
    PlacementRequest,
    decide,
    explain,
    explain_host,
    in_fair_order,
    place,
    why_not,
)
from trimtab_controller.core.placement.ranking import best_positions
from trimtab_controller.core.placement.verdict import KEPT_HOSTS
from trimtab_protos.messages import Firmware

MakeHost = Callable[..., HostSnapshot]
MakeRequest = Callable[..., PlacementRequest]


def test_requests_of_one_batch_see_what_earlier_ones_were_given(make_host: MakeHost, make_request: MakeRequest) -> None:
    fleet = FleetSnapshot.of([make_host("node1"), make_host("node2")])
    decisions = place(fleet, [make_request(request_id=f"op-{i}", vcpus=10, order=i) for i in range(3)])
    assert [decision.chosen_host_id for decision in decisions] == ["host-node1", "host-node2", None]
    assert [refusal.message for refusal in decisions[2].refused[0].refusals] == ["needs 10 vcpus, 6 free of 16"]


def test_a_project_with_many_requests_does_not_push_another_ones_back(make_request: MakeRequest) -> None:
    greedy = [make_request(request_id=f"op-a{i}", project_id="proj-a", order=i) for i in range(3)]
    modest = [make_request(request_id="op-b", project_id="proj-b", order=9)]
    assert [one.request_id for one in in_fair_order([*greedy, *modest])] == ["op-a0", "op-b", "op-a1", "op-a2"]


def test_within_a_project_priority_goes_before_age_and_age_before_id(make_request: MakeRequest) -> None:
    requests = [
        make_request(request_id="op-c", order=1),
        make_request(request_id="op-b", order=1),
        make_request(request_id="op-a", order=2),
        make_request(request_id="op-d", order=3, priority=5),
    ]
    assert [one.request_id for one in in_fair_order(requests)] == ["op-d", "op-b", "op-c", "op-a"]


def test_each_request_is_placed_by_its_own_policy(make_host: MakeHost, make_request: MakeRequest) -> None:
    fleet = FleetSnapshot.of([make_host("node1", vcpus_claimed=8), make_host("node2")])
    requests = [make_request(request_id="op-1", project_id="packed"), make_request(request_id="op-2", project_id="wide")]
    decisions = place(fleet, requests, policy_of=lambda one: POLICIES["spread"] if one.project_id == "wide" else BEST_FIT)
    assert [(one.policy, one.chosen_host_id) for one in decisions] == [("best-fit", "host-node1"), ("spread", "host-node2")]


def test_a_question_claims_nothing(make_host: MakeHost, make_request: MakeRequest) -> None:
    fleet, request = FleetSnapshot.of([make_host()]), make_request(vcpus=16)
    assert explain(fleet, request) == explain(fleet, request)
    books = Books(fleet)
    decide(books, request, policy=BEST_FIT)
    assert int(books.free["vcpus"][0]) == 16


def test_one_host_is_explained_with_its_score_or_all_its_reasons(make_host: MakeHost, make_request: MakeRequest) -> None:
    fleet = FleetSnapshot.of([make_host("node1"), make_host("node2", is_cordoned=True, vcpus_claimed=16)])
    request = make_request()
    decision = explain(fleet, request)
    for name in ("node1", "node2"):
        assert explain_host(fleet, request, f"host-{name}") == decision.verdict_of(name)
    with pytest.raises(KeyError):
        explain_host(fleet, request, "host-gone")


def test_why_not_tells_the_chosen_the_refused_and_the_less_preferred_apart(
    make_host: MakeHost, make_request: MakeRequest
) -> None:
    hosts = [
        make_host("node1", vcpus_claimed=8, memory_claimed_mib=8000),
        make_host("node2"),
        make_host("node3", is_cordoned=True),
        make_host("node4", vcpus_claimed=8, memory_claimed_mib=8000),
    ]
    fleet, request = FleetSnapshot.of(hosts), make_request()
    assert why_not(fleet, request, "host-node1") == "node1 was chosen, score 0.862"
    assert why_not(fleet, request, "host-node2") == (
        "node2: fits, score 0.238; node1 was preferred with 0.862 (best-fit 0.238 against 0.862)"
    )
    assert why_not(fleet, request, "host-node3") == ("node3: it is cordoned; uncordon it with `trimtab host uncordon node3`")
    assert why_not(fleet, request, "host-node4").endswith("(equal scores: the first by name is taken)")


def test_a_host_that_fits_now_but_did_not_is_told_as_such(make_host: MakeHost, make_request: MakeRequest) -> None:
    request = make_request()
    then = explain(FleetSnapshot.of([make_host(is_cordoned=True)]), request)
    now = explain_host(FleetSnapshot.of([make_host()]), request, "host-node1")
    assert then.why_not(now) == "node1: fits, score 0.238; it did not when the decision was made"


# --- what a decision keeps ---------------------------------------------------------------------------------------------------


def test_a_success_names_every_host_of_a_small_fleet(make_host: MakeHost, make_request: MakeRequest) -> None:
    fleet = FleetSnapshot.of([make_host("node1"), make_host("node2", is_cordoned=True), make_host("node3", vcpus_claimed=15)])
    decision = explain(fleet, make_request())
    assert decision.is_complete
    assert [(one.host_name, one.fits) for one in decision.verdicts] == [("node1", True), ("node2", False), ("node3", False)]
    assert decision.refused_by == {"cordon": 1, "vcpus": 1}
    assert decision.chosen == decision.verdicts[0]


def test_hosts_that_came_closest_stand_first_among_the_refused(make_host: MakeHost, make_request: MakeRequest) -> None:
    fleet = FleetSnapshot.of([make_host("node1", is_cordoned=True, vcpus_claimed=16), make_host("node2", is_cordoned=True)])
    assert [one.host_name for one in explain(fleet, make_request()).refused] == ["node2", "node1"]


def test_the_host_that_was_named_stands_before_those_that_came_closer(make_host: MakeHost, make_request: MakeRequest) -> None:
    hosts = [make_host(f"node{i}") for i in range(30)] + [make_host("named", is_cordoned=True, vcpus_claimed=16)]
    decision = explain(FleetSnapshot.of(hosts), make_request(required_host_id="host-named"), listed_hosts=10)
    assert (decision.refused[0].host_name, len(decision.refused[0].refusals), len(decision.refused)) == ("named", 2, KEPT_HOSTS)


@pytest.fixture
def large_fleet(make_host: MakeHost) -> FleetSnapshot:
    """400 hosts, each a little fuller than the one before; every tenth is cordoned."""
    hosts = [
        make_host(f"node{i:03}", vcpus_limit=1000, vcpus_claimed=i, memory_claimed_mib=10 * i, is_cordoned=i % 10 == 0)
        for i in range(400)
    ]
    return FleetSnapshot.of(hosts)


def test_a_success_in_a_large_fleet_keeps_the_best_and_the_number_of_the_rest(
    large_fleet: FleetSnapshot, make_request: MakeRequest
) -> None:
    decision = explain(large_fleet, make_request())
    assert not decision.is_complete
    assert (decision.host_count, decision.fit_count, decision.refused_by) == (400, 360, {"cordon": 40})
    assert (len(decision.fitting), decision.refused) == (KEPT_HOSTS, ())
    complete = explain(large_fleet, make_request(), listed_hosts=400)
    assert complete.is_complete
    assert complete.fitting.host_names[:KEPT_HOSTS] == decision.fitting.host_names
    assert decision.verdict_of("node000") is None
    assert why_not(large_fleet, make_request(), "host-node000").startswith("node000: it is cordoned")


def test_a_refusal_in_a_large_fleet_keeps_the_hosts_that_came_closest(
    large_fleet: FleetSnapshot, make_request: MakeRequest
) -> None:
    decision = explain(large_fleet, make_request(memory_mib=16000))
    assert (decision.chosen, decision.fit_count, len(decision.refused)) == (None, 0, KEPT_HOSTS)
    assert all(len(one.refusals) == 1 for one in decision.refused)
    assert decision.summary() == (
        "no host of 400 fits web1; refused: 400 by memory, 40 by cordon. "
        "Closest: node001: needs 16000 MiB, 15862 MiB free of 15872 (reserve 1024)"
    )


def test_few_fitting_hosts_of_many_are_ranked_as_all_would_be(large_fleet: FleetSnapshot, make_request: MakeRequest) -> None:
    wide = explain(large_fleet, make_request(), listed_hosts=400)
    narrow = explain(large_fleet, make_request(vcpus=999 - 100), listed_hosts=400)
    fits = set(narrow.fitting.host_names)
    assert narrow.fit_count == 91
    assert [name for name in wide.fitting.host_names if name in fits] == list(narrow.fitting.host_names)


def test_the_best_positions_are_those_of_a_full_sort() -> None:
    rng = np.random.default_rng(3)
    for size in (1, 19, 20, 320, 321, 5000):
        scores = rng.integers(0, 40, size).astype(np.float64)  # many ties
        expected = sorted(range(size), key=lambda position: (-scores[position], position))[:20]
        assert best_positions(scores, count=20).tolist() == expected


# --- told and stored ---------------------------------------------------------------------------------------------------------


def test_the_summary_of_a_success_names_host_policy_and_how_many_fit(make_host: MakeHost, make_request: MakeRequest) -> None:
    decision = explain(FleetSnapshot.of([make_host("node1"), make_host("node2", is_cordoned=True)]), make_request())
    assert decision.summary() == "web1 goes to node1 by best-fit, score 0.238; 1 of 2 hosts fit"
    alone = explain(FleetSnapshot.of([make_host("node1")]), make_request())
    assert alone.summary().endswith("1 of 1 host fit")


def test_the_summary_of_a_refusal_tells_every_host_of_a_small_fleet(make_host: MakeHost, make_request: MakeRequest) -> None:
    fleet = FleetSnapshot.of([make_host("node1", vcpus_claimed=16), make_host("node2", is_cordoned=True)])
    assert explain(fleet, make_request()).summary() == (
        "no host fits web1. node1: needs 2 vcpus, 0 free of 16. "
        "node2: it is cordoned; uncordon it with `trimtab host uncordon node2`"
    )


def test_a_fleet_without_hosts_refuses_and_names_the_cure(make_request: MakeRequest) -> None:
    decision = explain(FleetSnapshot.of([]), make_request(required_host_id="host-x", excluded_host_ids=("host-y",)))
    assert decision.chosen_host_id is None
    assert decision.is_complete
    assert "trimtab host token create NAME" in decision.summary()


def test_a_decision_survives_its_stored_form(make_host: MakeHost, make_request: MakeRequest) -> None:
    fleet = FleetSnapshot.of([make_host("node1"), make_host("node2", host_class="x"), make_host("node3", host_class="x")])
    request = make_request(
        disks=(DiskNeed(name="root", pool_id="pool-x", size_bytes=1, host_id="host-node1", is_claimed=True),),
        networks=(NetworkNeed(network_id="net-1", name="default"),),
        host_class="default",
        firmware=Firmware.UEFI,
        host_selector={"zone": "a"},
        cpu_features=("aes",),
        image_ids=("img-1",),
        excluded_host_ids=("host-z",),
    )
    for decision in (explain(fleet, request), explain(fleet, make_request(host_class="default", image_ids=("img-1",)))):
        document = json.loads(json.dumps(decision.as_json()))
        assert Decision.from_json(document) == decision
        assert len(document["reasons"]) < sum(len(verdict.refusals) for verdict in decision.refused)


def test_a_decision_stored_in_an_unknown_form_is_refused(make_host: MakeHost, make_request: MakeRequest) -> None:
    document = explain(FleetSnapshot.of([make_host()]), make_request()).as_json() | {"format": 2}
    with pytest.raises(ValueError, match="form 2"):
        Decision.from_json(document)


def test_a_request_stored_by_another_release_is_read_by_its_known_fields(make_request: MakeRequest) -> None:
    document = make_request().as_json() | {"invented-later": ["gpu"]}
    for added_later in ("disks", "networks", "firmware", "image_ids", "priority", "cpu_features", "excluded_host_ids"):
        del document[added_later]
    assert PlacementRequest.from_json(document) == make_request()


def test_the_api_shows_scores_of_hosts_that_fit_and_reasons_of_others(make_host: MakeHost, make_request: MakeRequest) -> None:
    fleet = FleetSnapshot.of([make_host("node1"), make_host("node2", is_cordoned=True)])
    fitting, refused = (verdict.as_json() for verdict in explain(fleet, make_request()).verdicts)
    assert fitting == {
        "host_id": "host-node1",
        "host": "node1",
        "fits": True,
        "score": 0.237895,
        "scores": {"best-fit": 0.237895},
        "reasons": [],
    }
    assert refused["fits"] is False
    assert "score" not in refused
    assert refused["reasons"][0]["code"] == "host-cordoned"


def test_a_verdict_fits_exactly_where_it_has_no_refusals() -> None:
    assert HostVerdict("host-a", "a", (), 0.5).fits


def test_a_decision_that_is_read_later_tells_what_was_when_it_was_made(make_host: MakeHost, make_request: MakeRequest) -> None:
    fleet = FleetSnapshot.of([make_host(f"node{number}", vcpus_claimed=number) for number in range(1, 4)])
    books, request = Books(fleet), make_request()
    read_at_once = decide(books, request, policy=BEST_FIT).as_json()
    read_later = decide(books, request, policy=BEST_FIT)
    for _ in range(3):
        books.claim(request, "host-node3")
    assert read_later.as_json() == read_at_once
    assert read_later.chosen_host_id == read_at_once["chosen_host_id"]
