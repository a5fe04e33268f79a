"""Feature extractors of the user's own, by which further Fréchet distances are computed."""

import hashlib
import importlib
import inspect
import re
from collections.abc import Callable

import numpy as np

from sisma_jax.errors import InputError
from sisma_jax.evaluation.features import FeatureNetwork

_NAME = re.compile(r"(?P<module>[\w.]+):(?P<function>\w+)")


def load_extractor(name: str) -> FeatureNetwork:
    """Returns the feature network of a user's function.

    Args:
      name: "PACKAGE.MODULE:FUNCTION", which Python can import. The function maps uint8 images (B, H, W, 3), RGB, to
        real features (B, D), and gives the distance its name: fd_FUNCTION.

    Raises:
      InputError: the name has another form, or there is no such module or function.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise InputError(f"evaluate.extractors: {name!r} is not of the form PACKAGE.MODULE:FUNCTION.")
    try:
        module = importlib.import_module(found["module"])
    except ImportError as error:
        raise InputError(
            f"evaluate.extractors: {found['module']} cannot be imported ({error}); add its folder to PYTHONPATH."
        ) from error
    function = getattr(module, found["function"], None)
    if not callable(function):
        raise InputError(f"evaluate.extractors: {found['module']} has no function {found['function']}.")
    return FeatureNetwork(found["function"], _checked(function, name), _checksum(module.__file__, function), "own")


def _checked(function: Callable[[np.ndarray], object], name: str) -> Callable[[np.ndarray], np.ndarray]:
    def features(images: np.ndarray) -> np.ndarray:
        result = np.asarray(function(images), np.float32)
        if result.ndim != 2 or len(result) != len(images):
            raise InputError(
                f"evaluate.extractors: {name} returned shape {result.shape} for {len(images)} images; it must return "
                f"({len(images)}, D)."
            )
        return result

    return features


def _checksum(file: str | None, function: Callable[[np.ndarray], object]) -> str:
    """Returns a hash of the code: that of the module's file, or else that of the function's source."""
    if file is not None:
        with open(file, "rb") as content:
            return hashlib.sha256(content.read()).hexdigest()[:16]
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]
