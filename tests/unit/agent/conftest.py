"""What tests of the agent find by name."""

from tests.unit.agent.servicer_kit import host, world

__all__ = ["host", "world"]
