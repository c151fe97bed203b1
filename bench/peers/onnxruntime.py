"""ONNX Runtime: a model of one BatchNormalization node, inference only."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial

import numpy as np

from ..task import EPS, FIRST, FRESH, REUSED, Arrays, Contestant, Data, Peer, Task

OPSET = 15  # BatchNormalization as it has been since 2021


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
        a, out = data.arrays(task), data.get("out", task.dtype)
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = task.threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = self.runtime.InferenceSession(
            self.model(task, a), options, providers=["CPUExecutionProvider"]
        )
        run = partial(session.run, ["y"], {"x": a.x})
        yield Contestant(FIRST, FRESH, run, lambda result: result[0])
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", self.runtime.OrtValue.ortvalue_from_numpy(a.x))
        binding.bind_output("y", "cpu", 0, out.dtype.type, out.shape, out.ctypes.data)
        yield Contestant(FIRST, REUSED, partial(session.run_with_iobinding, binding), lambda _: out)

    def model(self, task: Task, a: Arrays) -> bytes:
        """Return the model, serialized."""
        helper, proto = self.onnx.helper, self.onnx.TensorProto
        kind = proto.FLOAT if a.x.dtype == np.float32 else proto.DOUBLE
        names = ["gamma", "beta", "mean", "var"]
        node = helper.make_node("BatchNormalization", ["x", *names], ["y"], epsilon=EPS)
        x, y = (helper.make_tensor_value_info(name, kind, task.shape) for name in "xy")
        constants = [self.onnx.numpy_helper.from_array(getattr(a, n), n) for n in names]
        graph = helper.make_graph([node], "batch_norm", [x], [y], constants)
        opset = helper.make_operatorsetid("", OPSET)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
        serialized: bytes = model.SerializeToString()
        return serialized
