"""The mutations of a module: each changes one place and is valid Python."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
try:
    import mutate
finally:
    sys.path.remove(str(Path(__file__).parent))

SOURCE = b'''
def loss(x, y: int = 3, *, scale=2):
    """1 + 1."""
    if x < 0:
        raise ValueError(f"found {x + 1}; give at least " + "0")
    z: float = -x * (y + 2)
    return z[1:]

class A:
    size: int = 5
    def __post_init__(self):
        return 1 + 1
'''


def test_longhand():
    found = [(m.line, m.old, m.new) for m in mutate.mutations("f.py", SOURCE)]
    assert sorted(found) == [
        (4, "0", "1"),
        (4, "<", "<="),
        (6, "*", "/"),
        (6, "+", "-"),
        (6, "-", ""),
        (6, "2", "3"),
        (6, "y + 2", "y"),
        (7, "1", "2"),
    ]


def test_every_mutation_of_the_repository_is_another_valid_module():
    places = mutate.all_mutations()
    assert len(places) > 500 and len(set(places)) == len(places)
    for place in places[::17]:
        source = (mutate.ROOT / place.file).read_bytes()
        changed = place.apply(source)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source)), place


def test_the_line_that_differs():
    found = {m.new: m.changed_line(SOURCE) for m in mutate.mutations("f.py", SOURCE) if m.line == 6}
    assert found["-"] == "z: float = -x * (y - 2)" and found[""] == "z: float = x * (y + 2)"


def test_known_equivalents_exist_and_are_not_chosen():
    places = mutate.all_mutations()
    known = {(m.file, m.changed_line((mutate.ROOT / m.file).read_bytes())) for m in places if mutate.is_equivalent(m)}
    assert known == set(mutate.EQUIVALENT)
    chosen = mutate.choose(places, 100, seed=0)
    assert len(set(chosen)) == 100 and not any(map(mutate.is_equivalent, chosen))
    assert chosen[:10] == mutate.choose(places, 10, seed=0) != mutate.choose(places, 10, seed=1)


def test_every_mutated_file_has_tests():
    files = {place.file for place in mutate.all_mutations()}
    assert all(list(mutate.tests_of(file)) for file in files)
