"""Networks by name (the CIFAR zoo and timm), and their checkpoints."""

from distpro.models.base import StagedNet
from distpro.models.checkpoint import load_checkpoint, save_weights
from distpro.models.own import is_own, own_network
from distpro.models.zoo import check_model, create_model, list_models, normalisation, plain_name, published_classes

__all__ = [
    "StagedNet",
    "check_model",
    "create_model",
    "is_own",
    "list_models",
    "load_checkpoint",
    "normalisation",
    "own_network",
    "plain_name",
    "published_classes",
    "save_weights",
]
