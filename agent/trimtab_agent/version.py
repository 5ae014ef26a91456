"""The release this agent is of."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache
def agent_version() -> str:
    """Return the version of the installed distribution; `0` in a tree that was never installed."""
    try:
        return version("trimtab")
    except PackageNotFoundError:
        return "0"
