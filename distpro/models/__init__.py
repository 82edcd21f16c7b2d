"""Networks by name (the CIFAR zoo and timm), and their checkpoints."""

from distpro.models.base import StagedNet
from distpro.models.checkpoint import load_checkpoint, save_weights
from distpro.models.own import own_network
from distpro.models.zoo import create_model, list_models, normalisation, plain_name, published_classes

__all__ = [
    "StagedNet",
    "create_model",
    "list_models",
    "load_checkpoint",
    "normalisation",
    "own_network",
    "plain_name",
    "published_classes",
    "save_weights",
]
