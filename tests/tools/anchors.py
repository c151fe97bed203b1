"""Find a place in the source by a function and a few tokens in it, even after lines have moved.

`find` is compared token by token, so that line breaks, indentation and comments may change. It
works on Python and Cython (.py, .pyx, .pxd); functions are found by their indentation.
"""

import re
import textwrap
from itertools import pairwise

TOKEN = re.compile(r'"[^"\n]*"|\'[^\'\n]*\'|\w+|[^\w\s]')
COMMENT = re.compile(r'"""(?:.|\n)*?"""|"[^"\n]*"|\'[^\'\n]*\'|#[^\n]*')
HEADER = r"^( *)(?:(?:cdef|cpdef|def)\b[^=\n]*?\b{0}\(|(?:cdef )?class {0}\b)"


def anchored(text, function, find, put, at=None):
    """Return where `find` is in a function, and the text that replaces it.

    Parameters
    ----------
    text : str
        The source of a module.
    function : str
        Name of a function or class, ``"Class.method"``, or empty for the whole module.
    find, put : str
        Code. Further lines of `put` are indented like the line that `find` begins in.
    at : int, optional
        Which occurrence, counted from 1, if `find` occurs several times. Otherwise it must occur
        only once.

    Returns
    -------
    tuple of int, int, str
        First and last offset, and the replacement.
    """
    code = without_comments(text)
    start, end = extent(code, function)
    found = list(pattern(find).finditer(code, start, end))
    if len(found) < (at or 1) or (at is None and len(found) > 1):
        where = f"in {function}" if function else "in the module"
        raise LookupError(f"{find!r} is {where} {len(found)} times, not {at or 'once'}")
    place = found[(at or 1) - 1]
    line = text[text.rfind("\n", 0, place.start()) + 1 : place.start()]
    space = " " * (len(line) - len(line.lstrip(" ")))
    return place.start(), place.end(), textwrap.indent(put, space).removeprefix(space)


def replaced(text, function, find, put, at=None):
    """Return the source with `find` replaced by `put`."""
    start, end, new = anchored(text, function, find, put, at)
    return text[:start] + new + text[end:]


def pattern(find):
    """Return a regular expression for the tokens of `find`, with any space between them."""
    tokens = TOKEN.findall(find)
    parts = [re.escape(tokens[0])]
    for before, token in pairwise(tokens):
        apart = before[-1].isalnum() and token[0].isalnum()
        parts.append((r"[\s\\]+" if apart else r"[\s\\]*") + re.escape(token))
    first = r"\b" if re.match(r"\w", tokens[0]) else ""
    last = r"\b" if re.match(r"\w", tokens[-1]) else ""
    return re.compile(first + "".join(parts) + last)


def without_comments(text):
    """Return the text with comments and long strings blanked; offsets do not change."""

    def blank(match):
        if match[0].startswith(("#", '"""')):
            return re.sub(r"[^\n]", " ", match[0])
        return match[0]

    return COMMENT.sub(blank, text)


def extent(code, function):
    """Return the first and last offset of a function or class, or of the text if it has no name."""
    start, end = 0, len(code)
    for name in filter(None, function.split(".")):
        headers = [
            match
            for match in re.finditer(HEADER.format(re.escape(name)), code[start:end], re.MULTILINE)
            if has_body(code, start + match.start())
        ]
        if len(headers) != 1:
            raise LookupError(f"{len(headers)} functions of the name {function}, not one")
        start += headers[0].start()
        end = min(end, end_of_block(code, start, len(headers[0][1])))
    return start, end


def end_of_header(code, start):
    """Return the offset of the end of the header that begins at `start`, across brackets."""
    depth = 0
    for place in range(start, len(code)):
        depth += (code[place] in "([{") - (code[place] in ")]}")
        if code[place] == "\n" and depth == 0:
            return place
    return len(code)


def has_body(code, start):
    """Return whether a header belongs to a definition, not to a declaration."""
    return code[start : end_of_header(code, start)].rstrip().endswith(":")


def end_of_block(code, start, indent):
    """Return the offset of the end of the block below a header."""
    after = end_of_header(code, start)
    outside = re.compile(rf"^ {{0,{indent}}}[^\s]", re.MULTILINE)
    place = outside.search(code, after + 1)
    while place and code[place.end() - 1] in ")]}":  # a bracket that closes at the margin
        place = outside.search(code, place.end())
    return place.start() if place else len(code)
