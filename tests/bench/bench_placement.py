"""The scheduler against its goals, in CPU time, with a plain Python loop over the same hosts as the baseline of the same run.

    python -m tests.bench.bench_placement [--quick] [--only decision sustained packing lifetimes] [--seed 7]

No two requests are the same object or have the same id, each sees the claims of those before it, and no answer is reused. Where a
baseline exists both sides must choose the same hosts: a run in which they do not ends with an error. Samples of the decisions are
asked again by a full scan. Prints one JSON document and, on standard error, the goals with pass or fail. A goal of CPU time is held
against what the machine gives: the plain loop of the same run says how much slower it is than the one on which goals were set, and
both figures are printed. Ends with 1 where a goal is missed. `bench_placement_durable.py` has the database's side.
"""

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from tests.bench import placement_fleets
from tests.bench.placement_baseline import PlainLoop
from trimtab_controller.core.placement import BEST_FIT, Books, Decision, FleetSnapshot, PlacementRequest, Policy, decide, scan
from trimtab_controller.core.placement.replay import Fleet, TraceEvent, peak_bound, run
from trimtab_controller.core.placement.verdict import KEPT_HOSTS

# The baseline knows no other wish.
PACK = Policy("best-fit-alone", {"best-fit": 1.0})
# (name, what is measured, bound, whether more is better)
GOALS = (
    ("decision", "one decision, all constraints, 10,000 hosts: CPU us p50", 100.0, False),
    ("sustained", "100,000 hosts, books and explain kept, few sizes: placements per CPU-second", 20_000.0, True),
    ("sustained_distinct", "the same, no two sizes alike: placements per CPU-second", 20_000.0, True),
    ("sustained_distinct_used", "the same on hosts of which no two are alike: placements per CPU-second", 5_000.0, True),
    ("mixed", "100,000 hosts, mixed constraints, few sizes: placements per CPU-second", 5_000.0, True),
    ("mixed_distinct", "the same, no two sizes alike: placements per CPU-second", 5_000.0, True),
    ("packing", "packing of the trace on 64c/256GiB: time_avg_ratio", 1.10, False),
    ("lifetimes", "the same by the lifetime-aware policy", 1.085, False),
)
PLAIN_LOOP_US = 25_600.0
"""CPU time of the plain loop over 10,000 hosts, median, at rest on the machine of 2026-11-25 (docs/benchmarks.md): what goals of CPU
time mean."""
HOST_CPU_MILLIS, HOST_MEMORY_MIB = 64_000, 256 * 1024


def cpu_us(work: Callable[[], object]) -> float:
    start = time.process_time_ns()
    work()
    return (time.process_time_ns() - start) / 1000


def decision(host_count: int, request_count: int, seed: int) -> dict[str, Any]:
    """Measure single decisions, each with every kind of rule and a size of its own, so that nothing kept along helps."""
    rng = random.Random(seed)
    fleet, hosts, pools, groups = placement_fleets.snapshot(host_count, rng)
    requests = placement_fleets.with_everything(request_count, rng)
    books, plain = Books(fleet), PlainLoop(hosts, pools, groups)
    decisions: list[Decision] = []
    loop_chose: list[str | None] = []

    def decide_and_claim(request: PlacementRequest) -> None:
        made = decide(books, request, policy=PACK)
        if made.chosen_host_id is not None:
            books.claim(request, made.chosen_host_id)
        decisions.append(made)

    gc.collect()
    gc.freeze()  # the fleet itself is not garbage: neither side should pay for walking it
    ours = [cpu_us(partial(decide_and_claim, request)) for request in requests]
    stored = [cpu_us(partial(json.dumps, made.as_json())) for made in decisions]
    loop = [cpu_us(lambda request=request: loop_chose.append(plain.place(request))) for request in requests]  # type: ignore[misc]
    gc.unfreeze()
    if loop_chose != [made.chosen_host_id for made in decisions]:
        raise SystemExit("the plain loop chose other hosts: one of the two is wrong")
    return {
        "hosts": host_count,
        "requests": request_count,
        "placed": sum(made.chosen_host_id is not None for made in decisions),
        "cpu_us_p50": round(statistics.median(ours), 1),
        "cpu_us_p99": round(statistics.quantiles(ours, n=100)[98], 1),
        "stored_form_cpu_us_p50": round(statistics.median(stored), 1),
        "plain_loop_cpu_us_p50": round(statistics.median(loop), 1),
        "ratio_to_plain_loop": round(statistics.median(loop) / statistics.median(ours), 1),
    }


def sustained(fleet: FleetSnapshot, requests: Sequence[PlacementRequest], seed: int, *, removed: float = 0.5) -> dict[str, Any]:
    """Measure many decisions on one set of books: each is kept with its reasons, claimed, and half as many vms end."""
    rng, books = random.Random(seed), Books(fleet)
    live: list[tuple[PlacementRequest, str]] = []
    made: list[Decision] = []

    def place_one(request: PlacementRequest) -> None:
        one = decide(books, request, policy=BEST_FIT)
        made.append(one)
        if one.chosen_host_id is not None:
            books.claim(request, one.chosen_host_id)
            live.append((request, one.chosen_host_id))
        if live and rng.random() < removed:
            position = rng.randrange(len(live))
            live[position], live[-1] = live[-1], live[position]
            books.release(*live.pop())

    warm = requests[: len(requests) // 10]
    for request in warm:
        place_one(request)
    gc.collect()
    gc.freeze()
    spent_us, checked = 0.0, 0
    for position, request in enumerate(requests[len(warm) :]):
        expected = scan(books, request, policy=BEST_FIT) if position % 500 == 0 else None
        spent_us += cpu_us(partial(place_one, request))
        if expected is not None:
            if _compared(expected) != _compared(made[-1]):
                raise SystemExit(f"{request.request_id}: the kept answer differs from the scan")
            checked += 1
    gc.unfreeze()
    count = len(requests) - len(warm)
    return {
        "hosts": len(fleet),
        "requests": count,
        "removed": removed,
        "placed": sum(one.chosen_host_id is not None for one in made[len(warm) :]),
        "checked_against_scan": checked,
        "cpu_us_each": round(spent_us / count, 1),
        "placements_per_cpu_s": round(count / spent_us * 1e6),
    }


def _compared(decision: Decision) -> tuple[Any, ...]:
    return decision.fitting, decision.fit_count, decision.refused_by, decision.refused, decision.cells


def packing(limit: int | None, policy: str = "best-fit") -> dict[str, Any]:
    """Replay the trace on a pool a quarter larger than its peak needs at least. No policy knows the future of it."""
    name, rows = placement_fleets.trace_rows()
    events = [TraceEvent(*row) for row in rows][:limit]
    hosts = peak_bound(events, cpu_millis=HOST_CPU_MILLIS, memory_mib=HOST_MEMORY_MIB) * 5 // 4 + 1
    fleet = Fleet(hosts, HOST_CPU_MILLIS, HOST_MEMORY_MIB, policy)
    sized = {"cpu_millis": HOST_CPU_MILLIS, "memory_mib": HOST_MEMORY_MIB}
    report = run(events, fleet, **sized, cpu_time_ns=time.process_time_ns)
    return {"trace": name, "events": len(events), "hosts": hosts, **report.as_json()}


def measure(parts: Iterable[str], *, is_quick: bool, seed: int) -> dict[str, Any]:
    size, found = (5_000 if is_quick else 20_000), {}
    for part in parts:
        match part:
            case "decision":
                found["decision_1k"] = decision(1_000, 60 if is_quick else 200, seed)
                found["decision"] = decision(10_000, 60 if is_quick else 200, seed)
            case "sustained":
                found |= _sustained_plain(size, seed)
            case "mixed":
                found |= _sustained_mixed(size, seed)
            case "packing":
                found["packing"] = packing(40_000 if is_quick else None)
            case "lifetimes":
                found["lifetimes"] = packing(40_000 if is_quick else None, "lifetime-aware")
            case _:
                raise SystemExit(f"there is no part {part}")
    return found


def _sustained_plain(size: int, seed: int) -> dict[str, Any]:
    """Few sizes come again and again, or none does: on equal hosts that are empty at first."""
    fleet = FleetSnapshot.of(placement_fleets.empty_hosts(100_000))
    repeated = sustained(fleet, placement_fleets.plain(size, random.Random(seed)), seed)
    distinct = sustained(fleet, placement_fleets.plain(size, random.Random(seed), distinct_sizes=True), seed)
    return {"sustained": repeated, "sustained_distinct": distinct | _held_against(repeated, distinct)}


def _sustained_mixed(size: int, seed: int) -> dict[str, Any]:
    """The same on hosts that are used and differ, with mixed constraints and without."""
    fleet = placement_fleets.snapshot(100_000, random.Random(seed))[0]
    repeated = sustained(fleet, placement_fleets.mixed(size, random.Random(seed)), seed)
    distinct = sustained(fleet, placement_fleets.mixed(size, random.Random(seed), distinct_sizes=True), seed)
    plain = sustained(fleet, placement_fleets.plain(size, random.Random(seed), distinct_sizes=True, vcpu=1), seed)
    return {
        "mixed": repeated,
        "mixed_distinct": distinct | _held_against(repeated, distinct),
        "sustained_distinct_used": plain,
    }


def _held_against(repeated: dict[str, Any], distinct: dict[str, Any]) -> dict[str, Any]:
    """Return how fast distinct sizes are beside repeated ones: this ratio wavers less than the machine does."""
    return {"ratio_to_repeated": round(distinct["placements_per_cpu_s"] / repeated["placements_per_cpu_s"], 2)}


def goals(found: dict[str, Any]) -> list[str]:
    figure_of = {"decision": "cpu_us_p50", "packing": "time_avg_ratio", "lifetimes": "time_avg_ratio"}
    # Where the plain loop was not run, the machine is taken for the goals' own.
    slower = found["decision"]["plain_loop_cpu_us_p50"] / PLAIN_LOOP_US if "decision" in found else 1.0
    lines = [f"the plain loop takes {slower:.2f} times what it takes on the machine of the goals"]
    for name, what, bound, more_is_better in GOALS:
        if name in found:
            field = figure_of.get(name, "placements_per_cpu_s")
            figure = found[name][field]
            there = figure if field == "time_avg_ratio" else figure * slower if more_is_better else figure / slower
            is_met = there >= bound if more_is_better else there <= bound
            sign = ">=" if more_is_better else "<="
            lines.append(f"{'pass' if is_met else 'FAIL'}  {what}: {figure:,} here, {there:,.6g} there (goal {sign} {bound:,})")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["decision", "sustained", "mixed", "packing", "lifetimes"])
    parser.add_argument("--quick", action="store_true", help="a tenth of the work: for a look, not for a figure")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    found = measure(arguments.only, is_quick=arguments.quick, seed=arguments.seed)
    sys.stdout.write(json.dumps({"seed": arguments.seed, "kept_hosts": KEPT_HOSTS, **found}, indent=2) + "\n")
    lines = goals(found)
    sys.stderr.write("\n".join(lines) + "\n")
    if any(line.startswith("FAIL") for line in lines):
        sys.exit(1)


if __name__ == "__main__":
    main()
