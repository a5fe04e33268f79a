"""What each metric of an evaluation means, in one sentence, and which values of it are good.

The report and the model card use the same words.
"""

import dataclasses
from typing import Literal

Better = Literal["higher", "lower", "near 1", ""]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a metric means.

    Attributes:
      label: name of the metric for readers.
      meaning: one sentence.
      better: which values are good; "" if the metric has no good direction.
      network: name of the network in whose features it is measured, for readers; "" if that is not part of its name.
    """

    label: str
    meaning: str
    better: Better
    network: str = ""

    @property
    def full_label(self) -> str:
        """The label with the network."""
        return f"{self.label} ({self.network})" if self.network else self.label


_NETWORKS = {"parser": "face parser", "inception": "Inception-v3", "vgg16": "VGG16", "lpips": "LPIPS"}

_EXPLANATIONS = {
    "held_out_loss": Explanation("Held-out loss", "Training objective on images that were not trained on.", "lower"),
    "miou": Explanation(
        "mIoU",
        "Overlap of a mask with the mask that the face parser predicts from its sample, as the mean over the classes.",
        "higher",
    ),
    "pixel_accuracy": Explanation(
        "Pixel accuracy",
        "Fraction of the pixels at which the face parser predicts the class of the mask from the sample.",
        "higher",
    ),
    "memorization_ratio": Explanation(
        "Memorization ratio",
        "Distance of samples to their nearest training images, divided by that of held-out originals; a value well "
        "below 1 means that the model repeats training images.",
        "near 1",
    ),
    "psnr": Explanation(
        "Reconstruction PSNR (dB)",
        "Peak signal-to-noise ratio of images that the autoencoder encodes and decodes; it limits every sample.",
        "higher",
    ),
    "ssim": Explanation(
        "Reconstruction SSIM",
        "Structural similarity of images with their reconstructions by the autoencoder; it limits every sample.",
        "higher",
    ),
}

# The metrics of one network, by the end of their name.
_OF_NETWORK = {
    "precision": Explanation(
        "Precision", "Fraction of samples that lie among the real images: how realistic samples are.", "higher"
    ),
    "recall": Explanation(
        "Recall",
        "Fraction of real images that lie among the samples: how much of their variety is there.",
        "higher",
    ),
    "density": Explanation(
        "Density",
        "How densely real images lie around a sample, as the mean over samples; it may exceed 1.",
        "higher",
    ),
    "coverage": Explanation("Coverage", "Fraction of real images that have a sample in their neighbourhood.", "higher"),
    "kernel_distance": Explanation(
        "Kernel distance",
        "Squared maximum mean discrepancy between samples and real images.",
        "lower",
    ),
    "diversity": Explanation(
        "Diversity",
        "Distance between samples of the same mask; near 0, all samples of a mask are the same face.",
        "higher",
    ),
    "distance": Explanation(
        "Distance to the original",
        "Distance of a sample to the photograph of its mask; a different face with the same mask is valid too.",
        "lower",
    ),
}
_FID = Explanation("FID", "Fréchet distance between samples and real images in the features of Inception-v3.", "lower")
_OTHER_FRECHET = Explanation(
    "Fréchet distance",
    "Fréchet distance between samples and real images in {}; it is not the FID.",
    "lower",
)


def network_label(network: str) -> str:
    """Returns the name of a network for readers, such as "Inception-v3".

    Args:
      network: its name in the result file, such as "inception".
    """
    return _NETWORKS.get(network, network)


def features_of(network: str) -> str:
    """Returns the features of a network in the words of a sentence, such as "the features of the face parser".

    Args:
      network: as `network_label`.
    """
    return f"the features of {'the ' if network == 'parser' else ''}{network_label(network)}"


def explain(name: str) -> Explanation | None:
    """Returns what a metric means; None if it is unknown.

    Args:
      name: as in `results.flat_scores`, or "held_out_loss", "memorization_ratio" or "NETWORK_kernel_distance".
    """
    if name in _EXPLANATIONS:
        return _EXPLANATIONS[name]
    if name == "fid":
        return _FID
    if name.startswith("fd_"):
        network = name.removeprefix("fd_")
        meaning = _OTHER_FRECHET.meaning.format(features_of(network))
        return dataclasses.replace(_OTHER_FRECHET, meaning=meaning, network=network_label(network))
    for end, explanation in _OF_NETWORK.items():
        if name.endswith(f"_{end}"):
            return dataclasses.replace(explanation, network=network_label(name.removesuffix(f"_{end}")))
    return None
