"""What the zoo's networks share: stages, timm's methods to read them, and weight initialisation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn


class StagedNet(nn.Module, ABC):
    """A network of a stem, stages and a head, from which timm's feature methods follow.

    Every stage returns its map *before* the ReLU, and whatever reads that map (the next block, the head)
    begins with the ReLU. So a map can be returned as it is: nothing is computed twice, no later
    in-place operation modifies it, and a batch norm sees each batch once.

    A subclass defines `stem` and, if the defaults do not fit, `stage` and `pool`. Layers are named as in the
    published checkpoints.
    """

    classifier_name: ClassVar[str] = "fc"

    def __init__(self, num_classes: int, modules: Sequence[str], channels: Sequence[int], reductions: Sequence[int]):
        """For each stage: its module's name, its map's channels, and its reduction (input height / map height)."""
        super().__init__()
        self.num_classes = num_classes
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": c, "reduction": r, "module": m} for m, c, r in zip(modules, channels, reductions, strict=True)
        ]

    @abstractmethod
    def stem(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] -> the input of the first stage."""

    def stage(self, index: int, x: Tensor) -> Tensor:
        """The pre-ReLU map [N, C, H, W] of stage `index`, from the previous map."""
        return self.get_submodule(self.feature_info[index]["module"])(x)

    def pool(self, x: Tensor) -> Tensor:
        """The last map [N, C, H, W], pre-ReLU -> the classifier's input [N, C]."""
        return F.relu(x).mean((2, 3))

    def get_classifier(self) -> nn.Module:
        return self.get_submodule(self.classifier_name)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The pre-ReLU maps of the selected stages, in network order, like timm's method of this name.

        indices: None for all stages, n for the last n, or a sequence (negative counts from the end).
        stop_early: run no stage after the last selected one; the first result is then that stage's map.
        norm: ignored, as in timm's convolutional networks.
        Returns (last map, [maps]), each [N, C, H, W], or only [maps] with `intermediates_only`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is '{output_fmt}', expected 'NCHW'")
        wanted = self._wanted(indices)
        maps = []
        x = self.stem(x)
        for index in range(max(wanted) + 1 if stop_early else len(self.feature_info)):
            x = self.stage(index, x)
            if index in wanted:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def _wanted(self, indices: int | Sequence[int] | None) -> list[int]:
        stages = range(len(self.feature_info))
        if indices is None:
            return list(stages)
        if isinstance(indices, int):
            indices = range(-indices, 0)
        if not indices or not all(-len(stages) <= i < len(stages) for i in indices):
            raise ValueError(f"feature indices {list(indices)}: expected 0 to {stages[-1]}, or -1 and below")
        return [stages[i] for i in indices]

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] -> the last stage's map [N, C, H, W], pre-ReLU."""
        x = self.stem(x)
        for index in range(len(self.feature_info)):
            x = self.stage(index, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map [N, C, H, W] -> logits [N, num_classes], or with `pre_logits` the pooled [N, C]."""
        pooled = self.pool(x)
        return pooled if pre_logits else self.get_classifier()(pooled)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] -> logits [N, num_classes]; any H and W."""
        return self.forward_head(self.forward_features(x))


def conv(cin: int, cout: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the size at stride 1 (odd kernels)."""
    return nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)


def projection(cin: int, cout: int, stride: int) -> nn.Sequential:
    """A residual block's shortcut: identity if the shapes agree, else 1x1 convolution and batch norm."""
    if stride == 1 and cin == cout:
        return nn.Sequential()
    return nn.Sequential(conv(cin, cout, 1, stride), nn.BatchNorm2d(cout))


def he_init(net: nn.Module, linear_std: float | None = None) -> None:
    """Initialise as the published networks do: convolutions from N(0, 2 / fan-out) (arXiv 1502.01852), biases zero.

    `linear_std`: also linear weights, from N(0, linear_std^2), with zero biases; None keeps torch's defaults.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, std=linear_std)
            nn.init.zeros_(module.bias)
