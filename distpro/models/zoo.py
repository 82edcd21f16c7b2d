"""Any network by name: the CIFAR zoo of the distillation literature, and all of timm."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from distpro.errors import UserError, unknown
from distpro.models.base import StagedNet
from distpro.models.mobilenet import MobileNetV2
from distpro.models.resnet import ResNet, ResNet50
from distpro.models.shufflenet import ShuffleV1, ShuffleV2
from distpro.models.vgg import VGG
from distpro.models.wrn import WideResNet

WIDE = ((40, 2), (40, 1), (28, 4), (16, 4), (16, 2), (16, 1), (10, 1))
NARROW, TIMES4 = (16, 16, 32, 64), (32, 64, 128, 256)  # channels of a ResNet's stem and stages
HUBS = ("hf-hub:", "hf_hub:", "local-dir:")  # timm's own prefixes

Builder = Callable[..., StagedNet]
RGB = tuple[float, float, float]
ZOO: dict[str, Builder] = {
    **{f"wrn_{depth}_{width}": partial(WideResNet, depth, width) for depth, width in WIDE},
    **{f"resnet{depth}": partial(ResNet, depth, NARROW) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(ResNet, depth, TIMES4) for depth in (8, 32)},
    "ShuffleV1": ShuffleV1,
    "ShuffleV2": ShuffleV2,
    "MobileNetV2": MobileNetV2,
    "vgg8": partial(VGG, 1),
    "vgg13": partial(VGG, 2),
    "ResNet50": ResNet50,
}


def list_models() -> list[str]:
    """The names of the CIFAR zoo; any other `wrn_D_W` and every timm name are valid too."""
    return list(ZOO)


def create_model(
    name: str,
    num_classes: int,
    in_chans: int = 3,
    pretrained: bool = False,
    image_size: int | tuple[int, int] | None = None,
) -> nn.Module:
    """The network `name`: images [N, in_chans, H, W] to logits [N, num_classes].

    name: of the zoo, in any letter case, or of timm; the prefixes `cifar:` and `timm:` choose one of them. A plain
        name known to both is the zoo's (`vgg13`), unless only timm spells it that way: `resnet50` is timm's.
    pretrained: load timm's published weights; the zoo has none: load a checkpoint instead.
    image_size: of the images, for timm models that must know it. Others take any size; so do, if it is given,
        those whose position embedding timm can resize (plain ViTs).
    Raises UserError for an unknown name, and if timm cannot build the model or get its weights.
    """
    check_model(name)
    side, bare = _split(name)
    build = _ours(side, bare)
    if build:
        if pretrained:
            raise UserError(f"model '{name}' has no published weights here: train it, or load a checkpoint")
        return build(num_classes=num_classes, in_chans=in_chans)
    return _timm_model(bare, num_classes, in_chans, pretrained, image_size)


def check_model(name: str) -> None:
    """Raise a `UserError` with the nearest names if `create_model` does not know `name`."""
    side, bare = _split(name)
    if not (side != "timm" and _builder(bare)) and not (side != "cifar" and _timm_knows(bare)):
        raise unknown("model", name, _names(side))


def normalisation(name: str) -> tuple[RGB, RGB] | None:
    """Mean and std with which the inputs of timm's network `name` are normalised; None if timm does not say."""
    side, bare = _split(name)
    if side == "cifar" or _ours(side, bare) or not _timm_knows(bare):
        return None
    import timm

    try:  # for a network on a hub or in a folder, timm knows them only once it is created
        made = timm.create_model(bare).pretrained_cfg if bare.startswith(HUBS) else None
        found: Any = made or vars(timm.models.get_pretrained_cfg(bare))
    except Exception:  # an unknown tag, or no connection: creating the network will report it
        return None
    mean, std = (tuple(map(float, found[key])) for key in ("mean", "std"))
    return (mean, std) if len(mean) == len(std) == 3 else None


def plain_name(name: str) -> str:
    """The name as shown in tables: without a prefix, and in the zoo's letter case if the zoo knows it."""
    bare = _split(name.rpartition("/")[2])[1]
    return {known.lower(): known for known in ZOO}.get(bare.lower(), bare)


def published_classes(model: nn.Module) -> int | None:
    """Number of classes of timm's published weights for this network; None if it has none."""
    return (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")


def _split(name: str) -> tuple[str, str]:
    side, colon, bare = name.partition(":")
    return (side, bare) if colon and side in ("cifar", "timm") else ("", name)


def _names(side: str) -> list[str]:
    import timm

    names = [] if side == "timm" else list(ZOO)
    names += [] if side == "cifar" else [name for name in timm.list_models() if name not in names]
    return [f"{side}:{name}" for name in names] if side else names


def _builder(name: str) -> Builder | None:
    wide = re.fullmatch(r"wrn_(\d+)_(\d+)", name, re.IGNORECASE)
    if wide:
        return partial(WideResNet, int(wide[1]), int(wide[2]))
    return {known.lower(): build for known, build in ZOO.items()}.get(name.lower())


def _ours(side: str, bare: str) -> Builder | None:
    """The builder of the network if it is the zoo's, not timm's; else None."""
    build = None if side == "timm" else _builder(bare)
    return None if build and not side and bare not in ZOO and _timm_knows(bare) else build


def _timm_knows(name: str) -> bool:
    import timm  # imported here: it takes seconds, which a zoo network need not wait for

    return name.startswith(HUBS) or timm.is_model(name)


def _timm_model(
    name: str, num_classes: int, in_chans: int, pretrained: bool, image_size: int | tuple[int, int] | None
) -> nn.Module:
    import timm

    create = partial(timm.create_model, name, pretrained, num_classes=num_classes, in_chans=in_chans)
    options: dict[str, Any] = {} if image_size is None else {"img_size": image_size, "dynamic_img_size": True}
    model = None
    try:
        while model is None:
            try:
                model = create(**options)
            except TypeError as error:  # raised by the constructor, before any weights are fetched
                refused = [option for option in options if f"'{option}'" in str(error)]
                if not refused:
                    raise
                del options[refused[0]]
    except Exception as error:
        how = " with its published weights" if pretrained else ""
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"timm cannot create '{name}'{how}: {reason}") from error
    if getattr(getattr(model, "patch_embed", None), "num_patches", None) == 0:
        raise UserError(f"the patches of '{name}' are larger than the images ({image_size})")
    return model
