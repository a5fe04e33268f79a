"""Writes feature_metrics.npz: FID, KID, precision, recall, density and coverage of other people's code.

The peers are Python packages, called as they are, which the tests do without. To make the file again:

    python3.11 -m venv .venv-golden
    .venv-golden/bin/pip install torch==2.13.0 torch-fidelity==0.4.0 prdc==0.2 scipy==1.17.1
    .venv-golden/bin/python tests/evaluation/golden/make_feature_metrics.py

For each `case`: the features `real` and `generated`, float32; `frechet` of torch-fidelity, computed with the matrix
square root of a general matrix; `kernel` (mean, std) of torch-fidelity with the images of each subset in
`subsets` (num_subsets, 2, subset_size), and `kernel_all` with all images; `prdc` (precision, recall, density, coverage)
with `k` neighbours. The case `few` has fewer images than dimensions.
"""

import importlib.metadata
from pathlib import Path

import numpy as np
import prdc
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

CASES = {"many": (220, 180, 12), "few": (40, 40, 64)}
NUM_SUBSETS, SUBSET_SIZE, SEED, K = 5, 30, 2020, 5


def kernel(real, generated, **options):
    result = kid_features_to_metric(
        torch.tensor(generated), torch.tensor(real), verbose=False, kid_degree=3, kid_gamma=None, kid_coef0=1, **options
    )
    return np.array([result["kernel_inception_distance_mean"], result["kernel_inception_distance_std"]])


def main():
    rng = np.random.default_rng(0)
    names = ("torch-fidelity", "prdc", "scipy", "torch")
    arrays = {"source": np.array(", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)), "k": K}
    for case, (num_real, num_generated, dimensions) in CASES.items():
        scales = rng.uniform(0.3, 2.0, dimensions)
        real = (rng.normal(size=(num_real, dimensions)) * scales).astype(np.float32)
        generated = (rng.normal(size=(num_generated, dimensions)) * scales[::-1] + 0.3).astype(np.float32)
        statistics = [fid_features_to_statistics(torch.tensor(features)) for features in (generated, real)]
        frechet = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
        # As torch-fidelity draws them: the images of the first set and of the second, in turn.
        state = np.random.RandomState(SEED)
        subsets = np.array(
            [
                [state.choice(len(features), SUBSET_SIZE, replace=False) for features in (generated, real)]
                for _ in range(NUM_SUBSETS)
            ]
        )
        options = {"kid_subsets": NUM_SUBSETS, "kid_subset_size": SUBSET_SIZE, "rng_seed": SEED}
        least = min(num_real, num_generated)
        results = {
            "real": real,
            "generated": generated,
            "frechet": np.float64(frechet),
            "kernel": kernel(real, generated, **options),
            "subsets": subsets.astype(np.int16),
            # All images of both sets, of which a subset has equally many.
            "kernel_all": kernel(real[:least], generated[:least], kid_subsets=1, kid_subset_size=least)[0],
            "prdc": np.array(list(prdc.compute_prdc(real, generated, nearest_k=K).values())),
        }
        arrays |= {f"{case}/{name}": value for name, value in results.items()}
    np.savez_compressed(Path(__file__).with_name("feature_metrics.npz"), **arrays)


if __name__ == "__main__":
    main()
