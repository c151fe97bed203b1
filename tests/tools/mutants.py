"""Faults to plant, one at a time: what `mutate.py` puts into the source to see if a test finds it.

Each is a place where a slip of the pen gives code that still looks right, and is right on most
inputs: at a tail, at the border of a block, for one stride, one tie, one NaN. They are listed in
faults/*.toml. A fault is held by a function and a few tokens in it, so that moving a line or
breaking it elsewhere leaves it where it is:

    [moments-merge-share]                                     its name
    place = 'moments.py::Moments.merge'                       the file in cybn/, and the function
    why = 'merge weighs the step with the wrong count'        what is wrong
    find = 'delta**2 * (self.count * share)'                  occurs once in that function
    put = 'delta**2 * (other.count * share)'                  what it becomes
    at = 2                                                    which one, where there are several
    tests = 'moments'                                         likely to find it

The table [likely] says which tests look at a file, the likeliest first: test files by their names
without test_. `tests` of a fault goes before it.
"""

import tomllib
from pathlib import Path
from typing import NamedTuple

import anchors

LISTS = sorted(Path(__file__).with_name("faults").glob("*.toml"))


class Fault(NamedTuple):
    """What `find` is, in one function of a file of the package, becomes `put`."""

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
        """What `anchors` takes after the source."""
        return self.place.partition("::")[2], self.find, self.put, self.at

    def planted(self, text):
        """Return the source of its file with the fault in it."""
        return anchors.replaced(text, *self.anchor)

    def likely(self):
        """Return the names of the tests that are likely to find it."""
        return (self.tests or LIKELY[self.file]).split()


def read():
    """Return the faults of all lists, and the tests that look at each file."""
    faults, likely = [], {}
    for file in LISTS:
        tables = tomllib.loads(file.read_text("utf-8"))
        likely |= tables.pop("likely")
        faults += [Fault(name, **table) for name, table in tables.items()]
    return faults, likely


FAULTS, LIKELY = read()
