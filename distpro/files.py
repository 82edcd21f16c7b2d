"""Files: YAML read, folders checked, and atomic writes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from distpro import parallel
from distpro.errors import UserError


def read_yaml(path: Path, kind: str, example: str = "epochs: 40") -> dict[str, Any]:
    """Return the keys and values of a YAML file; raise a `UserError` if it has none, or does not exist.

    kind: what the file is, such as "configuration", and `example`: what it may hold; for the messages.
    """
    if not path.is_file():
        raise UserError(f"no {kind} '{path}'")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise UserError(f"'{path}' must hold keys and values, such as '{example}'")
    return values


def check_writable(folder: Path) -> None:
    """Raise a `UserError` if the folder cannot be created or written to; nothing is created."""
    there = next((place for place in (folder, *folder.absolute().parents) if place.exists()), Path("/"))
    if not there.is_dir():
        raise UserError(f"cannot write to '{folder}': '{there}' is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to '{folder}': no permission for '{there}', or a read-only file system")


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to, which replaces `path` if the block ends without an error.

    Readers, even after a crash, see the old file or the new one, never a partial one. Only rank 0's file is kept;
    other ranks write to a temporary folder. Raise a `UserError` if the file cannot be written.
    """
    if not parallel.is_primary():
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / Path(path).name
        return
    path, part = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
        part = Path(name)
        yield part
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)
        part.replace(path)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}") from error
    except (RuntimeError, SafetensorError) as error:  # what torch.save and safetensors raise on a full disk
        free, reason = shutil.disk_usage(path.parent).free // 2**20, str(error).partition("\n")[0]
        raise UserError(f"cannot write '{path}', where {free} MB are free: {reason}") from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
