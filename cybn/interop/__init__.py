"""Exchanging layer state with PyTorch, Keras, Flax, ONNX and files.

By key mapping over plain dicts of arrays; nothing here needs those libraries.

>>> import cybn
>>> from cybn import interop
>>> bn = cybn.BatchNorm2d(2)
>>> sorted(interop.to_keras(bn))
['beta', 'gamma', 'moving_mean', 'moving_variance']
>>> interop.keras_options(bn)["momentum"]
0.9
>>> interop.from_torch(interop.to_torch(bn))
BatchNorm(2, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)

Values are copied unchanged, so inference gives the same. Two conventions differ:

- *Momentum* weighs the new value in cybn and PyTorch, the old one in Keras, Flax and ONNX. The
  functions here take and give it in the sense of the library that they are named after.
- *The running variance* is the unbiased one in PyTorch, the biased one in Keras, Flax and ONNX. A
  layer made from one of these has `running_ddof` 1 or 0 accordingly, so that its own updates go on
  as they began. Given `count`, the values of a channel in a training batch, the variance itself is
  converted, times n / (n - 1) or back.

===============  ===================================================================================
_arrays.py       arrays of other libraries, in place where they allow it
_forms.py        what each library calls the arrays, and what they mean
_narrow.py       types narrower than NumPy's, from their bits
_layers.py       a layer from a group of arrays, and back
_torch.py        PyTorch
_keras.py        Keras
_flax.py         Flax, both linen and nnx
_onnx.py         ONNX: one node
_onnx_graph.py   ONNX: all nodes of a model
_convert.py      a whole model's state at once
_files.py        arrays and layers in files
_saved.py        a layer as plain data for a file, and back
_npz.py          npz files, read without trust
_safetensors.py  safetensors files
===============  ===================================================================================
"""

from ._arrays import as_array
from ._convert import Converted, convert, find
from ._files import load_arrays, load_layers, save_arrays, save_layers
from ._flax import flatten, flax_options, from_flax, to_flax, unflatten
from ._keras import from_keras, keras_options, to_keras
from ._onnx import OnnxNode, from_onnx, to_onnx
from ._onnx_graph import OnnxLayers, onnx_layers
from ._torch import from_torch, to_torch, torch_options

__all__ = [
    "Converted",
    "OnnxLayers",
    "OnnxNode",
    "as_array",
    "convert",
    "find",
    "flatten",
    "flax_options",
    "from_flax",
    "from_keras",
    "from_onnx",
    "from_torch",
    "keras_options",
    "load_arrays",
    "load_layers",
    "onnx_layers",
    "save_arrays",
    "save_layers",
    "to_flax",
    "to_keras",
    "to_onnx",
    "to_torch",
    "torch_options",
    "unflatten",
]
