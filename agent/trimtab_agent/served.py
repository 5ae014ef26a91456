"""Time that served calls take, by verb and outcome; apart from `metrics.py`, which knows the agent, and so everything."""

from prometheus_client import Histogram

SERVED_SECONDS = Histogram(
    "trimtab_agent_served_seconds",
    "Time of a call that this agent served.",
    ["verb", "outcome"],
    buckets=(0.001, 0.005, 0.02, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0),
    registry=None,
)
"""Outcomes: ok, the ten kinds, `cancelled` (the caller went away)."""
