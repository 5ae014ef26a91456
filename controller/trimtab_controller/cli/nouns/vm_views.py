"""How a vm and the decision about its host are shown to people."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from trimtab_controller.cli import humanise, render
from trimtab_controller.cli.render import Column, Document
from trimtab_controller.cli.session import Session


def observed(item: Document, _now: datetime) -> str:
    """Return `running`, `unknown`; a deleted vm says so."""
    if item.get("deleted_at"):
        return "deleted"
    return str(render.at(item, "observed.state") or "unknown")


def observed_age(item: Document, now: datetime) -> str:
    age_s = render.at(item, "observed.age_s")
    if age_s is not None:
        return humanise.ago(float(age_s))
    return humanise.since(render.at(item, "observed.at"), now) or "never"


def _memory(item: Document, _now: datetime) -> str:
    return humanise.mib(render.at(item, "shape.memory_mib"))


def _addresses(item: Document, _now: datetime) -> str:
    return ",".join(str(one).split("/")[0] for one in addresses(item))


def addresses(item: Document) -> Sequence[str]:
    """Return what was seen in the guest, else what was declared for its nics."""
    seen = render.at(item, "observed.addresses") or []
    return seen or [address for nic in item.get("nics") or [] for address in nic.get("addresses") or []]


def activity(item: Document, _now: datetime) -> str:
    """Return what is being done to it, else what is wrong with it, else that somebody changed it by hand."""
    operation = item.get("operation")
    if isinstance(operation, Mapping):
        percent = render.at(operation, "progress.percent")
        return f"{operation.get('kind', '')} {operation.get('state', '')}" + (f" {percent:.0f}%" if percent else "")
    return str(operation or item.get("problem") or drift(item))


def drift(item: Document) -> str:
    """Return `changed by hand: memory_mib, vcpus`; '' where nothing was."""
    fields = item.get("hand_changes") or []
    return f"changed by hand: {', '.join(fields[:2])}{' and more' if len(fields) > 2 else ''}" if fields else ""


def _created(item: Document, now: datetime) -> str:
    return humanise.since(item.get("created_at"), now)


COLUMNS = (
    Column("name", "name"),
    Column("state", "observed.state", observed),
    Column("observed", "observed.at", observed_age),
    Column("host", "host"),
    Column("vcpus", "shape.vcpus"),
    Column("memory", "shape.memory_mib", _memory),
    Column("addresses", "observed.addresses", _addresses),
    Column("id", "id", is_wide=True),
    Column("desired", "desired.power", is_wide=True),
    Column("image", "image", is_wide=True),
    Column("epoch", "epoch", is_wide=True),
    Column("labels", "labels", is_wide=True),
    Column("created", "created_at", _created, is_wide=True),
    Column("drift", "hand_changes", is_wide=True),
    Column("activity", "operation", activity),
)


def outcome(item: Document) -> str:
    """Return the sentence after an operation on a vm."""
    name, moment = item.get("name") or item.get("subject", {}).get("name", ""), render.now()
    state = observed(item, moment)
    place = f" on {item['host']}" if item.get("host") and state not in {"stopped", "absent", "deleted"} else ""
    problem = f"; {item['problem']}" if item.get("problem") else ""
    return f"vm {name} is {state}{place} (observed {observed_age(item, moment)}){problem}"


def describe(item: Document) -> None:
    """Print everything about a vm that a person asks for."""
    moment = render.now()
    form: Mapping[str, Any] = item.get("shape") or {}
    state = observed(item, moment)
    reason = render.at(item, "observed.reason")
    because = f" ({reason})" if reason else ""
    place = f" on {render.at(item, 'observed.host')}" if render.at(item, "observed.host") else ""
    render.pairs(
        [
            ("name", str(item.get("name", ""))),
            ("id", str(item.get("id", ""))),
            ("project", str(item.get("project", ""))),
            ("state", f"{state}{because}{place}, observed {observed_age(item, moment)}"),
            ("desired", str(render.at(item, "desired.power") or "")),
            ("host", str(item.get("host") or "none")),
            ("problem", str(item.get("problem") or "")),
            ("changed by hand", _hand_changes(item)),
            ("now", activity(item, moment) if item.get("operation") else ""),
            ("shape", _shape_line(form)),
            ("resources", resources_line(form, left_mib=render.at(item, "observed.balloon_mib"))),
            ("host loss", _survival(item)),
            ("start group", start_group(item)),
            ("qemu", _qemu(item)),
            ("cpu", " ".join(str(form[key]) for key in ("os", "arch", "machine", "cpu_model", "firmware") if form.get(key))),
            ("image", str(item.get("image") or "")),
            ("cdrom", str(item.get("cdrom") or "empty") if item.get("cdrom") is not None else ""),
            ("drivers", str(item.get("drivers") or "")),
            ("addresses", _addresses(item, moment)),
            ("floating", ", ".join(str(nic["floating"]) for nic in item.get("nics") or [] if nic.get("floating"))),
            ("secgroups", ",".join(item.get("secgroups") or [])),
            ("labels", render.as_text(item.get("labels"))),
            ("epoch", render.as_text(item.get("epoch"))),
            ("version", f"{item.get('version', '')} (etag {item.get('etag', '')})"),
            ("created", f"{item.get('created_at', '')} ({_created(item, moment)})"),
            ("deleted", str(item.get("deleted_at") or "")),
            ("purged", humanise.since(item.get("purge_after"), moment) if item.get("purge_after") else ""),
        ]
    )
    _parts("disks", item.get("volumes") or [], ("index", "name", "pool", "size_bytes"))
    _parts("nics", item.get("nics") or [], ("index", "network", "network_kind", "mac", "addresses", "floating", "id"))


def _qemu(item: Document) -> str:
    running, installed = (str(render.at(item, f"observed.{name}") or "") for name in ("qemu", "installed_qemu"))
    return f"runs {running}, its host has {installed}: until it moves or stops" if running else ""


def shape(form: Mapping[str, Any]) -> str:
    """Return `2 vcpus, 1 GiB (up to 4 vcpus)`."""
    vcpus, memory = form.get("vcpus"), humanise.mib(form.get("memory_mib"))
    more = []
    if form.get("vcpus_max") not in {None, vcpus}:
        more.append(f"{form['vcpus_max']} vcpus")
    if form.get("memory_max_mib") not in {None, form.get("memory_mib")}:
        more.append(humanise.mib(form["memory_max_mib"]))
    return f"{vcpus} vcpus, {memory}" + (f" (up to {', '.join(more)})" if more else "")


def _hand_changes(item: Document) -> str:
    fields = ", ".join(item.get("hand_changes") or [])
    return f"{fields}; see `trimtab vm diff {item.get('name', '')}`" if fields else ""


def resources_line(form: Mapping[str, Any], *, left_mib: int | None = None) -> str:
    """Return `cpu class low, a balloon down to 512 MiB (leaves it 1 GiB)`; '' where nothing is said."""
    parts = [f"cpu class {form['cpu_class']}"] if form.get("cpu_class") else []
    left = f" (leaves it {humanise.mib(left_mib)})" if left_mib else ""
    parts += [f"a balloon down to {humanise.mib(form['balloon_min_mib'])}{left}"] if form.get("balloon_min_mib") else []
    return ", ".join(parts)


def _survival(item: Document) -> str:
    """Return `restart, priority 10, 30 s after`: what becomes of it when its host dies; '' where nothing was said of it."""
    if not item.get("ha") or (item["ha"] == "none" and not item.get("priority")):
        return ""
    delay = f", {item['start_delay_s']} s after" if item.get("start_delay_s") else ""
    return f"{item['ha']}, priority {item.get('priority', 0)}{delay}"


def start_group(item: Document) -> str:
    """Return `shop, order 2`; '' where it is in none."""
    return f"{item['start_group']}, order {item.get('start_order', 0)}" if item.get("start_group") else ""


def waiting(form: Mapping[str, Any]) -> str:
    """Return what waits for the next stop: `4 vcpus, 2 GiB`; '' where nothing does."""
    parts = [f"{form['next_vcpus']} vcpus"] if form.get("next_vcpus") else []
    parts += [humanise.mib(form["next_memory_mib"])] if form.get("next_memory_mib") else []
    return ", ".join(parts)


def _shape_line(form: Mapping[str, Any]) -> str:
    return shape(form) + (f"; at its next stop {waiting(form)}" if waiting(form) else "")


_HEADS = {"size_bytes": "size", "network_kind": "kind"}


def _parts(title: str, parts: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    if not parts:
        return
    render.heading(title)
    rows = [
        [humanise.size(part.get(key)) if key == "size_bytes" else humanise.plain(render.as_text(part.get(key))) for key in keys]
        for part in parts
    ]
    render.table([_HEADS.get(key, key).upper() for key in keys], rows)


def show_decision(session: Session, decision: Document, name: str, *, why_not: str = "") -> None:
    """Print a placement decision: the host that was chosen, then each other one with its reasons."""
    verdicts = decision.get("verdicts") or []
    if session.output == "name":
        render.write_line(str(decision.get("host") or ""))
    elif session.output in {"json", "yaml"} or session.columns:
        render.show_one(session, decision, DECISION_COLUMNS)
    elif why_not:
        _say_why_not(decision, verdicts, name, why_not)
    else:
        _say_decision(decision, verdicts, name)


DECISION_COLUMNS = (
    Column("vm", "vm"),
    Column("host", "host"),
    Column("policy", "policy"),
    Column("decided_at", "decided_at"),
    Column("fleet_revision", "fleet_revision"),
    Column("summary", "summary"),
    Column("verdicts", "verdicts"),
)


def _say_decision(decision: Document, verdicts: Sequence[Mapping[str, Any]], name: str) -> None:
    chosen = str(decision.get("host") or "")
    moment = render.now()
    render.write_line(render.coloured(f"{name}: {chosen or 'no host fits'}", "up" if chosen else "refused"))
    if decision.get("summary"):
        render.write_line(humanise.plain(decision["summary"]))
    policy = f" by policy {decision['policy']}" if decision.get("policy") else ""
    decided = humanise.since(decision.get("decided_at"), moment)
    revision = decision.get("fleet_revision")
    known = f", on what events up to {revision} told" if revision is not None else ""
    if decided or policy:
        render.write_line(f"decided {decided}{policy}{known}")
    ordered = sorted(verdicts, key=lambda one: (one.get("host") != chosen, not one.get("fits"), -(one.get("score") or 0.0)))
    rows = []
    for one in ordered:
        verdict = "chosen" if chosen and one.get("host") == chosen else _verdict(one)
        first, *more = reasons_of(one) or [_scores(one)]
        rows.append([verdict, str(one.get("host", "")), _score(one), first])
        rows += [["", "", "", reason] for reason in more]
    if rows:
        render.write_line("")
        render.table(["VERDICT", "HOST", "SCORE", "WHY"], rows)
    left_out = int(decision.get("host_count") or 0) - len(verdicts)
    if left_out > 0:
        refused = ", ".join(f"{count} by {name}" for name, count in (decision.get("refused_by") or {}).items())
        render.write_line(f"and {left_out} more hosts" + (f" (refused in all: {refused})" if refused else ""))


def _say_why_not(decision: Document, verdicts: Sequence[Mapping[str, Any]], name: str, host: str) -> None:
    verdict = next((one for one in verdicts if one.get("host") == host), None)
    sentence = decision.get("why_not")
    if not sentence:
        sentence = _why_not_sentence(str(decision.get("host") or ""), verdict, verdicts, name=name, host=host)
    render.write_line(humanise.plain(sentence))
    for reason in reasons_of(verdict or {}):
        render.write_line(f"  {reason}")


def _why_not_sentence(
    chosen: str, verdict: Mapping[str, Any] | None, verdicts: Sequence[Mapping[str, Any]], *, name: str, host: str
) -> str:
    """Return the answer from the verdicts, where the controller gave no sentence of its own."""
    if chosen == host:
        return f"{name} is on {host}: it was chosen"
    if verdict is None:
        return f"{host} is not among the hosts kept of the last decision about {name}"
    if not verdict.get("fits"):
        return f"{host} does not fit {name}:"
    best = next((one for one in verdicts if one.get("host") == chosen), None)
    against = f"; {chosen} scored {_score(best)}" if best is not None else ""
    return f"{host} fits {name} and scored {_score(verdict)}{against}"


def _verdict(verdict: Mapping[str, Any]) -> str:
    return "fits" if verdict.get("fits") else "refused"


def _scores(verdict: Mapping[str, Any]) -> str:
    """Return what the score is made of: `best-fit 0.82`."""
    scores: Mapping[str, Any] = verdict.get("scores") or {}
    return ", ".join(f"{name} {value:.3f}" for name, value in scores.items())


def _score(verdict: Mapping[str, Any]) -> str:
    score = verdict.get("score")
    return "-" if score is None else f"{score:.3f}" if isinstance(score, float) else str(score)


def reasons_of(verdict: Mapping[str, Any]) -> list[str]:
    """Return `filter: message [code]` per reason."""
    found = []
    for reason in verdict.get("reasons") or []:
        if not isinstance(reason, Mapping):
            found.append(humanise.plain(reason))
            continue
        source = reason.get("filter") or reason.get("scorer") or ""
        code = f" [{reason['code']}]" if reason.get("code") else ""
        found.append(humanise.plain(f"{source + ': ' if source else ''}{reason.get('message', '')}{code}"))
    return found
