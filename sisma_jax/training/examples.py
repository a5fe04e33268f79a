"""What the denoiser is trained on: images, or their cached latents."""

import dataclasses
from collections.abc import Iterator

import grain
import numpy as np

from sisma_jax.config import Config, DataConfig
from sisma_jax.data import latents, loading
from sisma_jax.files import AnyPath
from sisma_jax.models import kl_weights
from sisma_jax.runs.folder import autoencoder_folder


@dataclasses.dataclass(frozen=True)
class Examples:
    """Batches of images (`key` is "image") or, of the autoencoder with a fingerprint, of latents ("moments")."""

    config: DataConfig
    fingerprint: str | None = None

    @property
    def key(self) -> str:
        return "image" if self.fingerprint is None else "moments"

    def train_iterator(self, batch_size: int, seed: int, share: loading.Share) -> grain.DatasetIterator:
        """Returns a share of the endless training batches."""
        if self.fingerprint is None:
            return loading.train_iterator(self.config, batch_size=batch_size, seed=seed, share=share)
        return latents.train_iterator(self.config, self.fingerprint, batch_size=batch_size, seed=seed, share=share)

    def eval_batches(self, split: str, batch_size: int, limit: int) -> Iterator[dict[str, np.ndarray]]:
        """Returns one pass over the first examples of a split."""
        if self.fingerprint is None:
            return loading.eval_batches(self.config, split, batch_size=batch_size, limit=limit)
        return latents.eval_batches(self.config, self.fingerprint, split, batch_size=batch_size, limit=limit)


def examples_of(config: Config, workdir: AnyPath) -> Examples:
    """Returns the examples of a run.

    Raises:
      InputError: the run has no autoencoder yet, though its configuration wants one.
    """
    if config.autoencoder.kind == "identity":
        return Examples(config.data)
    return Examples(config.data, kl_weights.fingerprint(kl_weights.load(autoencoder_folder(workdir))))
