"""Compares evaluations of several runs on the same masks, side by side and with paired tests."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from sisma_jax.errors import InputError
from sisma_jax.evaluation import results
from sisma_jax.evaluation.frechet import FeatureStatistics
from sisma_jax.evaluation.frechet_interval import distance_of_resample, num_frechet_resamples
from sisma_jax.evaluation.intervals import Interval
from sisma_jax.evaluation.mask_agreement import mean_iou, pixel_accuracy
from sisma_jax.evaluation.paired_tests import PairedTest, paired_bootstrap, paired_means, paired_sums
from sisma_jax.evaluation.results import Evaluation
from sisma_jax.files import AnyPath, bucket_errors
from sisma_jax.runs.folder import EvaluationFolder

# Entries of the protocol that make every value incomparable if they differ.
_SAME_IMAGES = ("data", "data_fingerprint", "num_masks", "num_references", "image_size")
_SAME_DIVERSITY = ("diversity_masks", "samples_per_mask")
_WITHOUT_NETWORK = ("held_out_loss", "pixel_diversity", "psnr", "ssim")


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """One evaluation: its folder, its values, and their terms."""

    name: str
    evaluation: Evaluation
    terms: dict[str, np.ndarray]


def compare(paths: Sequence[AnyPath], *, seed: int = 0) -> str:
    """Returns a text table of evaluations: values with intervals, and paired tests against the first one.

    Args:
      paths: at least two folders of runs or of evaluations.
      seed: of the resamples.

    Raises:
      InputError: there are fewer than two, one has no evaluation, or they are of different masks or images.
    """
    if len(paths) < 2:
        raise InputError("`runs` needs at least two folders of runs or of evaluations.")
    first, *others = map(_load, paths)
    for other in others:
        _require_same_images(first, other)
    blocks = [_table([first, *others])]
    for other in others:
        tests = {name: _test(name, first, other, seed) for name in results.flat_scores(first.evaluation)}
        blocks.append(_tests_table(first, other, tests))
    return "\n".join(blocks)


def _load(path: AnyPath) -> _Loaded:
    found = _find(path)
    return _Loaded(str(path), results.read(found.result), results.read_terms(found.terms))


def _find(path: AnyPath) -> EvaluationFolder:
    """Returns the evaluation in a folder: its own, or the newest one of the command `evaluate`."""
    own = EvaluationFolder(path)
    with bucket_errors(path):
        if own.result.exists():
            return own
        numbered = path / "evaluations"
        folders = sorted(numbered.iterdir()) if numbered.exists() else []
        finished = [folder for folder in folders if EvaluationFolder(folder).result.exists()]
    if not finished:
        raise InputError(f"{path} has no evaluation; run the command `evaluate` first.")
    return EvaluationFolder(finished[-1])


def _require_same_images(first: _Loaded, other: _Loaded) -> None:
    ours, theirs = first.evaluation["protocol"], other.evaluation["protocol"]
    different = [f"{key}: {ours[key]} | {theirs[key]}" for key in _SAME_IMAGES if ours[key] != theirs[key]]
    names = "ids" if "ids" in first.terms else "names"
    if not different and not np.array_equal(first.terms[names], other.terms.get(names, np.empty(0))):
        different = [f"{names} of the images"]
    if different:
        raise InputError(
            f"{first.name} and {other.name} were evaluated on different images:\n  "
            + "\n  ".join(different)
            + "\nEvaluate both on the same ones."
        )


def _test(name: str, first: _Loaded, other: _Loaded, seed: int) -> PairedTest | str:
    """Returns the paired test of a metric, or why there is none."""
    if name not in results.flat_scores(other.evaluation):
        return "the second has no such value"
    network = _network(name, first.evaluation)
    checksums = [one.evaluation["networks"].get(network) for one in (first, other)]
    if checksums[0] != checksums[1]:
        return f"not comparable: other weights of {network}"
    resizing = [one.evaluation["protocol"]["resize"].get(network) for one in (first, other)]
    if resizing[0] != resizing[1]:
        return f"not comparable: other resizing for {network}"
    objectives = [one.evaluation["subject"].get("objective") for one in (first, other)]
    if name == "held_out_loss" and objectives[0] != objectives[1]:
        return f"not comparable: of {objectives[0]}; of {objectives[1]}"
    if name.endswith("_diversity"):
        counts = [[one.evaluation["protocol"][key] for key in _SAME_DIVERSITY] for one in (first, other)]
        if counts[0] != counts[1]:
            return "not comparable: other numbers of masks or of samples per mask"
    if name in ("miou", "pixel_accuracy"):
        statistic = mean_iou if name == "miou" else pixel_accuracy
        return paired_sums(first.terms["confusion"], other.terms["confusion"], statistic, seed=seed)
    if name in first.terms:
        return paired_means(first.terms[name], other.terms[name], seed=seed)
    if name == "fid" or name.startswith("fd_"):
        count, dimensions = first.terms[f"features_{network}"].shape
        return paired_bootstrap(
            _distance(first, network),
            _distance(other, network),
            count,
            seed=seed,
            num_resamples=num_frechet_resamples(dimensions),
        )
    return "no paired test"


def _distance(loaded: _Loaded, network: str) -> Callable[[np.ndarray], float]:
    terms = loaded.terms
    real = FeatureStatistics(
        int(terms[f"real_count_{network}"]), terms[f"real_mean_{network}"], terms[f"real_scatter_{network}"]
    )
    return distance_of_resample(terms[f"features_{network}"], real)


def _network(name: str, evaluation: Evaluation) -> str:
    """Returns the name of the network whose weights decide a metric; "" for none."""
    if name in _WITHOUT_NETWORK:
        return ""
    if name == "fid":
        return "inception"
    if name.startswith("fd_"):
        return name.removeprefix("fd_")
    if name.startswith("lpips_"):
        return next(network for network in evaluation["networks"] if network.startswith("lpips_"))
    networks = [one["network"] for one in evaluation["distances"]]
    return next((network for network in networks if name.startswith(f"{network}_")), "parser")


def _table(loaded: Sequence[_Loaded]) -> str:
    scores = [results.flat_scores(one.evaluation) for one in loaded]
    names = list(dict.fromkeys(name for one in scores for name in one))
    width = max(map(len, names), default=0)
    cells = {
        name: [
            f"{one[name]['value']:.4f} [{one[name]['low']:.4f}, {one[name]['high']:.4f}]" if name in one else "-"
            for one in scores
        ]
        for name in names
    }
    titles = [one.name for one in loaded]
    widths = [max(len(title), *(len(row[i]) for row in cells.values())) for i, title in enumerate(titles)]
    lines = ["  ".join([" " * width, *(title.rjust(w) for title, w in zip(titles, widths, strict=True))])]
    lines += [
        "  ".join([name.ljust(width), *(cell.rjust(w) for cell, w in zip(row, widths, strict=True))])
        for name, row in cells.items()
    ]
    return "\n".join(lines) + "\n"


def _tests_table(first: _Loaded, other: _Loaded, tests: dict[str, PairedTest | str]) -> str:
    width = max(map(len, tests), default=0)
    lines = [f"{first.name} minus {other.name}, in pairs: difference, 95 % interval, p-value"]
    for name, test in tests.items():
        if isinstance(test, str):
            lines.append(f"{name:{width}}  {test}")
        else:
            lines.append(f"{name:{width}}  {_signed(test.difference)}  p = {test.p_value:.4f}")
    return "\n".join(lines) + "\n"


def _signed(interval: Interval) -> str:
    return f"{interval.value:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"
