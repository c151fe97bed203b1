"""The cases: which tasks race on which shapes. To add one, yield it from a function below.

Shapes: He et al. 2016 (ResNet-50; how often each of its 53 layers comes is from oneDNN's benchdnn
shape list), Szegedy et al. 2016 (Inception v3, the odd sizes); the rest are typical of tables,
sequences, volumes and images, and edges of the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

from .machine import last_level_bytes, usable_cpus
from .task import Task

THREADS = min(2, usable_cpus())  # the bars are for two
PLAIN = ("forward", "inference", "backward")
PASSES = ("forward", "backward")

RESNET50 = {  # (C, H, W) at batch 32: layers
    (64, 112, 112): 1,
    (256, 56, 56): 4,
    (64, 56, 56): 6,
    (512, 28, 28): 5,
    (128, 28, 28): 8,
    (1024, 14, 14): 7,
    (256, 14, 14): 12,
    (2048, 7, 7): 4,
    (512, 7, 7): 6,
}
SOME = [(256, 56, 56), (512, 28, 28), (256, 14, 14)]  # of them, for a quick run
INCEPTION = [(32, 149), (64, 147), (80, 73), (192, 71), (96, 35), (384, 17), (448, 8)]
SHAPES = {
    "inception": [(32, c, side, side) for c, side in INCEPTION],
    "tabular": [(60, 100), (256, 256), (4096, 512)],
    "sequences": [(32, 256, 1000)],
    "volumes": [(2, 32, 64, 96, 96), (8, 64, 16, 32, 32)],
    "few channels": [(8, 3, 512, 512), (1, 1, 2048, 2048)],
    "edge": [
        *((1, 3, 1, 1), (1, 24, 14, 14), (12, 4, 8, 8)),
        *((2, 251, 28, 28), (8, 322, 16, 16), (880801, 1, 1, 1)),
    ],
}
TINY = [(32, 16), (60, 100)]  # calls that take as long as Python does; timed on one thread
ACTIVATED = [(32, 96, 56, 56), (32, 384, 14, 14)]
ACTIVATIONS = ("relu", "relu6", "leaky_relu", "hardswish", "silu", "gelu", "sigmoid", "tanh")


@dataclass(frozen=True)
class Case:
    """One race: tasks on one shape for all peers, and tasks for cybn alone beside them."""

    group: str
    tasks: tuple[Task, ...]
    alone: tuple[Task, ...] = ()
    layers: int = 1  # how often the network has it
    quick: bool = False  # part of a quick run
    bars: bool = False  # needed by a bar
    peers: tuple[str, ...] | None = None  # by `Peer.name`; None is all

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes that all tasks share."""
        return (self.tasks or self.alone)[0].shape

    @property
    def every(self) -> tuple[Task, ...]:
        """All tasks."""
        return self.tasks + self.alone

    @property
    def name(self) -> str:
        """An id that says everything: resnet50-forward-64x112x112-float32-2t."""
        one = self.every[0]
        works = dict.fromkeys(task.work for task in self.tasks)
        work = one.work if len(works) == 1 else one.operation
        norm = one.norm if one.norm != "batch" else ""
        words = [self.group, norm, work, short(self.shape), one.dtype, f"{one.threads}t"]
        return (
            "-".join(filter(None, words)).replace(", ", "-").replace(" + ", "+").replace(" ", "-")
        )


def short(shape: tuple[int, ...]) -> str:
    """Return the name of a shape: images without their batch of 32, all others in full."""
    image = len(shape) == 4 and shape[0] == 32
    return "x".join(map(str, shape[1:] if image else shape))


def every_case() -> Iterator[Case]:
    """Yield all cases, those of one shape behind each other."""
    yield from network()
    yield from beyond_the_cache()
    yield from other_shapes()
    yield from small_calls()
    yield from fused()
    yield from masks()
    yield from family()


def network() -> Iterator[Case]:
    """Yield ResNet-50's layers: two threads, one, float64."""
    for sizes, layers in RESNET50.items():
        for operation in PLAIN:
            task = Task(operation, (32, *sizes), threads=THREADS)
            yield Case("resnet50", (task,), layers=layers, quick=True, bars=True)
        for operation in PLAIN:
            task = Task(operation, (32, *sizes), threads=1)
            both = (task._replace(threads=THREADS),)
            yield Case("one thread", (task,), both, layers)
        for operation in PLAIN:
            task = Task(operation, (32, *sizes), dtype="float64", threads=THREADS)
            yield Case("resnet50 float64", (task,), layers=layers)


def beyond() -> list[tuple[int, ...]]:
    """Return shapes whose x is larger than the last-level cache, of ResNet-50 where it has some."""
    cache, nbytes = last_level_bytes(), 4 * 32
    large = [(32, *sizes) for sizes in RESNET50 if prod(sizes) * nbytes > cache]
    if large:
        return large
    batch = 32
    while prod(SOME[0]) * 4 * batch <= cache:
        batch *= 2
    return [(batch, 64, 112, 112), (batch, *SOME[0])]


def beyond_the_cache() -> Iterator[Case]:
    """Yield what memory alone decides: plain passes beside the floor, half types beside float32."""
    for shape in beyond():
        for operation in PLAIN:
            task = Task(operation, shape, threads=THREADS)
            halves = [task._replace(dtype=dtype) for dtype in ("bfloat16", "float16")]
            yield Case("beyond", (task,), tuple(halves), bars=True, peers=("floor",))
    for sizes in RESNET50:
        for operation in PASSES:
            plain = Task(operation, (32, *sizes), threads=THREADS)
            halves = [plain._replace(dtype=dtype) for dtype in ("bfloat16", "float16")]
            yield Case("half", tuple(halves), (plain,), quick=sizes in SOME)


def other_shapes() -> Iterator[Case]:
    """Yield every other group of shapes."""
    for group, shapes in SHAPES.items():
        for shape, operation in product(shapes, PLAIN):
            if operation == "inference" or prod(shape) > shape[1]:  # one value has no variance
                yield Case(group, (Task(operation, shape, threads=THREADS),))


def small_calls() -> Iterator[Case]:
    """Yield calls that are bound by what surrounds the loops, on one thread."""
    for shape in TINY:
        for operation in PLAIN:
            yield Case("tiny", (Task(operation, shape, threads=1),), quick=True, bars=True)
        layer = Task("forward", shape, threads=1, module=True)
        yield Case("tiny", (layer,), quick=True, bars=True)
    flat, image = (32, 16), (4, 8, 4, 4)
    for operation, shape in product(PASSES, (flat, image)):
        plain = Task(operation, shape, threads=1)
        special = (
            plain._replace(activation="relu", residual=True),
            plain._replace(dtype="bfloat16"),
            plain._replace(masked=True),
            plain._replace(norm="layer")
            if shape == flat
            else plain._replace(norm="group", groups=2),
        )
        for task in special:
            yield Case("calls", (task,), quick=True, bars=True)


def fused() -> Iterator[Case]:
    """Yield activations and residuals, beside the plain pass."""
    for shape, operation in product(ACTIVATED, PASSES):
        plain = Task(operation, shape, threads=THREADS)
        every = [plain._replace(activation=name) for name in ACTIVATIONS]
        every.append(plain._replace(activation="relu", residual=True))
        yield Case("activations", (), (plain, *every), bars=True)
    for sizes, operation in product(RESNET50, PASSES):
        plain = Task(operation, (32, *sizes), threads=THREADS)
        relu = plain._replace(activation="relu")
        tasks = (relu, relu._replace(residual=True))
        yield Case("fused", tasks, (plain,), quick=sizes in SOME)


def masks() -> Iterator[Case]:
    """Yield masked batches, beside the same without a mask."""
    for shape, operation in product([(32, 256, 1000), (32, 64, 56, 56)], PASSES):
        plain = Task(operation, shape, threads=THREADS)
        yield Case("masks", (), (plain, plain._replace(masked=True)), quick=True)


def family() -> Iterator[Case]:
    """Yield layer, RMS, group and instance norm: transformers, a UNet, short rows, half types."""
    some = [((32, 512, 768), "layer", 0), ((8, 320, 16, 16), "group", 32)]
    transformers = [(32, 512, 768), (8, 2048, 1024), (4096, 4096)]
    lines = [(shape, norm, 0) for shape in transformers for norm in ("layer", "rms")]
    lines += [((2**20 // size, size), "layer", 0) for size in (16, 32, 64, 128)]
    images = [(8, 320, 64, 64), (8, 1280, 16, 16), (8, 320, 16, 16), (8, 320, 32, 32)]
    lines += [(shape, "group", 32) for shape in [*images, (2, 512, 64, 64)]]
    lines += [((4, 64, 256, 256), "instance", 0), ((16, 256, 14, 14), "instance", 0)]
    for line, operation in product(lines, PASSES):
        shape, norm, groups = line
        task = Task(operation, shape, norm, threads=THREADS, groups=groups)
        short_rows = (norm, shape[-1] <= 128) == ("layer", True)
        bars = short_rows or (norm, shape[2:]) == ("group", (16, 16))
        yield Case("family", (task,), bars=bars, quick=line in some)
    wide = [lines[2], lines[3], lines[4], lines[10], lines[15]]
    for (shape, norm, groups), dtype, operation in product(wide, ("bfloat16", "float16"), PASSES):
        yield Case("family", (Task(operation, shape, norm, dtype, THREADS, groups),))
