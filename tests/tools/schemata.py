"""Mutant schemata: many faults in one source, each behind its number, so that one build does.

`switched` puts the statements that a fault changes into both arms of an ``if``: changed where
CYBN_FAULT in the environment is the fault's number, and as they were elsewhere. Faults whose
statements overlap share one ``if``.
"""

import re

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


def switched(text, faults):
    """Return Cython source with all `faults`, a dict from number to (old, new), behind switches."""
    lines = text.splitlines(keepends=True)
    starts = logical_lines(lines)
    for first, last, numbers in reversed(merged(text, lines, starts, faults)):
        span = "".join(lines[first:last])
        arms = {n: span.replace(*faults[n]) for n in numbers}
        lines[first:last] = [choice(span, arms)]
    # What is included has no imports, and finds the switch where it is included.
    return re.sub(r"^from ", lambda _: f"{SWITCH}from ", "".join(lines), count=1, flags=re.M)


def merged(text, lines, starts, faults):
    """Return (first line, line after the last, numbers) of spans that do not overlap, in order."""
    spans = sorted((*span_of(text, lines, starts, old), n) for n, (old, _) in faults.items())
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


def span_of(text, lines, starts, old):
    """Return the lines of the whole statements, with their blocks, that `old` lies in."""
    at = text.index(old) + len(old) - len(old.lstrip())
    first = starts[text.count("\n", 0, at)]
    last = text.count("\n", 0, text.index(old) + len(old.rstrip())) + 1
    while True:
        before = first, last
        while last < len(lines) and starts[last] < last:  # the rest of a statement
            last += 1
        heads = [i for i in range(first, last) if starts[i] == i and lines[i].strip()]
        outermost = min(indent(lines[i]) for i in heads)
        while indent(lines[first]) > outermost or starts[first] != first or follows(lines[first]):
            first -= 1
            while not lines[first].strip():
                first -= 1
        while last < len(lines) and belongs(lines[last], outermost, lines[last - 1]):
            last += 1
        if (first, last) == before:
            return first, last


def follows(line):
    """Whether a line is an arm of a statement that began before it."""
    return re.match(r"\s*(elif|else|finally|except)\b", line)


def belongs(line, outermost, previous):
    """Whether a line goes on with a block whose outermost lines are indented so far."""
    if not line.strip():
        return False
    return indent(line) > outermost or (indent(line) == outermost and follows(line))


def choice(span, arms):
    """Return the statements, changed where a fault is on."""
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
    """Return statements one step further in; pass where there are none."""
    if not span.strip():
        return f"{space}    pass\n"
    return "".join(f"    {line}" if line.strip() else line for line in span.splitlines(True))
