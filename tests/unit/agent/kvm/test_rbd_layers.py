"""Layers of Ceph's images: what is kept, gone back to and given up, cut off at any point and begun again."""

import contextlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from tests.unit.agent.kvm.test_block_pools import CEPH
from trimtab_agent.hypervisor.kvm.rbd_layers import BOTTOM, HALF_KEY, HEAD_KEY, Image
from trimtab_protos.errors import Conflict, NotFound, Unavailable


class CutError(Exception):
    """The agent was killed."""


@dataclass
class Cluster:
    """An image of a cluster that does what it is told; `cut_after`: as many commands that change something succeed."""

    content: str = "old"
    snapshots: dict[str, str] = field(default_factory=dict)
    marks: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    # The last one happened, although who asked was killed before it was told so.
    is_done_when_cut: bool = False
    changes: int = 0

    def __call__(self, command: Sequence[str], secret: bytes | None) -> tuple[int, str, str]:
        del secret
        words = [word for word in command[command.index("--keyfile") + 2 :] if not word.startswith("--")]
        match words:
            case ["image-meta", "list", "json", _image]:
                return 0, json.dumps(self.marks), ""
            case ["snap", "ls", "json", _image]:
                return 0, json.dumps([{"name": name, "size": 1 << 30} for name in self.snapshots]), ""
        if self.changes == self.cut_after and not self.is_done_when_cut:
            raise CutError
        self._change(words)
        self.changes += 1
        if self.changes == self.cut_after and self.is_done_when_cut:
            raise CutError
        return 0, "", ""

    def _change(self, words: Sequence[str]) -> None:
        match words:
            case ["snap", "create", name]:
                assert _of(name) not in self.snapshots, "Ceph refuses a second one of that name"
                self.snapshots[_of(name)] = self.content
            case ["snap", "rm", name]:
                del self.snapshots[_of(name)]
            case ["snap", "rollback", name]:
                self.content = self.snapshots[_of(name)]
            case ["snap", "rename", old, new]:
                assert _of(new) not in self.snapshots
                self.snapshots[_of(new)] = self.snapshots.pop(_of(old))
            case ["image-meta", "set", _image, key, value]:
                self.marks[key] = value
            case ["image-meta", "remove", _image, key]:
                del self.marks[key]
            case _:
                raise AssertionError(f"unknown: {words}")


def _of(name: str) -> str:
    assert name.startswith("vms/vol-data1@"), name
    return name.partition("@")[2]


def image(cluster: Cluster) -> Image:
    return Image("vol-data1", CEPH, b"key", cluster)


def test_what_is_kept_is_what_was_there_and_is_gone_back_to() -> None:
    cluster = Cluster()
    image(cluster).keep("", "lay-1")
    cluster.content = "new"
    image(cluster).keep("lay-1", "lay-2")
    assert (cluster.snapshots, cluster.marks) == ({BOTTOM: "old", "lay-1": "new"}, {HEAD_KEY: "lay-2"})
    cluster.content = "newest"
    image(cluster).go_back("", "lay-3")
    assert (cluster.content, cluster.marks) == ("old", {HEAD_KEY: "lay-3"})
    image(cluster).go_back("lay-1", "lay-4")
    assert (cluster.content, sorted(cluster.snapshots)) == ("new", [BOTTOM, "lay-1"]), "each as often as is wished"


def test_what_was_never_kept_is_not_gone_back_to() -> None:
    cluster = Cluster(snapshots={"lay-1": "kept"})
    with pytest.raises(NotFound, match="its layers: lay-1"):
        image(cluster).go_back("lay-9", "lay-3")
    assert (cluster.content, cluster.marks) == ("old", {})


def test_what_is_given_up_leaves_what_others_keep_under_their_names() -> None:
    cluster = Cluster()
    for over, layer in (("", "lay-1"), ("lay-1", "lay-2"), ("lay-2", "lay-3")):
        image(cluster).keep(over, layer)
        cluster.content = layer
    image(cluster).merge("lay-2", "lay-1")
    assert cluster.snapshots == {BOTTOM: "old", "lay-1": "lay-2"}, "what lay-2 kept is lay-1 now"
    image(cluster).merge("lay-3", "lay-1")
    assert (cluster.snapshots, cluster.marks) == ({BOTTOM: "old"}, {HEAD_KEY: "lay-1"})
    image(cluster).merge("lay-1", "")
    assert (cluster.snapshots, cluster.marks, cluster.content) == ({}, {}, "lay-3"), "an image as if nothing had been"


def test_a_layer_that_was_left_by_going_back_goes_without_a_trace() -> None:
    cluster = Cluster()
    image(cluster).keep("", "lay-1")
    image(cluster).go_back("", "lay-2")
    image(cluster).delete("lay-1")
    assert cluster.snapshots == {BOTTOM: "old"}
    with pytest.raises(Conflict, match="writes to"):
        image(cluster).delete("lay-2")


@pytest.mark.parametrize(("cut", "is_done"), list(itertools.product(range(4), [False, True])))
def test_keeping_that_is_cut_off_keeps_the_first_instant_once_it_is_repeated(cut: int, is_done: bool) -> None:
    cluster = Cluster(cut_after=cut, is_done_when_cut=is_done)
    try:
        image(cluster).keep("", "lay-1")
    except CutError:
        # The guest went on. What it wrote since then is never lost, whichever instant is kept.
        cluster.content = "written since"
    cluster.cut_after, before = None, cluster.content
    image(cluster).keep("", "lay-1")
    assert cluster.content == before
    assert cluster.marks == {HEAD_KEY: "lay-1"}
    assert set(cluster.snapshots) == {BOTTOM}


@pytest.mark.parametrize(("cut", "is_done"), list(itertools.product(range(5), [False, True])))
def test_keeping_that_is_cut_off_and_undone_leaves_the_disk_as_the_guest_has_it(cut: int, is_done: bool) -> None:
    cluster = Cluster(cut_after=cut, is_done_when_cut=is_done)
    with contextlib.suppress(CutError):
        image(cluster).keep("", "lay-1")
    cluster.cut_after, cluster.content = None, "written since"
    image(cluster).merge("lay-1", "")
    assert (cluster.content, cluster.snapshots, cluster.marks) == ("written since", {}, {})
    image(cluster).keep("", "lay-2")
    assert cluster.snapshots == {BOTTOM: "written since"}, "the next one keeps what is there now"


@pytest.mark.parametrize(("cut", "is_done"), list(itertools.product(range(5), [False, True])))
def test_going_back_that_is_cut_off_keeps_guests_away_until_it_is_whole(cut: int, is_done: bool) -> None:
    cluster = Cluster(snapshots={BOTTOM: "kept"}, marks={HEAD_KEY: "lay-1"}, cut_after=cut, is_done_when_cut=is_done)
    try:
        image(cluster).go_back("", "lay-2")
    except CutError:
        if cluster.content != "old" and cluster.marks.get(HEAD_KEY) != "lay-2":
            with pytest.raises(Conflict, match="snapshot revert") as refused:
                image(cluster).refuse_half()
            assert refused.value.code == "rollback-unfinished"
    cluster.cut_after = None
    image(cluster).go_back("", "lay-3" if cut % 2 else "lay-2")
    assert (cluster.content, HALF_KEY in cluster.marks) == ("kept", False)
    image(cluster).refuse_half()


@pytest.mark.parametrize(("cut", "is_done"), list(itertools.product(range(4), [False, True])))
@pytest.mark.parametrize(("top", "base"), [("lay-1", ""), ("lay-2", "lay-1")])
def test_a_merge_that_is_cut_off_ends_as_one_that_was_not(top: str, base: str, cut: int, is_done: bool) -> None:
    def stacked() -> Cluster:
        return Cluster(content="c", snapshots={BOTTOM: "a", "lay-1": "b"}, marks={HEAD_KEY: "lay-2"})

    cluster, whole = stacked(), stacked()
    image(whole).merge(top, base)
    cluster.cut_after, cluster.is_done_when_cut = cut, is_done
    with contextlib.suppress(CutError):
        image(cluster).merge(top, base)
    cluster.cut_after = None
    image(cluster).merge(top, base)
    assert (cluster.content, cluster.snapshots, cluster.marks) == (whole.content, whole.snapshots, whole.marks)


def test_a_snapshot_that_was_left_by_a_lost_attempt_is_never_taken_for_what_is_kept() -> None:
    cluster = Cluster(snapshots={"lay-1": "stale"}, marks={HEAD_KEY: "lay-7"})
    image(cluster).keep("lay-1", "lay-2")
    assert (cluster.snapshots, cluster.content) == ({"lay-1": "old"}, "old")


def test_a_cluster_that_does_not_answer_is_unavailable() -> None:
    with pytest.raises(Unavailable):
        Image("vol-data1", CEPH, b"key", lambda command, secret: (124, "", "timed out")).keep("", "lay-1")
