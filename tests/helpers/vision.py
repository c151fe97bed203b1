"""Import torchvision, even if its operators are compiled for another version of PyTorch."""

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:  # "operator torchvision::nms does not exist"; no test needs it
    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
