"""A controller process that does not wait for leases: `python -m tests.soak.controller_without_lease_wait engine --data-dir DIR`.

No release has a switch for this. The product's own program is run with one core function in place of another: how long after its last
handled renewal the lease of a lost host has surely ended, here at once. `without_lease_wait.py` shows that its lab sees what follows.
"""

from trimtab_controller.core.failover import FailoverSettings
from trimtab_controller.main import main


def _no_wait(_settings: FailoverSettings, _kill_s: float) -> float:
    return 0.0


if __name__ == "__main__":
    FailoverSettings.lease_wait_s = _no_wait  # type: ignore[method-assign]
    main()
