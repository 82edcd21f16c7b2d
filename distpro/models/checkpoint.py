"""Loading and saving weights: checked before the model is touched, and no pickled code ever runs."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from distpro import parallel
from distpro.errors import UserError, nearest
from distpro.files import whole_file
from distpro.models.zoo import ZOO

# The keys under which common training scripts save weights, in the order tried. As in timm, the moving average is
# first: its accuracy is the one reported.
STATE_DICT_KEYS = (
    "state_dict_ema",
    "model_ema",
    "ema",
    "state_dict",
    "model",
    "model_state_dict",
    "net",
    "student",
    "params",
)
AVERAGED = "n_averaged"  # added to the weights by torch's AveragedModel, which torchvision's scripts save
# Old versions of torch did not save this count; `load_state_dict` then keeps the model's own.
BATCH_COUNT = ".num_batches_tracked"


def load_checkpoint(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """Copy the weights in the file `path` into `model`, all or none of them.

    The file is `.safetensors` or a torch file (read with `weights_only=True`), with a state dict on its own or
    under a usual key ("model", "state_dict", …). Prefixes that data-parallel and compiled models add to the names
    are removed. If the file also holds a moving average of the weights, that is loaded.
    Returns the file's scalar entries, such as {"epoch": 200, "best_acc": 66.41}.
    Raises UserError for a file that is missing, unreadable, unsafe or of another model.
    """
    path = Path(path)
    state, facts = _read(path)
    target = _unwrapped(model)
    _check(state, target, path)
    target.load_state_dict(state)
    return facts


def save_weights(model: nn.Module, path: str | Path, facts: Mapping[str, str] | None = None) -> None:
    """Write the model's state dict to `path` as safetensors, with the model's own keys and `facts` in the header.

    The write is atomic. Shared tensors are written once per key, so that every reader finds every key. In a
    distributed job only the primary process writes. Raises UserError if the file cannot be written.
    """
    if not parallel.is_primary():
        return
    state = {key: value.detach().cpu().contiguous().clone() for key, value in _unwrapped(model).state_dict().items()}
    with whole_file(path) as part:
        save_file(state, part, metadata={"format": "pt", **(facts or {})})


def _unwrapped(model: nn.Module) -> nn.Module:
    """The network without the wrappers of torch.compile and data parallelism."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _unwrapped(model.module)
    return _unwrapped(model._orig_mod) if "_orig_mod" in model._modules else model  # type: ignore[arg-type]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The file's state dict, without wrappers' prefixes, and its scalar entries."""
    if not path.is_file():
        beside = nearest(path.name, (p.name for p in path.parent.glob("*") if p.is_file()), most=1)
        raise UserError(f"there is no checkpoint '{path}'" + "".join(f": did you mean '{name}'?" for name in beside))
    try:
        content = _content(path)
    except UserError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in the readers
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"checkpoint '{path}' cannot be read, it is damaged or in another format: {reason}") from error
    if _is_state(content):
        return _bare_names(content), {}
    held = [name for name in STATE_DICT_KEYS if isinstance(content, Mapping) and _is_state(content.get(name))]
    if not held:
        found = f"keys {_some(content)}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        where = ", ".join(repr(name) for name in STATE_DICT_KEYS)
        raise UserError(f"checkpoint '{path}' holds {found}: expected a state dict, or one under {where}")
    facts = {key: value.item() if isinstance(value, Tensor) else value for key, value in _single(content)}
    return _bare_names(content[held[0]]), facts


def _content(path: Path) -> Any:
    """The content of the file, whose type is detected from its first bytes, not from its name."""
    with path.open("rb") as file:
        head = file.read(64)
    # first, since a header's length may well begin as a pickle does, with 0x80
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return _safetensors(path)
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return _torch_file(path)
    if head.lstrip()[:1] == b"<":
        raise UserError(f"checkpoint '{path}' is a web page: download the file itself")
    raise ValueError("expected a safetensors or a torch file")


def _safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        metadata = {key: value for key, value in (file.metadata() or {}).items() if key != "format"}
        return {**metadata, "state_dict": {key: file.get_tensor(key) for key in file.keys()}}  # noqa: SIM118


def _torch_file(path: Path) -> Any:
    try:
        # A Namespace only holds values; many training scripts save their flags in one.
        with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:  # its name misleads torch
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if not code:
            raise ValueError("its pickle was not written by torch") from error
        raise UserError(
            f"checkpoint '{path}' holds Python objects ({code[1]}), which could run code and are refused: "
            "expected tensors only; if you trust it, save its state_dict alone"
        ) from error


def _is_state(content: object) -> bool:
    return isinstance(content, Mapping) and bool(content) and all(isinstance(v, Tensor) for v in content.values())


def _single(content: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [
        (key, value)
        for key, value in content.items()
        if isinstance(value, (bool, int, float, str)) or (isinstance(value, Tensor) and value.numel() == 1)
    ]


def _bare_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    bare = {key.replace("_orig_mod.", ""): value for key, value in state.items() if key != AVERAGED}
    while all(key.startswith("module.") for key in bare):
        bare = {key.removeprefix("module."): value for key, value in bare.items()}
    return bare


def _check(state: Mapping[str, Tensor], model: nn.Module, path: Path) -> None:
    """If `state` does not fit `model`, raise the UserError that best explains why."""
    own = model.state_dict()
    missing = [key for key in own if key not in state and not key.endswith(BATCH_COUNT)]
    extra = [key for key in state if key not in own]
    differ = [key for key in own if key in state and own[key].shape != state[key].shape]
    if not (missing or extra or differ):
        for key, value in state.items():
            if not bool(value.isfinite().all()):
                raise UserError(f"checkpoint '{path}' holds values in '{key}' that are not finite")
        return
    pairs = [(state[key].shape, own[key].shape) for key in differ]
    # Only a classifier can differ just in its number of outputs: those of other layers are inputs elsewhere.
    if not missing and not extra and any(len(wants) > 1 for _, wants in pairs):
        outputs = {(has[:1], wants[:1]) for has, wants in pairs}
        if len(outputs) == 1 and all(has[1:] == wants[1:] for has, wants in pairs):
            (has,), (wants,) = outputs.pop()
            raise UserError(f"checkpoint '{path}' has {has} classes, but the data has {wants}")
    problems = [
        *([f"expected {_some(missing)}, not in the file"] if missing else []),
        *([f"found {_some(extra)}, not in the model"] if extra else []),
        *(f"'{key}' is {list(state[key].shape)}, expected {list(own[key].shape)}" for key in differ[:1]),
    ]
    fitting = _zoo_name(state)
    name = _zoo_name(own) or type(model).__name__
    hint = f"; the file fits '{fitting}'" if fitting not in (None, name) else ""
    raise UserError(f"checkpoint '{path}' does not fit {name}: {'; '.join(problems)}{hint}")


def _some(keys: Any) -> str:
    first, *rest = map(repr, keys) if keys else ["nothing"]
    return first + (f" and {len(rest)} more" if rest else "")


def _zoo_name(state: Mapping[str, Tensor]) -> str | None:
    """The zoo network with these keys and shapes, regardless of classes and input channels."""
    shapes = {key: value.shape for key, value in state.items() if not key.endswith(BATCH_COUNT)}
    for name, build in ZOO.items():
        with torch.device("meta"):
            net = build(num_classes=1, in_chans=1)
        own = {key: value.shape for key, value in net.state_dict().items() if not key.endswith(BATCH_COUNT)}
        if own.keys() != shapes.keys():
            continue
        stem, head = next(iter(own)), f"{net.classifier_name}."
        differ = [key for key in own if own[key] != shapes[key] and not key.startswith(head) and key != stem]
        if not differ and own[stem][:1] == shapes[stem][:1]:
            return name
    return None
