"""Damage to files, for property tests: flipped, inserted and missing bytes."""

import contextlib
import shutil

from hypothesis import strategies as st


@st.composite
def damages(draw):
    """A function that flips or inserts some bytes, or cuts the end; positions are relative."""
    kind = draw(st.sampled_from(["flip", "flip", "header", "insert", "cut"]))
    place = st.floats(0, 1, exclude_max=True)
    values = draw(st.lists(st.tuples(place, st.integers(1, 255)), min_size=1, max_size=4))

    def damage(data: bytes) -> bytes:
        changed = bytearray(data)
        for position, value in values:
            if not changed:
                break
            # Headers and names are at the front of a file, and say what the rest means.
            length = min(len(changed), 4096) if kind == "header" else len(changed)
            index = int(position * length)
            if kind == "cut":
                del changed[index:]
            elif kind == "insert":
                changed.insert(index, value)
            else:
                changed[index] ^= value
        return bytes(changed)

    return damage


class Damaged:
    """A copy of a directory in which one file at a time is damaged."""

    def __init__(self, source, root):
        shutil.copytree(source, root)
        self.root = root
        self.names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())

    @contextlib.contextmanager
    def file(self, name, damage):
        path = self.root / name
        whole = path.read_bytes()
        _replace(path, damage(whole))
        try:
            yield path
        finally:
            _replace(path, whole)


def _replace(path, data):
    """Give a path a new file.

    Loading threads of transformers outlive an error that they raise. A file that is truncated in
    place while they read their mapping of it ends the process with SIGBUS.
    """
    changed = path.with_name(path.name + ".changed")
    changed.write_bytes(data)
    changed.replace(path)
