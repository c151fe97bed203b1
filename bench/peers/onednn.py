"""oneDNN: its batch normalization, through the C API with ctypes.

Every layout is asked for by name, and the note of a contestant says which implementation
oneDNN picked for it: ``bnorm_jit:avx2`` and the like are its just-in-time compiled kernels,
``ncsp_bnorm:any`` and ``nspc_bnorm:any`` the compiled ones for the plain layouts.
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
from numpy.typing import NDArray

from ..task import EPS, FIRST, LAST, REUSED, Contestant, Data, Peer, Task, aligned

# From dnnl_types.h; these numbers are fixed for all of version 3.
MAJOR = 3
CPU, F32, DEFAULT_STREAM = 1, 3, 1
TRAINING, INFERENCE, BACKWARD = 64, 96, 128
GLOBAL_STATS, SCALE, SHIFT = 1, 2, 4
TAGS = {FIRST: 5, LAST: 22, "nChw8c": 102, "nChw16c": 78}  # abcd, acdb, aBcd8b, aBcd16b
NAME_OF_IMPLEMENTATION = 8
ARGUMENTS = {
    "src": 1,
    "dst": 17,
    "mean": 49,
    "variance": 50,
    "scale": 51,
    "shift": 52,
    "diff_src": 129,
    "diff_dst": 145,
    "diff_scale": 255,
    "diff_shift": 256,
}


class OneDNN(Peer):
    """oneDNN built with OpenMP, float32, in both plain layouts and two blocked ones."""

    name = "oneDNN"
    install = "pip install onednn-cpu-gomp"
    order = 20
    note = "C API; the blocked layouts are its own, and reordering to them is not counted"

    def __init__(self) -> None:
        self.library = find()
        read = ct.cast(self.library.dnnl_version, ct.CFUNCTYPE(ct.POINTER(ct.c_int)))()
        self.version = ".".join(str(read[i]) for i in range(3))
        if read[0] != MAJOR:
            raise OSError(f"oneDNN is {self.version}; this peer speaks to version {MAJOR}")
        self.engine = self.make("engine", CPU, ct.c_size_t(0))
        self.stream = self.make("stream", self.engine, DEFAULT_STREAM)
        # The OpenMP that oneDNN is linked with, already in the process.
        self.set_num_threads: Any = ct.CDLL("libgomp.so.1").omp_set_num_threads
        self.layouts = []
        for layout, tag in TAGS.items():
            implementation = self._probe(tag)
            if implementation.startswith("ref"):  # tens of times slower: nobody would use it
                self.note += f"; {layout} is left out, it has no kernel here ({implementation})"
            else:
                self.layouts.append(layout)

    def contestants(self, task: Task, data: Data) -> Iterator[Contestant]:
        """Yield every layout that has a kernel on this CPU, output reused, for plain float32."""
        if task != Task(task.operation, task.shape, threads=task.threads):
            return
        self.set_num_threads(task.threads)
        for layout in self.layouts:
            if layout == LAST and len(task.shape) == 2:
                continue
            run = self.prepare(task, layout, data)
            read = partial(_unblocked, layout=layout, channels=task.channels)
            before = partial(self.set_num_threads, task.threads)
            yield Contestant(layout, REUSED, run, read, run.implementation, before=before)

    def prepare(self, task: Task, layout: str, data: Data) -> _Run:
        """Make a primitive and bind its memory."""
        plain = layout in (FIRST, LAST)
        a = data.arrays(task, layout if plain else FIRST)
        x, dy = (v if plain else _blocked(v, layout) for v in (a.x, a.dy))
        out = data.get("out", task.dtype, layout) if plain else aligned(x.shape, x.dtype)
        vectors = {"scale": a.gamma, "shift": a.beta}
        if task.operation == "inference":
            vectors |= {"mean": a.mean, "variance": a.var}
        else:
            vectors |= {"mean": np.empty_like(a.gamma), "variance": np.empty_like(a.gamma)}
        tensor = self.tensor(task, layout)
        forward = self.descriptor(task.operation, tensor)
        run = _Run(self, forward, tensor, {"src": x, "dst": out}, vectors)
        if task.operation != "backward":
            return run
        run()  # mean and variance
        tensors = {"src": x, "diff_dst": dy, "diff_src": out}
        del vectors["shift"]  # oneDNN refuses what it does not need
        vectors |= {"diff_scale": np.empty_like(a.gamma), "diff_shift": np.empty_like(a.gamma)}
        return _Run(
            self, self.descriptor(task.operation, tensor, forward), tensor, tensors, vectors
        )

    def _probe(self, tag: int) -> str:
        """Return the implementation that oneDNN picks for an image in a layout."""
        tensor = self.memory_desc((2, 32, 8, 8), tag)
        return _implementation(self, self.descriptor("forward", tensor))

    def descriptor(
        self, operation: str, tensor: _Handle, forward: _Handle | None = None
    ) -> _Handle:
        """Describe the forward primitive, or the backward one that belongs to it."""
        eps = ct.c_float(EPS)
        kind = INFERENCE if operation == "inference" else TRAINING
        flags = SCALE | SHIFT | (GLOBAL_STATS if kind == INFERENCE else 0)
        name = "batch_normalization_forward_primitive_desc"
        arguments = [self.engine, kind, tensor, tensor, eps, flags, None]
        if forward is not None:
            name = "batch_normalization_backward_primitive_desc"
            arguments = [self.engine, BACKWARD, tensor, tensor, tensor, eps, flags, forward, None]
        return self.make(name, *arguments, destroy="primitive_desc")

    def tensor(self, task: Task, layout: str) -> _Handle:
        """Describe x, with its spatial axes folded to two: the tags are those of images."""
        n, c, *spatial = task.shape
        height, width = spatial if len(spatial) == 2 else (1, prod(spatial))
        return self.memory_desc((n, c, height, width), TAGS[layout])

    def memory_desc(self, sizes: tuple[int, ...], tag: int) -> _Handle:
        """Describe a float32 tensor."""
        dims = (ct.c_int64 * 12)(*sizes)
        return self.make(
            "memory_desc_create_with_tag", len(sizes), dims, F32, tag, destroy="memory_desc"
        )

    def make(self, name: str, *arguments: Any, destroy: str = "") -> _Handle:
        """Call ``dnnl_<name>_create``, or `name` as it is where it says create itself."""
        pointer = ct.c_void_p()
        function = f"dnnl_{name}" if "create" in name else f"dnnl_{name}_create"
        self.check(function, ct.byref(pointer), *arguments)
        return _Handle(self, pointer, f"dnnl_{destroy or name}_destroy")

    def check(self, function: str, *arguments: Any) -> None:
        """Call a function of the library; raise where it does not succeed."""
        plain = [a.pointer if isinstance(a, _Handle) else a for a in arguments]
        status = getattr(self.library, function)(*plain)
        if status:
            raise RuntimeError(f"{function} gives status {status}")


class _Handle:
    """A pointer to something of oneDNN's, destroyed with this object."""

    def __init__(self, peer: OneDNN, pointer: ct.c_void_p, destroy: str) -> None:
        self.pointer, self._destroy = pointer, getattr(peer.library, destroy)

    def __del__(self) -> None:
        self._destroy(self.pointer)


class _Argument(ct.Structure):
    _fields_ = (("index", ct.c_int), ("memory", ct.c_void_p))


class _Run:
    """A primitive with all its memory; call it to execute."""

    def __init__(
        self,
        peer: OneDNN,
        descriptor: _Handle,
        whole: _Handle,
        tensors: dict[str, NDArray[Any]],
        vectors: dict[str, NDArray[Any]],
    ) -> None:
        flat = peer.memory_desc(vectors["scale"].shape, 2)  # tag a
        memory = {n: self._memory(peer, whole, a) for n, a in tensors.items()}
        memory |= {n: self._memory(peer, flat, a) for n, a in vectors.items()}
        primitive = peer.make("primitive", descriptor)
        self.output = tensors["dst" if "dst" in tensors else "diff_src"]
        self.implementation = _implementation(peer, descriptor)
        arguments = [_Argument(ARGUMENTS[n], m.pointer.value) for n, m in memory.items()]
        self._keep = (tensors, vectors, memory, primitive, descriptor, peer)
        self._execute = peer.library.dnnl_primitive_execute
        self._wait = peer.library.dnnl_stream_wait
        self._arguments = (
            *(primitive.pointer, peer.stream.pointer, len(arguments)),
            (_Argument * len(arguments))(*arguments),
        )
        self._stream = peer.stream.pointer

    @staticmethod
    def _memory(peer: OneDNN, descriptor: _Handle, array: NDArray[Any]) -> _Handle:
        return peer.make("memory", descriptor, peer.engine, ct.c_void_p(array.ctypes.data))

    def __call__(self) -> NDArray[Any]:
        """Execute, and return the output."""
        if self._execute(*self._arguments) or self._wait(self._stream):
            raise RuntimeError("oneDNN could not execute")
        return self.output


def _implementation(peer: OneDNN, descriptor: _Handle) -> str:
    name = ct.c_char_p()
    peer.check("dnnl_primitive_desc_query", descriptor, NAME_OF_IMPLEMENTATION, 0, ct.byref(name))
    return (name.value or b"").decode()


def _blocked(first: NDArray[Any], layout: str) -> NDArray[Any]:
    """Copy a channels-first array to blocks of channels, padded with zeros."""
    block = int(layout.removeprefix("nChw").removesuffix("c"))
    n, c, *spatial = first.shape
    blocked = aligned((n, -(-c // block), *spatial, block), first.dtype)
    for channel in range(c):
        blocked[:, channel // block, ..., channel % block] = first[:, channel]
    return blocked


def _unblocked(y: NDArray[Any], layout: str, channels: int) -> NDArray[Any]:
    """Return an array in the shape (N, C, ...)."""
    if layout == FIRST:
        return y
    if layout == LAST:
        return np.moveaxis(y, -1, 1)
    lanes = np.moveaxis(y, -1, 2)
    return lanes.reshape(y.shape[0], -1, *y.shape[2:-1])[:, :channels]


def find() -> ct.CDLL:
    """Load libdnnl from the wheel, the environment's lib folder, or the system."""
    for place in _places():
        if Path(place).is_file():
            return ct.CDLL(str(place))
    system = ctypes.util.find_library("dnnl")
    if system is None:
        raise OSError("libdnnl.so is not found")
    return ct.CDLL(system)


def _places() -> Iterator[Path]:
    try:
        for file in importlib.metadata.files("onednn-cpu-gomp") or ():
            if file.name == "libdnnl.so":
                yield Path(str(file.locate()))
    except importlib.metadata.PackageNotFoundError:
        pass
    yield Path(sys.prefix) / "lib" / "libdnnl.so"
