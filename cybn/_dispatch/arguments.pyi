from typing import Any

from numpy.typing import NDArray

def use_moments(moments: type) -> None: ...
def destination(
    out: NDArray[Any] | None,
    x: NDArray[Any],
    inputs: tuple[Any, ...],
    name: str = "out",
    may_be_input: bool = True,
) -> NDArray[Any]: ...
