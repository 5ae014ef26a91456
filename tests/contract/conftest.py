"""The contract's fixtures, for all of its files."""

from tests.contract.hosts import hosts, name, vm

__all__ = ["hosts", "name", "vm"]
