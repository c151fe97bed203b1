"""ONNX Runtime: a model of one BatchNormalization node, inference only."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial

from ..task import EPS, FIRST, FRESH, REUSED, Array, Contestant, Data, Peer, Task

OPSET = 15  # has the version of BatchNormalization since 2021


class OnnxRuntime(Peer):
    """ONNX Runtime on the CPU, channels-first, the only layout of the operator."""

    name = "ONNX Runtime"
    install = "pip install onnxruntime onnx"
    order = 40
    note = "one-node model; fresh: run; reused: run_with_iobinding; threads do not spin"

    def __init__(self) -> None:
        self.runtime = importlib.import_module("onnxruntime")
        self.onnx = importlib.import_module("onnx")
        self.version = str(self.runtime.__version__)

    def contestants(self, task: Task, data: Data) -> Iterator[Contestant]:
        """Yield both outputs of plain inference."""
        if task.operation != "inference" or not task.plain:
            return
        out = data.get("out", task.dtype)
        arrays = data.arrays(task)._asdict()
        arrays = {name: arrays[name] for name in ("x", "gamma", "beta", "mean", "var")}
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = task.threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = self.runtime.InferenceSession(
            self.model(task, arrays), options, providers=["CPUExecutionProvider"]
        )
        yield Contestant(FIRST, FRESH, partial(session.run, ["y"], arrays))
        binding = session.io_binding()
        for name, array in arrays.items():
            binding.bind_ortvalue_input(name, self.runtime.OrtValue.ortvalue_from_numpy(array))
        binding.bind_output("y", "cpu", 0, out.dtype.type, out.shape, out.ctypes.data)
        yield Contestant(FIRST, REUSED, partial(session.run_with_iobinding, binding), lambda _: out)

    def model(self, task: Task, arrays: dict[str, Array]) -> bytes:
        """Return the model, serialized."""
        kind = {"float32": "float", "float64": "double"}[task.dtype]
        inputs = ", ".join(f"{kind}{list(v.shape)} {name}" for name, v in arrays.items())
        node = f"y = BatchNormalization <epsilon: float = {EPS}> ({', '.join(arrays)})"
        head = f'<ir_version: 8, opset_import: ["" : {OPSET}]>'
        text = f"{head} batch_norm ({inputs}) => ({kind}{list(task.shape)} y) {{ {node} }}"
        serialized: bytes = self.onnx.parser.parse_model(text).SerializeToString()
        return serialized
