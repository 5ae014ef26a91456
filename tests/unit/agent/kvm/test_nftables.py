"""The kernel's packet rules through the library, in a network namespace of this test's own."""

import subprocess
import sys

SCRIPT = """
import subprocess
from trimtab_agent.hypervisor.kvm import nftables
from trimtab_protos.errors import Unavailable

OURS = {"family": "bridge", "table": "trimtab"}
table = {"add": {"table": {"family": "bridge", "name": "trimtab"}}}
chain = lambda name: {"add": {"chain": {**OURS, "name": name}}}

assert nftables.names() == set(), "no table is no names"
nftables.apply([table, chain("one"), {"add": {"set": {**OURS, "name": "two", "type": "ifname"}}}])
assert nftables.names() == {"one", "two"}
try:
    nftables.apply([chain("three"), {"delete": {"chain": {**OURS, "name": "nowhere"}}}])
except Unavailable as error:
    assert error.code == "nft-refused", error.code
    assert "No such file or directory" in error.message, error.message
else:
    raise AssertionError("it took a command that cannot be done")
assert nftables.names() == {"one", "two"}, "of refused commands none is done"
subprocess.run(["nft", "flush", "ruleset"], check=True, timeout=10)
assert nftables.names() == set(), "what another program changed is seen"
nftables.apply([table, chain("one")])
assert nftables.names() == {"one"}, "and put back"
print("all of it")
"""


def test_rules_are_all_done_or_none_and_what_others_changed_is_seen() -> None:
    command = ["unshare", "--net", sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.strip(), done.stderr) == ("all of it", "")
