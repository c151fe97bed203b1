"""Faults to plant, one at a time. `mutate.py` plants them to see whether a test finds them.

Each is a small mistake that still looks right and gives right results for most inputs. It shows at
a tail, at the border of a block, for one stride, one tie or one NaN. The faults are listed in
faults/*.toml. The place of a fault is given by a function and a few tokens in it, so it is still
found if lines are moved or broken elsewhere:

    [moments-merge-share]                                     its name
    place = 'moments.py::Moments.merge'                       the file in cybn/, and the function
    why = 'merge weighs the step with the wrong count'        what is wrong
    find = 'delta**2 * (self.count * share)'                  the code to replace
    put = 'delta**2 * (other.count * share)'                  the code that replaces it
    at = 2                                                    which occurrence, from 1
    tests = 'moments'                                         tests likely to find it

`find` must occur once in the function if `at` is not given. The table [likely] names the tests of
each file, the likeliest first: test files by their names without test_. `tests` of a fault
overrides it.
"""

import tomllib
from pathlib import Path
from typing import NamedTuple

import anchors

LISTS = sorted(Path(__file__).with_name("faults").glob("*.toml"))


class Fault(NamedTuple):
    """A fault: in one function of a file of the package, `find` is replaced by `put`."""

    name: str
    place: str
    why: str
    find: str
    put: str
    at: int | None = None
    tests: str = ""

    @property
    def file(self):
        return self.place.partition("::")[0]

    @property
    def anchor(self):
        """Return the arguments of `anchors.anchored` that follow the source."""
        return self.place.partition("::")[2], self.find, self.put, self.at

    def planted(self, text):
        """Return the source of the file with the fault in it."""
        return anchors.replaced(text, *self.anchor)

    def likely(self):
        """Return the names of the tests that are likely to find the fault."""
        return (self.tests or LIKELY[self.file]).split()


def read():
    """Return the faults of all lists, and the likely tests of each file."""
    faults, likely = [], {}
    for file in LISTS:
        tables = tomllib.loads(file.read_text("utf-8"))
        likely |= tables.pop("likely")
        faults += [Fault(name, **table) for name, table in tables.items()]
    return faults, likely


FAULTS, LIKELY = read()
