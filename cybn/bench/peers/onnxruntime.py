"""ONNX Runtime: a model of one BatchNormalization node, inference only."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import numpy as np

from ..task import EPS, FIRST, FRESH, REUSED, Contestant, Data, Task, pick

__all__ = ["OnnxRuntime"]

OPSET = 15  # BatchNormalization as it has been since 2021


class OnnxRuntime:
    """ONNX Runtime on the CPU, channels-first, the only layout of the operator."""

    name = "ONNX Runtime"
    install = "pip install onnxruntime onnx"
    note = "one-node model; fresh: run; reused: run_with_iobinding; threads do not spin"

    def __init__(self) -> None:
        self.runtime = importlib.import_module("onnxruntime")
        self.onnx = importlib.import_module("onnx")
        self.version = str(self.runtime.__version__)

    def variants(self, operation: str, dtype: np.dtype[Any], threads: int) -> list[tuple[str, str]]:
        """Return both outputs of inference."""
        return [(FIRST, REUSED), (FIRST, FRESH)] if operation == "inference" else []

    def prepare(self, task: Task) -> Contestant:
        """Build the model and a session for it."""
        data = task.data
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = task.threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = self.runtime.InferenceSession(
            self._model(data), options, providers=["CPUExecutionProvider"]
        )
        out = data.out()
        if task.output == FRESH:
            run = partial(session.run, ["y"], {"x": data.x()})
        else:
            binding = session.io_binding()
            value = self.runtime.OrtValue.ortvalue_from_numpy
            binding.bind_ortvalue_input("x", value(data.x()))
            binding.bind_output("y", "cpu", 0, out.dtype.type, out.shape, out.ctypes.data)
            run = partial(session.run_with_iobinding, binding)

        def read(output: Any, channels: Any) -> Any:
            return pick(out if output is None else output[0], FIRST, channels)

        return Contestant(self.name, task.layout, task.output, run, read)

    def _model(self, data: Data) -> bytes:
        helper, proto = self.onnx.helper, self.onnx.TensorProto
        kind = proto.FLOAT if data.dtype == np.float32 else proto.DOUBLE
        names = ["gamma", "beta", "mean", "var"]
        node = helper.make_node("BatchNormalization", ["x", *names], ["y"], epsilon=EPS)
        graph = helper.make_graph(
            [node],
            "batch_norm",
            [helper.make_tensor_value_info("x", kind, data.shape.channels_first)],
            [helper.make_tensor_value_info("y", kind, data.shape.channels_first)],
            [self.onnx.numpy_helper.from_array(getattr(data, name), name) for name in names],
        )
        opset = helper.make_operatorsetid("", OPSET)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
        serialized: bytes = model.SerializeToString()
        return serialized
