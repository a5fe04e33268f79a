"""A bucket in memory, for code that reaches buckets through epath and fsspec."""

import pytest
from etils import epath
from etils.epath import backend, gpath
from fsspec.implementations.memory import MemoryFileSystem

from sisma_jax import files


class _MemoryBucket(MemoryFileSystem):
    """Has whole objects only, as buckets have."""

    protocol = ("gs", "gcs")

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + str(path).removeprefix("gs://").strip("/")

    def _open(self, path, mode="rb", **kwargs):
        if mode not in ("rb", "wb"):
            raise NotImplementedError(f"mode {mode} of an object in a bucket")
        return super()._open(path, mode, **kwargs)


def make_bucket(monkeypatch: pytest.MonkeyPatch) -> epath.Path:
    """Returns an empty bucket that lasts for one test."""
    monkeypatch.setattr(files, "_reaches_buckets", lambda: True)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    system = _MemoryBucket(global_store=False, skip_instance_cache=True)
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: system)
    return files.to_path("gs://bucket")
