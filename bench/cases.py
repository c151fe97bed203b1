"""The cases: which tasks are timed on which shapes. To add one, yield it from a function below.

The shapes are those of the tests: layers of published networks (oneDNN's benchdnn has the counts of
ResNet-50's 53 layers), tables, sequences, volumes, images, and limits inside the kernels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path

from .machine import last_level_bytes
from .task import Task

PLAIN = ("forward", "inference", "backward")
PASSES = ("forward", "backward")

FILE = Path(__file__).parents[1] / "tests" / "helpers" / "shapes.json"
PUBLISHED = {k: v for k, v in json.loads(FILE.read_text("utf-8")).items() if k != "source"}
SHAPES = {
    group: [(one.get("n", 32), one["c"], *(one[k] for k in "dhwl" if k in one)) for one in every]
    for group, every in PUBLISHED.items()
}
RESNET50 = SHAPES.pop("resnet50")
LAYERS = [one["layers"] for one in PUBLISHED["resnet50"]]  # how often each occurs
SOME = [RESNET50[i] for i in (3, 6)]  # for a quick run: too large for many caches, and not
TINY = [(32, 16), (60, 100)]  # calls that take about as long as their Python code; one thread
ACTIVATED = [(32, 96, 56, 56), (32, 384, 14, 14)]
ACTIVATIONS = ("relu", "relu6", "leaky_relu", "hardswish", "silu", "gelu", "sigmoid", "tanh")


@dataclass(frozen=True)
class Case:
    """One race: tasks on one shape for all peers, and tasks for cybn only."""

    group: str
    tasks: tuple[Task, ...]
    alone: tuple[Task, ...] = ()
    layers: int = 1  # how often the network has it
    quick: bool = False  # part of a quick run
    bars: bool = False  # needed by a bar
    peers: tuple[str, ...] | None = None  # names of peers; None means all

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes that all tasks share."""
        return (self.tasks or self.alone)[0].shape

    @property
    def marks(self) -> list[str]:
        """The markers of its test."""
        return ["quick"] * self.quick + ["bars"] * self.bars

    @property
    def every(self) -> tuple[Task, ...]:
        """All tasks."""
        return self.tasks + self.alone

    @property
    def name(self) -> str:
        """The id of the case, for example resnet50-forward-64x112x112-float32-2t."""
        one = self.every[0]
        works = {task.work for task in self.tasks}
        work = one.work if len(works) == 1 else one.operation
        norm = one.norm if one.norm != "batch" else ""
        words = [self.group, norm, work, short(self.shape), one.dtype, f"{one.threads}t"]
        name = "-".join(filter(None, words)).replace(" + ", "+")
        return name.replace(", ", "-").replace(" ", "-")


def short(shape: tuple[int, ...]) -> str:
    """Return the name of a shape: images without their batch of 32, all others in full."""
    image = len(shape) == 4 and shape[0] == 32
    return "x".join(map(str, shape[1:] if image else shape))


def every_case() -> Iterator[Case]:
    """Yield all cases, those of one shape in succession if possible."""
    yield from network()
    yield from beyond_the_cache()
    for group, shapes in SHAPES.items():
        for shape, operation in product(shapes, PLAIN):
            if operation == "inference" or prod(shape) > shape[1]:  # one value has no variance
                yield Case(group, (Task(operation, shape),))
    yield from small_calls()
    yield from fused()
    for shape, operation in product([(32, 256, 1000), (32, 64, 56, 56)], PASSES):
        plain = Task(operation, shape)
        yield Case("masks", (), (plain, plain._replace(masked=True)), quick=True)
    yield from family()
    for shape, operation in product([(32, 64, 56, 56), (32, 1024, 7, 7)], PASSES):
        yield Case("steps", (Task(operation, shape),), peers=("floor", "steps"))


def network() -> Iterator[Case]:
    """Yield ResNet-50's layers on two threads, on one, and in float64."""
    for (shape, layers), operation in product(zip(RESNET50, LAYERS, strict=True), PLAIN):
        task = Task(operation, shape)
        yield Case("resnet50", (task,), layers=layers, quick=prod(shape) < 1 << 24, bars=True)
        yield Case("one thread", (task._replace(threads=1),), (task,), layers)
        yield Case("resnet50 float64", (task._replace(dtype="float64"),), layers=layers)


def beyond_the_cache() -> Iterator[Case]:
    """Yield cases that memory limits: plain passes with the floor, half types with float32.

    Shapes are those of ResNet-50 with x larger than the last cache, or two with more samples.
    """
    cache = last_level_bytes() // 4
    large = [shape for shape in RESNET50 if prod(shape) > cache]
    batch = next(n for n in (32 << i for i in range(20)) if n * prod(RESNET50[0][1:]) > cache)
    for shape, operation in product(large or [(batch, *s[1:]) for s in RESNET50[:2]], PLAIN):
        task = Task(operation, shape)
        yield Case("beyond", (task,), halves(task), bars=True, peers=("floor",))
    for shape, operation in product(RESNET50, PASSES):
        task = Task(operation, shape)
        yield Case("half", halves(task), (task,), quick=shape in SOME)


def halves(task: Task) -> tuple[Task, ...]:
    """Return a task in both half types."""
    return tuple(task._replace(dtype=dtype) for dtype in ("bfloat16", "float16"))


def small_calls() -> Iterator[Case]:
    """Yield small calls on one thread, which spend most of their time outside the loops."""
    for shape in TINY:
        tasks = [Task(operation, shape, threads=1) for operation in PLAIN]
        for task in (*tasks, Task("forward", shape, threads=1, module=True)):
            yield Case("tiny", (task,), quick=True, bars=True)
    flat, image = (32, 16), (4, 8, 4, 4)
    norms = {flat: {"norm": "layer"}, image: {"norm": "group", "groups": 2}}
    special = {"activation": "relu", "residual": True}, {"dtype": "bfloat16"}, {"masked": True}
    for operation, shape in product(PASSES, (flat, image)):
        for options in (*special, norms[shape]):
            task = Task(operation, shape, threads=1)._replace(**options)
            yield Case("calls", (task,), quick=True, bars=True)


def fused() -> Iterator[Case]:
    """Yield activations and residuals, with the plain pass to compare."""
    for shape, operation in product(ACTIVATED, PASSES):
        plain = Task(operation, shape)
        every = [plain._replace(activation=name) for name in ACTIVATIONS]
        every.append(plain._replace(activation="relu", residual=True))
        yield Case("activations", (), (plain, *every), bars=True)
    for shape, operation in product(RESNET50, PASSES):
        plain = Task(operation, shape)
        relu = plain._replace(activation="relu")
        yield Case("fused", (relu, relu._replace(residual=True)), (plain,), quick=shape in SOME)


def family() -> Iterator[Case]:
    """Yield layer, RMS, group and instance norm: transformers, a UNet, short rows, half types."""
    rows = [(32, 512, 768), (8, 2048, 1024), (4096, 4096)]
    short_rows = [(2**20 // size, size) for size in (16, 32, 64, 128)]
    images = [(8, 320, 64, 64), (8, 1280, 16, 16), (8, 320, 16, 16), (8, 320, 32, 32)]
    lines = [(shape, norm, 0) for shape in rows for norm in ("layer", "rms")]
    lines += [(shape, "layer", 0) for shape in short_rows]
    lines += [(shape, "group", 32) for shape in [*images, (2, 512, 64, 64)]]
    lines += [((4, 64, 256, 256), "instance", 0), ((16, 256, 14, 14), "instance", 0)]
    for (shape, norm, groups), operation in product(lines, PASSES):
        bars = shape in short_rows or shape[2:] == (16, 16)
        quick = norm != "rms" and shape in (rows[0], images[2])
        task = Task(operation, shape, norm, groups=groups)
        yield Case("family", (task,), bars=bars, quick=quick)
    wide = [lines[2], lines[3], lines[4], lines[10], lines[15]]
    for (shape, norm, groups), i, operation in product(wide, (0, 1), PASSES):
        yield Case("family", (halves(Task(operation, shape, norm, groups=groups))[i],))


# ---- PyTorch's modules and networks --------------------------------------------------------------

# The batch size of each.
NETWORKS = {"ResNet-50": 16, "MobileNetV2": 32, "ConvNeXt": 8, "UNet": 4, "transformer": 32}
MODES = ("inference", "evaluation step", "training step")


def small_modules() -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Yield a module's class, a shape, and whether the memory is channels-last."""
    for n in (32, 512, 4096):
        yield "BatchNorm1d", (n, 64), False
    for kind, size, n in product(("LayerNorm", "RMSNorm"), (64, 192, 768), (64, 1024, 4096)):
        yield kind, (n, size), False
    images = ((64, 8), (64, 28), (64, 56), (256, 14), (256, 28), (512, 7))
    kinds = ("BatchNorm2d", "GroupNorm", "InstanceNorm2d")
    for kind, (c, side), n in product(kinds, images, (1, 4, 8, 16, 32)):
        if n * c * side**2 < 1 << 21:
            yield from ((kind, (n, c, side, side), last) for last in (False, True))
