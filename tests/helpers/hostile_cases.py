"""States and files that are damaged or malicious, and objects whose code must never run."""


def ran():
    raise AssertionError("code from a state was run")


class Bomb:
    """An object that raises AssertionError when it is unpickled or converted to an array."""

    def __reduce__(self):
        return (ran, ())


class Refusing:
    """An array-like that raises an error when it is converted to an array."""

    def __array__(self, dtype=None, copy=None):
        raise TypeError("this array cannot be converted")


def damaged(data, dice):
    """Return bytes of which some were cut off, moved or changed."""
    data = bytearray(data)
    what = dice.random()
    if what < 0.15:
        return data[: dice.randrange(len(data))]
    if what < 0.3:
        i, j = sorted(dice.sample(range(len(data)), 2))
        return data[j:] + data[i:j] + data[:i]
    if what < 0.4:
        i, j = sorted(dice.sample(range(len(data)), 2))
        return data[:j] + data[i:]
    if what < 0.5:
        i = dice.randrange(len(data) - 8)
        data[i : i + 8] = dice.choice([b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f"])
        return data
    for _ in range(dice.choice([1, 1, 2, 8])):
        data[dice.randrange(len(data))] = dice.randrange(256)
    return data
