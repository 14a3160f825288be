"""Lets PyPI's torchvision import beside a torch without CUDA: vLLM's GLM-4V resizes images with it.

Its compiled part does not load there, and importing it then fails at two operators that it describes
to torch without having them; nothing that GLM-4V needs calls them. scripts/evidence/serve_check.sh puts this
beside that torchvision as `sitecustomize.py`, which Python imports at every start.
"""

import torch

LIBRARY = torch.library.Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    LIBRARY.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
