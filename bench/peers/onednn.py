"""oneDNN: its batch normalization, through the C API with ctypes.

Every layout is requested by name. The note of a contestant names the implementation that oneDNN
has chosen: ``bnorm_jit:avx2`` and similar names are just-in-time compiled kernels, and
``ncsp_bnorm:any`` and ``nspc_bnorm:any`` are compiled ones for the plain layouts. Objects of the C
API are not freed before the process ends.
"""

from __future__ import annotations

import ctypes as ct
import ctypes.util
import importlib.metadata
import sys
from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..task import EPS, FIRST, LAST, REUSED, Array, Contestant, Data, Peer, Task, aligned

# From dnnl_types.h; these numbers are fixed for all of version 3.
MAJOR = 3
CPU, F32, DEFAULT_STREAM, TAG_A = 1, 3, 1, 2
KINDS = {"forward": 64, "inference": 96, "backward": 128}
GLOBAL_STATS, SCALE_AND_SHIFT = 1, 6
TAGS = {FIRST: 5, LAST: 22, "nChw8c": 102, "nChw16c": 78}  # abcd, acdb, aBcd8b, aBcd16b
NAME_OF_IMPLEMENTATION = 8
SRC, DST, MEAN, VARIANCE, SCALE, SHIFT = 1, 17, 49, 50, 51, 52
DIFF_SRC, DIFF_DST, DIFF_SCALE, DIFF_SHIFT = 129, 145, 255, 256


class Argument(ct.Structure):
    """An argument; `dnnl_primitive_execute` takes an array of these."""

    _fields_ = (("index", ct.c_int), ("memory", ct.c_void_p))


class OneDNN(Peer):
    """oneDNN built with OpenMP, float32, in both plain layouts and two blocked ones."""

    name = "oneDNN"
    install = "pip install onednn-cpu-gomp"
    order = 20
    note = "C API; also in its blocked layouts, without the time of conversion to them"

    def __init__(self) -> None:
        self.library = find()
        read = ct.cast(self.library.dnnl_version, ct.CFUNCTYPE(ct.POINTER(ct.c_int)))()
        self.version = ".".join(str(read[i]) for i in range(3))
        if read[0] != MAJOR:
            raise OSError(f"oneDNN is {self.version}; this peer needs version {MAJOR}")
        self.engine = self.make("engine_create", CPU, ct.c_size_t(0))
        self.stream = self.make("stream_create", self.engine, DEFAULT_STREAM)
        # The OpenMP that oneDNN is linked with, already in the process.
        self.set_num_threads: Any = ct.CDLL("libgomp.so.1").omp_set_num_threads
        self.layouts = []
        for layout in TAGS:
            tensor = self.tensor((2, 32, 8, 8), TAGS[layout])
            found = self.implementation(self.descriptor("forward", tensor))
            if found.startswith("ref"):  # tens of times slower
                self.note += f"; {layout} is left out, it has no kernel here ({found})"
            else:
                self.layouts.append(layout)

    def contestants(self, task: Task, data: Data) -> Iterator[Contestant]:
        """Yield every layout that has a kernel on this CPU, for plain tasks in float32."""
        if not task.plain or task.dtype != "float32":
            return
        before = partial(self.set_num_threads, task.threads)
        for layout in (name for name in self.layouts if name != LAST or LAST in task.layouts):
            yield self.prepared(task, layout, data, before)

    def prepared(self, task: Task, layout: str, data: Data, before: Any) -> Contestant:
        """Create a primitive and bind its memory; the note names the kernel that does the work."""
        plain, inference = layout in (FIRST, LAST), task.operation == "inference"
        a = data.arrays(task, layout if plain else FIRST)
        x, dy = (v if plain else _blocked(v, layout) for v in (a.x, a.dy))
        out = data.get("out", task.dtype, layout) if plain else aligned(x.shape, x.dtype)
        empty = [np.empty_like(a.gamma) for _ in range(4)]
        statistics = (a.mean, a.var) if inference else empty[:2]
        given = {SRC: x, DST: out, SCALE: a.gamma, SHIFT: a.beta}
        given |= dict(zip((MEAN, VARIANCE), statistics, strict=True))
        n, c, *spatial = task.shape  # the tags are those of images: fold to two spatial axes
        height, width = spatial if len(spatial) == 2 else (1, prod(spatial))
        tensor = self.tensor((n, c, height, width), TAGS[layout])
        what = self.descriptor("inference" if inference else "forward", tensor)
        call = self.primitive(what, tensor, given)
        if task.operation == "backward":
            call()  # mean and variance
            what = self.descriptor("backward", tensor, what)
            del given[DST], given[SHIFT]  # oneDNN refuses arguments that it does not need
            given |= {DIFF_DST: dy, DIFF_SRC: out, DIFF_SCALE: empty[2], DIFF_SHIFT: empty[3]}
            call = self.primitive(what, tensor, given)

        def read(_: Any) -> Array:
            return out if plain else _unblocked(out, task.channels)

        return Contestant(layout, REUSED, call, read, self.implementation(what), before=before)

    def descriptor(self, operation: str, tensor: Any, forward: Any = None) -> Any:
        """Describe a forward primitive, or the backward one that belongs to it."""
        flags = SCALE_AND_SHIFT | (GLOBAL_STATS if operation == "inference" else 0)
        way, tensors = ("forward", 2) if forward is None else ("backward", 3)
        hints = [None] if forward is None else [forward, None]
        name = f"batch_normalization_{way}_primitive_desc_create"
        kind, eps = KINDS[operation], ct.c_float(EPS)
        return self.make(name, self.engine, kind, *[tensor] * tensors, eps, flags, *hints)

    def primitive(self, descriptor: Any, tensor: Any, arrays: dict[int, Array]) -> Any:
        """Return a call that executes a primitive on arrays."""
        flat = self.tensor(arrays[SCALE].shape, TAG_A)
        arguments = (Argument * len(arrays))()
        for argument, (index, array) in zip(arguments, arrays.items(), strict=True):
            shape, where = flat if array.ndim == 1 else tensor, ct.c_void_p(array.ctypes.data)
            argument.index = index
            argument.memory = self.make("memory_create", shape, self.engine, where).value
        primitive = self.make("primitive_create", descriptor)
        execute, wait = self.library.dnnl_primitive_execute, self.library.dnnl_stream_wait
        options = (primitive, self.stream, len(arguments), arguments)

        def call() -> None:
            if execute(*options) or wait(self.stream):
                raise RuntimeError(f"oneDNN could not execute on {len(arrays)} arrays")

        return call

    def tensor(self, sizes: tuple[int, ...], tag: int) -> Any:
        """Describe a float32 tensor."""
        dims = (ct.c_int64 * 12)(*sizes)
        return self.make("memory_desc_create_with_tag", len(sizes), dims, F32, tag)

    def make(self, name: str, *arguments: Any) -> ct.c_void_p:
        """Call a function that creates something, and return it."""
        made = ct.c_void_p()
        if status := getattr(self.library, f"dnnl_{name}")(ct.byref(made), *arguments):
            raise RuntimeError(f"dnnl_{name} gives status {status}")
        return made

    def implementation(self, descriptor: Any) -> str:
        """Return the name of the kernel that oneDNN has chosen."""
        name = ct.c_char_p()
        query = self.library.dnnl_primitive_desc_query
        query(descriptor, NAME_OF_IMPLEMENTATION, 0, ct.byref(name))
        return (name.value or b"").decode()


def _blocked(first: Array, layout: str) -> Array:
    """Copy a channels-first array to blocks of channels, padded with zeros."""
    block = int(layout.removeprefix("nChw").removesuffix("c"))
    n, c, *spatial = first.shape
    blocked = aligned((n, -(-c // block), *spatial, block), first.dtype)
    for i in range(c):
        blocked[:, i // block, ..., i % block] = first[:, i]
    return blocked


def _unblocked(y: Array, channels: int) -> Array:
    """Return blocks in the shape (N, C, ...)."""
    return np.moveaxis(y, -1, 2).reshape(y.shape[0], -1, *y.shape[2:-1])[:, :channels]


def find() -> ct.CDLL:
    """Load libdnnl from the wheel, the environment's lib folder, or the system."""
    places = [Path(sys.prefix) / "lib" / "libdnnl.so"]
    for wheel in importlib.metadata.distributions(name="onednn-cpu-gomp"):
        places += [Path(str(f.locate())) for f in wheel.files or () if f.name == "libdnnl.so"]
    found = [str(place) for place in places if place.is_file()]
    name = found[-1] if found else ctypes.util.find_library("dnnl")
    if name is None:
        raise OSError("libdnnl.so is not found")
    return ct.CDLL(name)
