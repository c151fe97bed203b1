"""Exchanging layer state with PyTorch, Keras, Flax, ONNX and files.

The functions map keys between plain dicts of arrays. They do not need those libraries, except that
ONNX's protocol buffers need the package onnx.

>>> import cybn
>>> from cybn import interop
>>> bn = cybn.BatchNorm2d(2)
>>> sorted(interop.to_keras(bn))
['beta', 'gamma', 'moving_mean', 'moving_variance']
>>> interop.keras_options(bn)["momentum"]
0.9
>>> interop.from_torch(interop.to_torch(bn))
BatchNorm(2, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)

Values are copied unchanged, so inference gives the same results. Two conventions differ:

- *Momentum* is the weight of the new value in cybn and PyTorch, and the weight of the old value in
  Keras, Flax and ONNX. Each function uses the convention of the library in its name.
- *The running variance* is unbiased in PyTorch, and biased in Keras, Flax and ONNX. A new layer has
  `running_ddof` 1 or 0 to match, so that its updates continue with the same kind of variance.
  Converting the variance to the other kind multiplies it by n / (n - 1), or by the inverse. This
  needs `count`, the number n of values per channel in a training batch.

===============  ===================================================================================
_arrays.py       arrays of other libraries as NumPy arrays, without a copy if possible
_forms.py        what each library calls the arrays, and what they mean
_narrow.py       bfloat16 and float8, converted from their bits to float32
_layers.py       a layer from a group of arrays, and back
_torch.py        PyTorch
_keras.py        Keras
_flax.py         Flax, both linen and nnx
_onnx.py         ONNX: a single node
_onnx_graph.py   ONNX: all nodes of a model
_convert.py      a whole model's state at once
_files.py        arrays and layers in files
_saved.py        a layer as plain data for a file, and back
_npz.py          npz files, read as untrusted input
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
