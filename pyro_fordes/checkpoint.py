"""States on disk: written atomically, checked by a checksum, read without unpickling.

A file is what ``torch.save`` makes of a mapping of tensors, numbers, texts and containers of these,
so ``torch.load(path, weights_only=True)`` reads it and nothing in it can run.
"""

import hashlib
import os
import re
import secrets
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_fordes._checks import ArgumentError, CheckpointError

FORMAT = 2
"""Number of the file format; it changes when older versions could not read a file."""


def _with_faults(state: dict[str, Any]) -> dict[str, Any]:
    """From format 1 to 2, which counts faults of particles; other states are as they were."""
    if "num_particles" not in state:
        return state
    return {**state, "faults": torch.zeros(state["num_particles"], dtype=torch.int64)}


_UPGRADES = {1: _with_faults}

_NAME = re.compile(r"step-(\d+)\.pt")


def write(path: str | Path, state: Mapping[str, Any]) -> Path:
    """Write a state so that the file is complete or not there at all.

    The state goes to a temporary file in the same folder, which is flushed to the disk and then
    takes the place of an older file of that name.

    Args:
        path: the file; its folder is made if it is not there.
        state: tensors, numbers, texts, None, and dicts, lists and tuples of these.

    Returns:
        The path.

    Raises:
        CheckpointError: if the file cannot be written; an older file of that name stays as it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write(Path(folder) / "state.pt", {"step": 3, "x": torch.ones(2)})
        ...     read(path)["step"]
        3
    """
    path = _path(path)
    temporary = None
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder; name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not by tempfile, whose files only their owner can read.
        name = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        with name.open("xb") as file:
            temporary = name
            torch.save({"format": FORMAT, "checksum": checksum(state), "state": dict(state)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"cannot write the checkpoint {path}: {error}; an older file of that name is unchanged"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return path


def _path(path: object) -> Path:
    """A file's name as a path."""
    if not isinstance(path, str | os.PathLike):
        raise ArgumentError(f"path must be a text or a pathlib.Path, got {path!r}")
    return Path(path)


def read(path: str | Path, device: Any = None) -> dict[str, Any]:
    """Read what `write` has written.

    Args:
        path: the file.
        device: where the tensors go; None leaves them on the CPU.

    Raises:
        CheckpointError: if there is no such file, or it is damaged, of another kind or of a format
            that this version does not know.
    """
    path = _path(path)
    try:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise CheckpointError(f"cannot read the checkpoint {path}: it {what}")
        # On the CPU first: the checksum is of bytes, and a damaged file names no device for us.
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except PermissionError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error}") from error
    except Exception as error:
        raise CheckpointError(
            f"cannot read the checkpoint {path}: it is damaged, or no checkpoint "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'empty'})"
        ) from error
    if not isinstance(content, dict) or not {"format", "checksum", "state"} <= content.keys():
        raise CheckpointError(f"{path} is no checkpoint of pyro_fordes; save(...) writes one")
    state, number = content["state"], content["format"]
    if not isinstance(state, dict) or checksum(state) != content["checksum"]:
        raise CheckpointError(
            f"the checkpoint {path} is damaged: its checksum does not fit its content"
        )
    if not isinstance(number, int) or (number != FORMAT and number not in _UPGRADES):
        versions = state.get("versions")
        wrote = versions.get("pyro_fordes") if isinstance(versions, dict) else None
        raise CheckpointError(
            f"the checkpoint {path} has format {number!r}, and this version of pyro_fordes reads "
            f"formats 1 to {FORMAT}; load it with the version that wrote it"
            f"{'' if wrote is None else f', {wrote}'}"
        )
    for older in range(number, FORMAT):
        state = _UPGRADES[older](state)
    return state if device is None else _moved(state, device)


def checksum(state: Any) -> str:
    """SHA-256 of a state: of every tensor's bytes, shape and dtype, and of everything around them.

    Example:
        >>> checksum({"x": torch.ones(2)}) == checksum({"x": torch.ones(2)})
        True
    """
    digest = hashlib.sha256()
    _feed(digest, state)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous()
        digest.update(f"tensor{tuple(data.shape)}{data.dtype}".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        digest.update(f"dict{len(value)}".encode())
        for key, item in value.items():
            _feed(digest, key)
            _feed(digest, item)
    elif isinstance(value, list | tuple):
        digest.update(f"{type(value).__name__}{len(value)}".encode())
        for item in value:
            _feed(digest, item)
    elif value is None or isinstance(value, bool | int | float | str):
        digest.update(f"{type(value).__name__}{value!r};".encode())
    else:
        raise CheckpointError(
            f"a state may hold tensors, numbers, texts and containers of these, got "
            f"{type(value).__name__}"
        )


def _moved(value: Any, device: Any) -> Any:
    """A tree with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(item, device) for item in value)
    return value


def _sync(folder: Path) -> None:
    """Flush a folder, so that a new name in it survives a crash of the machine."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def numbered(folder: str | Path) -> list[Path]:
    """The checkpoints of a folder, newest (highest step) first.

    Example:
        >>> numbered("no such folder")
        []
    """
    folder = Path(folder)
    try:
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    except OSError as error:
        raise CheckpointError(f"cannot list the checkpoints in {folder}: {error}") from error
    steps = {int(found[1]): name for name in names if (found := _NAME.fullmatch(name))}
    return [folder / steps[step] for step in sorted(steps, reverse=True)]


def check_writable(folder: str | Path) -> None:
    """Make a folder and try to write to it, before any work depends on it.

    Raises:
        CheckpointError: if it cannot be written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(
            f"no checkpoint can be written to the folder {folder}: {error}; nothing has run yet"
        ) from error


def write_numbered(folder: str | Path, step: int, state: Mapping[str, Any], keep: int) -> Path:
    """Write the checkpoint of a step into a folder, and delete all but the newest ``keep``.

    Files left behind by an interrupted write are deleted too. What cannot be deleted stays.
    """
    path = write(Path(folder) / f"step-{step:09d}.pt", state)
    for old in (*numbered(folder)[keep:], *Path(folder).glob(".step-*.pt.*")):
        with suppress(OSError):
            old.unlink()
    return path


def newest(folder: str | Path, device: Any = None) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest state of a folder that can be read, and what was wrong with newer ones.

    Returns:
        The state (None if there is none), and a message for each file that was skipped.
    """
    skipped: list[str] = []
    for path in numbered(folder):
        try:
            return read(path, device), skipped
        except CheckpointError as error:
            skipped.append(str(error))
    return None, skipped
