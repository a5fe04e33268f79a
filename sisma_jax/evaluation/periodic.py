"""Cheap metrics during training: agreement and Fréchet distance by the face parser, on a few hundred held-out masks."""

import functools

import jax
import numpy as np

from sisma_jax.data.dataset import DataSet
from sisma_jax.evaluation import mask_agreement
from sisma_jax.evaluation.features import extract, parser_network
from sisma_jax.evaluation.frechet import FeatureStatistics, frechet_distance
from sisma_jax.evaluation.image_sets import ArrayImages, SplitImages
from sisma_jax.evaluation.set_distances import LEAST_IMAGES
from sisma_jax.models.factory import Params
from sisma_jax.parallel import sharding
from sisma_jax.pipeline import Pipeline
from sisma_jax.runs.folder import RunFolder

# More masks hardly change the ranking of checkpoints.
_MOST_MASKS = 256


class PeriodicEvaluation:
    """Measures the EMA parameters of a training step; what does not depend on them is computed once.

    Args:
      run: the run, which has a face parser.
      dataset: its data set, whose test split is used.
    """

    def __init__(self, run: RunFolder, dataset: DataSet):
        config = run.config
        self._run, self._dataset = run, dataset
        self._every = config.evaluate.every_steps
        self._last = config.train.num_steps
        self._count = min(_MOST_MASKS, config.evaluate.num_samples, dataset.counts["test"])

    @functools.cached_property
    def _masks(self) -> np.ndarray:
        return np.stack(list(SplitImages(self._dataset, "test", self._count).masks(0, self._count)))

    @functools.cached_property
    def _references(self) -> FeatureStatistics:
        originals = SplitImages(self._dataset, "test", self._count)
        return FeatureStatistics.from_batches([extract(parser_network(self._run.parser), originals)])

    @functools.cached_property
    def _pipeline(self) -> Pipeline:
        mesh = sharding.make_mesh(self._run.config.mesh)
        return Pipeline(self._run.config, {}, 0, self._run.autoencoder, mesh)

    def __call__(self, step: int, params: Params) -> dict[str, float]:
        """Returns "miou" and "fd_parser" of the step, or nothing if it is not the turn of the step.

        Every process of a job must call this.

        Args:
          step: training step.
          params: its EMA parameters, as training shards them.
        """
        if step % self._every and step != self._last:
            return {}
        parser, trained = self._run.parser, self._pipeline
        trained.params, trained.step = params, step
        # The keys of the first repetition of `sample_faces`.
        key = jax.random.fold_in(jax.random.key(self._run.config.sample.seed), 0)
        faces = trained(self._masks, key=key)
        confusion = mask_agreement.confusion_matrices(parser.predict(faces), self._masks, parser.classes)
        metrics = {"miou": float(mask_agreement.mean_iou(confusion.sum(axis=0)))}
        if parser.is_own and self._count > LEAST_IMAGES:
            features = extract(parser_network(parser), ArrayImages(faces, "samples"))
            metrics["fd_parser"] = frechet_distance(FeatureStatistics.from_batches([features]), self._references)
        return metrics
