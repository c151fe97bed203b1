"""Mutant schemata: many faults in one source, each behind a switch, so that one build is enough.

`switched` copies each statement that a fault changes into both arms of an ``if``: the changed one
runs if CYBN_FAULT in the environment is the fault's number, otherwise the original. Faults whose
statements overlap share one ``if``.
"""

import re

from anchors import without_comments

SWITCH = '''
cdef extern from * nogil:
    """
    #ifndef CYBN_FAULT
    #define CYBN_FAULT
    #include <stdlib.h>
    static int cybn_fault(void) {
        static int fault = -1;
        if (fault < 0) fault = getenv("CYBN_FAULT") ? atoi(getenv("CYBN_FAULT")) : 0;
        return fault;
    }
    #endif
    """
    int cybn_fault()

'''


def switched(text, changes):
    """Return Cython source with all `changes` behind switches.

    `changes` is a dict from the number of a fault to the start, the end and the replacement of the
    place that it changes, as `anchors.anchored` returns them.
    """
    lines = text.splitlines(keepends=True)
    starts = logical_lines(lines)
    for first, last, numbers in reversed(merged(text, lines, starts, changes)):
        before, span = len("".join(lines[:first])), "".join(lines[first:last])
        arms = {}
        for n in numbers:
            start, end, new = changes[n]
            arms[n] = span[: start - before] + new + span[end - before :]
        lines[first:last] = [choice(span, arms)]
    whole = "".join(lines)
    code = without_comments(whole)
    start = len(code) - len(code.lstrip())
    return f"{whole[:start]}{SWITCH.lstrip()}{whole[start:]}"


def merged(text, lines, starts, changes):
    """Return (first line, line after the last, numbers) of spans in order, without overlaps."""
    spans = sorted(
        (*span_of(text, lines, starts, start, end), n) for n, (start, end, _) in changes.items()
    )
    groups = []
    for first, last, number in spans:
        if groups and first < groups[-1][1]:
            a, b, numbers = groups.pop()
            groups.append((a, max(b, last), [*numbers, number]))
        else:
            groups.append((first, last, [number]))
    return groups


def indent(line):
    return len(line) - len(line.lstrip(" "))


def logical_lines(lines):
    """Return the first line of the statement that each line belongs to."""
    starts, depth, quoted = [], 0, False
    for i, line in enumerate(lines):
        starts.append(starts[-1] if depth > 0 or quoted else i)
        quotes = line.count('"""')
        if not quoted and not quotes:
            code = re.sub(r"#.*|\"[^\"]*\"", "", line)
            depth += sum(code.count(c) for c in "([{") - sum(code.count(c) for c in ")]}")
        quoted ^= quotes % 2 == 1
    return starts


def span_of(text, lines, starts, start, end):
    """Return the lines of the whole statements, with their blocks, that contain a place."""
    first = starts[text.count("\n", 0, start)]
    last = text.count("\n", 0, end) + 1
    while True:
        before = first, last
        while last < len(lines) and starts[last] < last:  # further lines of the same statement
            last += 1
        heads = [i for i in range(first, last) if starts[i] == i and lines[i].strip()]
        outermost = min(indent(lines[i]) for i in heads)
        while indent(lines[first]) > outermost or starts[first] != first or follows(lines[first]):
            first -= 1
            while not lines[first].strip():
                first -= 1
        while (after := next_line(lines, last)) < len(lines) and belongs(lines[after], outermost):
            last = after + 1
        if (first, last) == before:
            return first, last


def follows(line):
    """Return whether a line is a later arm of a statement, such as an ``else``."""
    return re.match(r"\s*(elif|else|finally|except)\b", line)


def next_line(lines, i):
    """Return the first line from `i` on that is not blank."""
    while i < len(lines) and not lines[i].strip():
        i += 1
    return i


def belongs(line, outermost):
    """Return whether a line belongs to a block whose outermost lines have this indentation."""
    return indent(line) > outermost or (indent(line) == outermost and follows(line))


def choice(span, arms):
    """Return statements that choose between the original and the changed ones."""
    declared = re.fullmatch(r"(\s*cdef [^=]*?= )(.*)\n", span, re.DOTALL)
    if declared:
        values = "".join(
            f"({arm[len(declared[1]) : -1]}) if cybn_fault() == {n} else "
            for n, arm in arms.items()
        )
        return f"{declared[1]}{values}({declared[2]})\n"
    space = " " * indent(span)
    parts = [
        f"{space}{'if' if i == 0 else 'elif'} cybn_fault() == {n}:\n{deeper(arm, space)}"
        for i, (n, arm) in enumerate(arms.items())
    ]
    return "".join(parts) + f"{space}else:\n{deeper(span, space)}"


def deeper(span, space):
    """Return statements indented one step further, or ``pass`` if there are none."""
    if not span.strip():
        return f"{space}    pass\n"
    return "".join(f"    {line}" if line.strip() else line for line in span.splitlines(True))
