"""Bounds that hold before anything is understood: how often one may ask."""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from trimtab_controller.api.problems import RateLimited

# Buckets that are full again are the first to be forgotten; this many callers at once are more than any fleet has.
BUCKETS_MAX = 10_000


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at_s: float


class RateLimit:
    """Token buckets by key, in this process only: N replicas allow N times as much, which is what replicas are for."""

    def __init__(self, *, per_s: float, burst: float, clock_s: Callable[[], float]) -> None:
        self._per_s, self._burst, self._clock_s = per_s, burst, clock_s
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def take(self, key: str, *, cost: float = 1.0) -> None:
        """Count one request of `key`. RateLimited says when to come again."""
        wait_s = self._take(key, cost)
        if wait_s > 0:
            raise RateLimited(
                "rate-limited",
                f"too many requests; at most {self._per_s:g} a second, try again in {math.ceil(wait_s)} s",
                retry_after_s=math.ceil(wait_s),
            )

    def _take(self, key: str, cost: float) -> float:
        """Return 0 and take, or the seconds until `cost` is there."""
        now_s = self._clock_s()
        bucket = self._buckets.setdefault(key, _Bucket(self._burst, now_s))
        self._buckets.move_to_end(key)
        if len(self._buckets) > BUCKETS_MAX:
            self._buckets.popitem(last=False)
        bucket.tokens = min(self._burst, bucket.tokens + (now_s - bucket.at_s) * self._per_s)
        bucket.at_s = now_s
        missing = cost - bucket.tokens
        if missing > 0:
            return missing / self._per_s
        bucket.tokens -= cost
        return 0.0
