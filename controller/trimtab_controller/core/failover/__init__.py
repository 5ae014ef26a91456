"""Failover, pure: who is silent, what proves a host off, which vms start where, and what happens when the dead return."""

from trimtab_controller.core.failover.settings import FailoverSettings
from trimtab_controller.core.failover.step import step, steps

__all__ = ["FailoverSettings", "step", "steps"]
