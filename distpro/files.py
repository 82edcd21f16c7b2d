"""Writing files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distpro import parallel
from distpro.errors import UserError


def check_writable(folder: Path) -> None:
    """A `UserError` where no such folder could be made, or nothing be written to it; nothing is made."""
    there = next((place for place in (folder, *folder.absolute().parents) if place.exists()), Path("/"))
    if not there.is_dir():
        raise UserError(f"cannot write to '{folder}': '{there}' is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to '{folder}': no permission for '{there}', or a file system that is read only")


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the place of `path` once the block ends without error.

    A reader, or a job killed in between, finds the old file or the new one, never half of one. Of the processes of a
    job the first one's file stays; the others write to a path of no consequence.
    """
    if not parallel.first():
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / Path(path).name
        return
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}") from error
    os.close(handle)
    part = Path(name)
    try:
        yield part
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
