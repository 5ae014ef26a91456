"""Where the other members of the vm's group are: together with them, or apart, by any failure domain."""

from collections import Counter

from trimtab_controller.core.placement.books import Trial
from trimtab_controller.core.placement.filters.base import Filter, Reads
from trimtab_controller.core.placement.fleet import ALL, HOST, NOWHERE, Mask, Rows, at_rows
from trimtab_controller.core.placement.needs import GroupRule, Relation
from trimtab_controller.core.placement.verdict import Context, Refusal


def members_by_domain(trial: Trial, rule: GroupRule) -> Counter[int]:
    """Return how many other members of the vm's group are in each domain of the rule, by the domain's code."""
    group = trial.request.group
    if group is None:
        return Counter()
    return trial.books.members.by_domain(group.group_id, rule.domain, but=trial.request.vm_id)


def _must(trial: Trial) -> tuple[GroupRule, ...]:
    group = trial.request.group
    return tuple([rule for rule in group.rules if rule.is_must]) if group is not None else ()


def _obeys_group(trial: Trial, rows: Rows = ALL) -> Mask | None:
    fits: Mask | None = None
    for rule in _must(trial):
        mask = _obeying(trial, rule)
        if fits is None:
            fits = mask
        else:
            fits &= mask
    return None if fits is None else at_rows(fits, rows)


def _obeying(trial: Trial, rule: GroupRule) -> Mask:
    """Ask only about domains that hold members: where none is, the answer is the same everywhere."""
    fleet, members = trial.fleet, members_by_domain(trial, rule)
    if rule.relation is Relation.APART:
        return fleet.outside(rule.domain, [code for code, count in members.items() if count >= rule.limit])
    if members:
        return fleet.inside(rule.domain, [code for code in members if code != NOWHERE])
    return fleet.outside(rule.domain, ())


def _refusal_of(rule: GroupRule, members: Counter[int], code: int) -> str | None:
    """Return the code of what stands against a domain, None where nothing does."""
    if code == NOWHERE:
        return "group-domain-missing"
    if rule.relation is Relation.APART:
        return "group-domain-full" if members[code] >= rule.limit else None
    return "group-elsewhere" if members and code not in members else None


def _breaks_group(trial: Trial, row: int) -> tuple[Refusal, ...]:
    group = trial.request.group
    if group is None:
        return ()
    found = []
    for rule in _must(trial):
        domains, members = trial.fleet.domains(rule.domain), members_by_domain(trial, rule)
        domain_code = int(domains.codes[row])
        code = _refusal_of(rule, members, domain_code)
        if code is None:
            continue
        here = "it" if rule.domain == HOST else f"{rule.domain} {domains.names[domain_code]}" if domain_code >= 0 else ""
        match code:
            case "group-domain-missing":
                told = f"it has no label {rule.domain}"
            case "group-domain-full":
                told = f"{here} has {members[domain_code]} of its members"
            case _:
                told = f"{here} has none of its members"
        message = f"group {group.name} {rule}: {told}"
        context: Context = {"group": group.name, "domain": rule.domain, "members": members[domain_code], "limit": rule.limit}
        found.append(Refusal("group", code, message, context))
    return tuple(found)


FILTERS = (Filter("group", _obeys_group, _breaks_group, Reads.BOOKS),)
