"""Between images and the latents that the denoiser works on."""

import dataclasses

from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class IdentityAutoencoder:
    """Pixels as latents: the denoiser works on the image itself.

    Attributes:
      channels: of a latent.
      downsampling: image pixels along the side of a latent position.
    """

    channels: int = 3
    downsampling: int = 1

    def encode(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
        """Returns the latent of images in [-1, 1]."""
        return image

    def decode(self, latent: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
        """Returns the images, nominally in [-1, 1]."""
        return latent
