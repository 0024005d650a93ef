"""vLLM-Omni on a processor alone, for tests: a platform, and what a CUDA-less process lacks otherwise."""

import torch

_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
"""Schemas that torchvision's Python expects of its CUDA library; kept alive here, never called."""
_OPERATORS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_OPERATORS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
