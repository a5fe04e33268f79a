"""How an evaluation is carried out: the protocols of publications as presets, and the configuration's own values."""

import dataclasses
from typing import Literal

from sisma_jax.config import Config
from sisma_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The numbers and settings on which the values of an evaluation depend.

    Attributes:
      name: of the preset; "" for the configuration's own values.
      num_masks: held-out masks, the first of the test split, for which a face is sampled.
      diversity_masks: masks, the first of these, for which several faces are sampled.
      samples_per_mask: faces of each of these.
      inception_resize: package whose resizing the FID uses.
      lpips_network: network of LPIPS.
      image_size: side of the images in pixels; None: that of the model.
    """

    name: str
    num_masks: int
    diversity_masks: int
    samples_per_mask: int
    inception_resize: Literal["pytorch-fid", "torch-fidelity", "clean-fid"]
    lpips_network: Literal["alex", "vgg"]
    image_size: int | None = None


# SDM (arXiv 2207.00050) samples one face for each of the 2,000 test masks of CelebAMask-HQ at 256 px, computes the FID
# between them and the 2,000 test images by pytorch-fid, and the diversity as the mean LPIPS (AlexNet) of the pairs
# among 10 faces per mask. SCDM (arXiv 2402.16506) takes the same masks, images and metrics, and the mIoU by a face
# parser of its own, which is not the one of this project.
_PRESETS = {
    name: Protocol(name, 2000, 2000, 10, inception_resize="pytorch-fid", lpips_network="alex", image_size=256)
    for name in ("sdm", "scdm")
}


def protocol(config: Config, num_test: int) -> Protocol:
    """Returns the protocol that a configuration names.

    Args:
      config: of the run.
      num_test: size of the test split.

    Raises:
      InputError: the preset needs more test images, or another resolution.
    """
    settings = config.evaluate
    if settings.protocol:
        preset = _PRESETS[settings.protocol]
        if num_test < preset.num_masks:
            raise InputError(
                f"evaluate.protocol {preset.name} needs {preset.num_masks} test masks, and the test split has "
                f"{num_test}; prepare the complete data set with data.num_test={preset.num_masks}."
            )
        if config.data.image_size != preset.image_size:
            raise InputError(
                f"evaluate.protocol {preset.name} measures images of {preset.image_size} px, and this model has "
                f"{config.data.image_size}; leave the protocol out, and compare only with the same resolution."
            )
        return preset
    num_masks = min(settings.num_samples, num_test)
    diversity_masks = min(settings.diversity_masks, num_masks)
    return Protocol(
        "",
        num_masks,
        diversity_masks,
        settings.samples_per_mask if diversity_masks else 1,
        settings.inception_resize,
        settings.lpips_network,
    )
