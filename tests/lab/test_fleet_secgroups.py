"""A real fleet: what may open a connection to a guest, told by the command line and asked by a guest on another host.

Two guests for the file; the tests run in order, as one story.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.lab.fleet_kit import Fleet, wait_until
from tests.lab.guest_view import guest_says
from tests.lab.ticks import breaks

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

LISTENER, ECHO, NOBODY = 7, 8080, 9999
"""The lab's guest answers on the first by itself, on the second since this file had it; nothing listens on the third."""
INDEX = {"asks": 61, "web": 62}
REFUSED, SILENT = "Connection refused", "timed out"
ASIDE = "setsid sh -c '%s' </dev/null >/dev/null 2>&1 &"


@dataclass(slots=True)
class Story:
    fleet: Fleet
    ids: dict[str, str]

    def address(self, name: str) -> str:
        return f"{self.fleet.lab.spec.guest_prefix}.{INDEX[name]}"

    def on(self, name: str, script: str) -> str:
        return guest_says(self.fleet.lab, self.fleet.vm(name)["host"], self.ids[name], script)

    def answer(self, port: int) -> str:
        """Return what the guest on the other host hears on that port, or how its connection fails."""
        return self.on("asks", f"echo echoed | nc -w 4 {self.address('web')} {port} 2>&1")

    def is_open(self, port: int) -> bool:
        """Tell whether a connection is answered; one that fails must have been dropped in silence, not refused by the guest."""
        answer = self.answer(port)
        is_answered = ("web tick" if port == LISTENER else "echoed") in answer
        assert is_answered or SILENT in answer, answer
        return is_answered

    def outsider_is_answered(self) -> bool:
        """Ask from the control plane's foot in the guests' network."""
        asked = ["sh", "-c", f"echo echoed | busybox nc -w 4 {self.address('web')} {ECHO}"]
        return "echoed" in self.fleet.lab.run("ctl", asked, check=False).stdout

    def heard(self) -> int:
        """Return how many bytes came back by the connection that stays open."""
        return int(self.on("asks", "wc -c </run/echo"))


@pytest.fixture(scope="module")
def story(fleet: Fleet) -> Iterator[Story]:
    ids = {
        name: fleet.create(name, pool="shared", index=INDEX[name], to=host)["id"]
        for name, host in (("asks", "node1"), ("web", "node2"))
    }
    made = Story(fleet, ids)
    for name in ids:
        fleet.wait_for_ticks(name, 1)
        wait_until(lambda one=name: made.on(one, "echo up") == "up", f"the agent inside {name}")
    made.on("web", ASIDE % f"nc -ll -p {ECHO} -e cat")
    wait_until(lambda: made.is_open(ECHO), "the guest to listen")
    yield made
    fleet.delete("asks", "web")
    fleet.ok("secgroup", "delete", "web", "--yes")


def test_a_port_is_open_as_its_group_says_when_the_command_ends(story: Story) -> None:
    fleet, counted = story.fleet, story.fleet.ticks("web")[0]
    assert REFUSED in story.answer(NOBODY), "in no group everything reaches the guest"
    fleet.ok("secgroup", "create", "web", "--allow", f"tcp/{LISTENER}")
    fleet.ok("vm", "update", "web", "--secgroup", "web")
    assert (story.is_open(LISTENER), story.is_open(ECHO), story.is_open(NOBODY)) == (True, False, False)
    fleet.ok("secgroup", "update", "web", "--allow", f"tcp/{LISTENER}", "--allow", f"tcp/{ECHO}")
    assert (story.is_open(LISTENER), story.is_open(ECHO)) == (True, True)
    fleet.ok("secgroup", "update", "web", "--allow", f"tcp/{ECHO}")
    assert (story.is_open(LISTENER), story.is_open(ECHO)) == (False, True)
    last = fleet.wait_for_ticks("web", fleet.ticks("web")[0] + 1)[0]
    assert breaks(fleet.ok("vm", "console", "web", "--log").out, first=counted, last=last) == [], "it was never restarted"


def test_a_port_that_is_closed_ends_what_is_open_on_it(story: Story) -> None:
    fleet = story.fleet
    talk = f"(while :; do echo again; sleep 1; done) | nc {story.address('web')} {ECHO} >/run/echo"
    story.on("asks", ASIDE % talk)
    wait_until(lambda: story.heard() > 0, "the connection to be answered")
    fleet.ok("secgroup", "update", "web", "--allow", f"tcp/{LISTENER}")
    heard = story.heard()
    assert not story.is_open(ECHO), "nor does a new one begin"  # asked for four seconds, in which the open one says as many words
    assert story.heard() == heard


def test_a_port_is_open_to_the_addresses_that_its_rule_names_alone(story: Story) -> None:
    fleet = story.fleet
    fleet.ok("secgroup", "update", "web", "--allow", f"tcp/{ECHO}@{story.address('asks')}/32")
    assert (story.is_open(ECHO), story.outsider_is_answered()) == (True, False)
    fleet.ok("secgroup", "update", "web", "--allow", f"tcp/{ECHO}")
    assert (story.is_open(ECHO), story.outsider_is_answered()) == (True, True)


def test_its_ports_move_with_the_guest_and_change_there(story: Story) -> None:
    fleet = story.fleet
    fleet.ok("vm", "migrate", "web", "--to", "node3", "--wait")
    assert (story.is_open(LISTENER), story.is_open(ECHO)) == (False, True)
    fleet.ok("secgroup", "update", "web", "--closed")
    assert (story.is_open(LISTENER), story.is_open(ECHO)) == (False, False)
    fleet.ok("vm", "update", "web", "--no-secgroups")
    assert (story.is_open(LISTENER), story.is_open(ECHO)) == (True, True)
    assert REFUSED in story.answer(NOBODY), "in no group any more"
