"""What is given up of a volume's layers: everything that nothing needs, nothing that something does."""

from hypothesis import given
from hypothesis import strategies as st

from trimtab_controller.core.layers import Tree, Work, after, tidy


def test_a_layer_that_nothing_needs_takes_in_the_one_over_it() -> None:
    tree = Tree(parents={"a": ""}, active="a")
    works, left = tidy(tree)
    assert works == (Work(top="a", base=""),)
    assert (left.parents, left.active, left.is_flat) == ({}, "", True)


def test_what_a_snapshot_keeps_stays_and_a_branch_that_nobody_is_on_goes() -> None:
    tree = Tree(parents={"a": "", "b": ""}, active="b", pinned=frozenset({""}))
    works, left = tidy(tree)
    assert works == (Work(top="a"),)
    assert left.parents == {"b": ""}


def test_a_base_of_two_branches_stays_until_one_is_left() -> None:
    tree = Tree(parents={"a": "", "b": "a", "c": "a"}, active="c", pinned=frozenset({"b"}))
    works, left = tidy(tree)
    assert works == (Work(top="a", base="", children=("b", "c")),)
    assert left.parents == {"b": "", "c": ""}
    works, left = tidy(Tree(parents=left.parents, active="c"))
    assert works == (Work(top="b"), Work(top="c", base=""))
    assert left.is_flat


def test_what_a_clone_lies_over_neither_goes_nor_is_merged() -> None:
    tree = Tree(parents={"a": "", "b": "a"}, active="b", clones=frozenset({"a"}))
    assert tidy(tree) == ((), tree)
    assert not tree.is_flat


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    names = [f"l{number}" for number in range(draw(st.integers(0, 7)))]
    parents = {name: draw(st.sampled_from(["", *names[:index]])) for index, name in enumerate(names)}
    leaves = sorted({"", *names} - set(parents.values())) or [""]
    some = st.frozensets(st.sampled_from(["", *names]))
    return Tree(parents=parents, active=draw(st.sampled_from(leaves)), pinned=draw(some), clones=draw(some))


def content(tree: Tree, marks: dict[str, frozenset[str]], layer: str) -> frozenset[str]:
    below = content(tree, marks, tree.parents[layer]) if layer else frozenset()
    return below | marks[layer]


@given(trees())
def test_whatever_is_tidied_every_snapshot_clone_and_guest_reads_what_it_read(tree: Tree) -> None:
    marks = {layer: frozenset({f"mark-{layer}"}) for layer in ("", *tree.parents)}
    wanted = {kept: content(tree, marks, kept) for kept in sorted(tree.pinned | tree.clones | {tree.active})}
    names = {kept: kept for kept in wanted}
    works, left = tidy(tree)
    active_merges, first = [], tree.active
    for work in works:
        assert work.top not in tree.clones, "what a clone lies over is never merged away"
        if work.base is not None:
            assert tree.over(work.base) == (work.top,), "nothing else reads the layer that changes"
            if work.top == tree.active:
                active_merges.append(work.top)
            marks[work.base] |= marks[work.top]
        tree = after(tree, work)
        names = {kept: (work.base if name == work.top and work.base is not None else name) for kept, name in names.items()}
    assert tree == left
    assert {kept: content(left, marks, names[kept]) for kept in wanted} == wanted
    assert active_merges in ([], [first]), "the guest's own layer is merged once, under the name that SQL has for it"
    assert tidy(left) == ((), left), "once tidied there is nothing left to do"
