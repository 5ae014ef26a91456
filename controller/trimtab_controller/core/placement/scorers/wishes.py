"""What is wished and not required: the soft rules of the vm's group, taints to avoid, hosts that can be proven off for vms that shall
restart elsewhere, scarce hosts left to those who need them."""

import numpy as np

from trimtab_controller.core.placement.books import Trial
from trimtab_controller.core.placement.filters.base import Reads
from trimtab_controller.core.placement.filters.groups import members_by_domain
from trimtab_controller.core.placement.fleet import HOST, NOWHERE, Floats, Rows, at_rows
from trimtab_controller.core.placement.needs import GroupRule, Relation
from trimtab_controller.core.placement.scorers.base import Scorer
from trimtab_controller.core.placement.snapshot import Taint, TaintEffect


def _group(trial: Trial, rows: Rows) -> Floats | None:
    """The mean over the soft rules: 1 where a rule is kept, less the more members are too many in the domain."""
    group = trial.request.group
    rules = [rule for rule in group.rules if not rule.is_must] if group is not None else []
    if not rules:
        return None
    total = np.zeros(len(trial.fleet))[rows]
    for rule in rules:
        total += _kept(trial, rule)[rows]
    total /= len(rules)
    return total


def _kept(trial: Trial, rule: GroupRule) -> Floats:
    domains, members = trial.fleet.domains(rule.domain), members_by_domain(trial, rule)
    is_open = rule.relation is Relation.APART or not members
    scores = np.full(len(domains.names) + 1, 1.0 if is_open else 0.0)
    for code, count in members.items():
        scores[code] = 1.0 / (1 + max(0, count + 1 - rule.limit)) if rule.relation is Relation.APART else 1.0
    scores[NOWHERE] = 0.0
    kept: Floats = scores[:-1] if rule.domain == HOST else scores[domains.codes]
    return kept


def _taints(trial: Trial, rows: Rows) -> Floats | None:
    tolerations = trial.request.tolerations

    def is_avoided(taints: frozenset[Taint]) -> bool:
        avoided = (taint for taint in taints if taint.effect is TaintEffect.AVOID)
        return any(not any(one.covers(taint) for one in tolerations) for taint in avoided)

    if not trial.fleet.remembered(("taints",), lambda: [any(host.taints for host in trial.fleet.hosts)])[0]:
        return None
    return (~at_rows(trial.fleet.where("taints", ("avoided", tolerations), is_avoided), rows)).astype(np.float64)


def _spare(trial: Trial, rows: Rows) -> Floats | None:
    """1 for hosts without devices and cpus for pinning, where the vm needs neither and some host has them."""
    request = trial.request
    if request.devices or request.is_dedicated:
        return None
    scarce = trial.fleet.where_equal("is_scarce", True)
    if not trial.fleet.remembered(("any-scarce",), lambda: [bool(scarce.any())])[0]:
        return None
    return (~at_rows(scarce, rows)).astype(np.float64)


def _protected(trial: Trial, rows: Rows) -> Floats | None:
    """1 for hosts that can be proven off, where the vm shall restart elsewhere and not all hosts are alike."""
    if not trial.request.restarts_elsewhere:
        return None
    protected = trial.fleet.where_equal("can_be_proven_off", True)
    if trial.fleet.remembered(("alike-proven-off",), lambda: [bool(protected.all() or not protected.any())])[0]:
        return None
    return at_rows(protected, rows).astype(np.float64)


GROUP = Scorer("group", _group, Reads.BOOKS)
TAINTS = Scorer("taints", _taints, Reads.FLEET)
PROTECTED = Scorer("protected", _protected, Reads.FLEET)
SPARE = Scorer("spare", _spare, Reads.FLEET)
