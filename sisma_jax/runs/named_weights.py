"""Exported files that are named and not given by a path: the demo's weights, and files on the Hugging Face Hub."""

import dataclasses
import functools
import hashlib
import importlib.resources
import os
import re
from pathlib import Path
from typing import Any

from sisma_jax.errors import InputError

DEMO = "demo"
"""Name of the weights in the package."""

_HUB = "hf://"
_SUFFIX = ".safetensors"
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_ADDRESS = re.compile(rf"hf://({_NAME}/{_NAME})((?:/[A-Za-z0-9_-][A-Za-z0-9._-]*)*)(?:@([A-Za-z0-9][A-Za-z0-9._/-]*))?")
_CHUNK_BYTES = 1 << 22


def is_named(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is a name of weights: demo, or hf://OWNER/NAME[/FILE][@REVISION]."""
    return isinstance(path, str) and (path == DEMO or path.startswith(_HUB))


def find(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Returns the file of named weights, which is downloaded if necessary; any other path is returned unchanged.

    Args:
      path: a path, or a name of weights.

    Raises:
      InputError: the package has no weights, the name is malformed, huggingface_hub is not installed, or the file
        cannot be downloaded or is damaged.
    """
    if not is_named(path):
        return path
    return _demo() if path == DEMO else _from_hub(str(path))


def _demo() -> Path:
    file = importlib.resources.files("sisma_jax") / "weights" / f"{DEMO}{_SUFFIX}"
    if not isinstance(file, Path) or not file.is_file():
        raise InputError(
            f"the package has no demo weights: there is no file {file}. Name an exported file, or train the model of "
            "configs/demo.py."
        )
    return file


@dataclasses.dataclass(frozen=True)
class _Address:
    repo: str
    file: str
    revision: str | None

    @classmethod
    def parse(cls, text: str) -> "_Address":
        match = _ADDRESS.fullmatch(text)
        file = "" if match is None else match[2].removeprefix("/")
        if match is None or (file and not file.endswith(_SUFFIX)):
            raise InputError(
                f"{text} is no address of weights; write it as hf://OWNER/NAME[/FILE{_SUFFIX}][@REVISION]."
            )
        return cls(match[1], file, match[3])


@functools.cache
def _from_hub(text: str) -> Path:
    address = _Address.parse(text)
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise InputError(f"{text} needs the package huggingface_hub; install with: pip install '.[hub]'") from error
    try:
        info = huggingface_hub.HfApi().model_info(address.repo, revision=address.revision, files_metadata=True)
        entry = _entry(info.siblings or [], address, text)
        file = Path(huggingface_hub.hf_hub_download(address.repo, entry.rfilename, revision=info.sha))
    except InputError:
        raise
    except Exception as error:  # whatever the Hub, its library or the network raise
        raise InputError(f"{text} cannot be downloaded ({type(error).__name__}: {error}).") from error
    _require_checksum(file, entry, text)
    return file


def _entry(siblings: list[Any], address: _Address, text: str) -> Any:
    """Returns the Hub's entry of the file, or of the only exported file."""
    found = [one for one in siblings if one.rfilename.endswith(_SUFFIX) and address.file in ("", one.rfilename)]
    if len(found) != 1:
        names = ", ".join(one.rfilename for one in siblings if one.rfilename.endswith(_SUFFIX)) or "none"
        raise InputError(f"{text} must name one {_SUFFIX} file of the repository; it has {names}.")
    return found[0]


def _require_checksum(file: Path, entry: Any, text: str) -> None:
    """Checks a file against the SHA-256 of Git LFS, or, for a small file, against the SHA-1 of Git."""
    lfs = entry.lfs
    if lfs is not None:
        digest, wanted = hashlib.sha256(), lfs["sha256"] if isinstance(lfs, dict) else lfs.sha256
    else:
        digest, wanted = hashlib.sha1(f"blob {file.stat().st_size}\0".encode(), usedforsecurity=False), entry.blob_id
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != wanted:
        raise InputError(f"{text}: the downloaded file {file} is damaged (checksum); delete it and try again.")
