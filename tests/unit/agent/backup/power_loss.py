"""A folder whose power fails: what was not synced may be there, or not, or in part, in any combination.

Each sync of a file makes its content durable, each sync of a folder its names. Nothing else is: of the rest a file system keeps what it
likes, in any order. `Recorder` remembers the folder at each sync; `after_loss` makes one of the folders that may be found afterwards.
"""

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

Inode = int


@dataclass(frozen=True, slots=True)
class Tree:
    """Folders by their path below the root, each name with its inode; and what each file holds."""

    names: Mapping[str, Mapping[str, Inode]]
    content: Mapping[Inode, bytes]


@dataclass(slots=True)
class Recorder:
    """`sync` for a `FolderBlobs`. What is on the disk at the n-th call, just before it takes effect, is `losses[n]`."""

    root: Path
    forgets: str = ""
    """`files` or `folders`: of which nothing becomes durable, as in a store that does not sync them."""
    durable_names: dict[str, dict[str, Inode]] = field(default_factory=dict)
    durable_content: dict[Inode, bytes] = field(default_factory=dict)
    losses: list[tuple[Tree, Tree]] = field(default_factory=list)
    """What is durable, and what would be there if nothing was lost."""

    def __call__(self, descriptor: int) -> None:
        now = tree_of(self.root)
        names = {folder: dict(found) for folder, found in self.durable_names.items()}
        self.losses.append((Tree(names, dict(self.durable_content)), now))
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if self.forgets == ("folders" if os.path.isdir(path) else "files"):
            return
        if os.path.isdir(path):
            folder = os.path.relpath(path, self.root)
            self.durable_names[folder] = dict(now.names.get(folder, {}))
        else:
            self.durable_content[os.fstat(descriptor).st_ino] = Path(path).read_bytes()


def tree_of(root: Path) -> Tree:
    names: dict[str, dict[str, Inode]] = {}
    content: dict[Inode, bytes] = {}
    for path, folders, files in os.walk(root):
        found = names.setdefault(os.path.relpath(path, root), {})
        for name in [*folders, *files]:
            found[name] = os.stat(os.path.join(path, name)).st_ino
        for name in files:
            content[found[name]] = Path(path, name).read_bytes()
    return Tree(names, content)


def after_loss(loss: tuple[Tree, Tree], target: Path, dice: random.Random, *, kept: float) -> None:
    """Make at `target` what may be found: what is durable, and of each other name and content with the chance `kept` what there was."""
    durable, now = loss

    def make(folder: str) -> None:
        (target / folder).mkdir()
        before, present = durable.names.get(folder, {}), now.names.get(folder, {})
        for name in sorted({*before, *present}):
            inode = (present if before.get(name) == present.get(name) or dice.random() < kept else before).get(name)
            if inode is None:
                continue
            below = os.path.normpath(os.path.join(folder, name))
            if below in now.names:
                make(below)
            else:
                (target / below).write_bytes(_content(inode))

    def _content(inode: Inode) -> bytes:
        if inode in durable.content:
            return durable.content[inode]
        whole = now.content.get(inode, b"")
        return dice.choice([b"", whole[: dice.randrange(len(whole) + 1)], bytes(len(whole))])

    make(".")
