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
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..task import EPS, LAYOUTS, REUSED, Contestant, Task, pick

__all__ = ["OneDNN"]

# From dnnl_types.h; these numbers are fixed for all of version 3.
MAJOR = 3
CPU, F32, DEFAULT_STREAM = 1, 3, 1
TRAINING, INFERENCE, BACKWARD = 64, 96, 128
GLOBAL_STATS, SCALE, SHIFT = 1, 2, 4
TAGS = dict(zip(LAYOUTS, (5, 22, 102, 78), strict=True))  # abcd, acdb, aBcd8b, aBcd16b
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


class OneDNN:
    """oneDNN built with OpenMP, float32, in both plain layouts and two blocked ones."""

    name = "oneDNN"
    install = "pip install onednn-cpu-gomp"
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

    def variants(self, operation: str, dtype: np.dtype[Any], threads: int) -> list[tuple[str, str]]:
        """Return every layout that has a kernel on this CPU, output reused, in float32."""
        if dtype != np.float32 or operation == "layer":
            return []
        return [(layout, REUSED) for layout in self.layouts]

    def prepare(self, task: Task) -> Contestant:
        """Make a primitive and bind its memory."""
        self.set_num_threads(task.threads)
        data, layout = task.data, task.layout
        x, out = data.x(layout), data.out(layout)
        c = data.shape.c
        vectors = {"scale": data.gamma, "shift": data.beta}
        if task.operation == "inference":
            vectors |= {"mean": data.mean, "variance": data.var}
        else:
            vectors |= {"mean": np.empty(c, x.dtype), "variance": np.empty(c, x.dtype)}
        tensor = self.tensor(task)
        forward = self.descriptor(task.operation, tensor)
        if task.operation != "backward":
            run = _Run(self, forward, task, {"src": x, "dst": out}, vectors)
        else:
            _Run(self, forward, task, {"src": x, "dst": out}, vectors)()  # mean and variance
            tensors = {"src": x, "diff_dst": data.dy(layout), "diff_src": out}
            del vectors["shift"]  # oneDNN refuses what it does not need
            vectors |= {"diff_scale": np.empty(c, x.dtype), "diff_shift": np.empty(c, x.dtype)}
            run = _Run(
                self, self.descriptor(task.operation, tensor, forward), task, tensors, vectors
            )

        def read(y: Any, channels: Any) -> Any:
            return pick(y, layout, channels)

        return Contestant(self.name, layout, task.output, run, read, run.implementation)

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

    def tensor(self, task: Task) -> _Handle:
        """Describe x, with its spatial axes folded to two: the tags are those of images."""
        shape = task.data.shape
        height, width = shape.spatial if len(shape.spatial) == 2 else (1, shape.size // shape.n)
        if len(shape.spatial) != 2:
            width //= shape.c
        return self.memory_desc((shape.n, shape.c, height, width), TAGS[task.layout])

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
        task: Task,
        tensors: dict[str, NDArray[Any]],
        vectors: dict[str, NDArray[Any]],
    ) -> None:
        whole = peer.tensor(task)
        flat = peer.memory_desc((task.data.shape.c,), 2)  # tag a
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
