"""The public API: samples faces in Python from a run's folder or an exported file, `load(path)(mask, key=...)`."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Key, UInt8
from PIL import Image

from sisma_jax import config_files
from sisma_jax.call_arguments import Output, Photograph, as_photo, is_pil, random_keys, whole_number
from sisma_jax.config import Config, MeshConfig, Sampling
from sisma_jax.data import regions
from sisma_jax.data.classes import ClassSet, as_classes
from sisma_jax.data.faces import Square
from sisma_jax.data.location_prior import LocationPrior
from sisma_jax.data.masks import Masks, convert_mask, palette_image, read_masks, report_cropping, resize_mask
from sisma_jax.data.photo_files import to_8_bits
from sisma_jax.edits import prepare_edit
from sisma_jax.errors import InputError
from sisma_jax.files import to_path
from sisma_jax.models.autoencoder import IdentityAutoencoder
from sisma_jax.models.face_parser import FaceParser
from sisma_jax.models.factory import Params
from sisma_jax.parallel import sharding
from sisma_jax.runs import named_weights
from sisma_jax.runs.export import EXPORT_SUFFIX, load_exported
from sisma_jax.sampler import Autoencoder, Faces, Sampler
from sisma_jax.segmentation import paint, segment

if TYPE_CHECKING:
    from sisma_jax.runs.folder import Checkpoint, RunFolder

Keys = Key[Array, ""] | Key[Array, " N"]
"""One random key, or one per face."""


class Pipeline:
    """Samples faces for masks with trained parameters, on all devices of a mesh.

    In a job of several processes, every process must make the same calls, and gets all faces.

    Attributes:
      config: configuration of the run.
      sampler: the compiled programs, with the EMA parameters of the denoiser.
      step: training step of the parameters.
      autoencoder: converts between images and latents.
      mesh: of the devices that sample.
      mask_prior: where the classes lie in the training masks, if the run has recorded it.
    """

    def __init__(
        self,
        config: Config,
        params: Params,
        step: int,
        autoencoder: Autoencoder | None = None,
        mesh: Mesh | None = None,
        mask_prior: LocationPrior | None = None,
        parser: FaceParser | Callable[[], FaceParser] | None = None,
    ):
        """Places the parameters on the devices. Most callers use `load`.

        Args:
          config: configuration of the run.
          params: EMA parameters of the denoiser.
          step: training step of the parameters.
          autoencoder: of the run; a denoiser of pixels needs none.
          mesh: of all devices. By default, the parameters are replicated and batches are sharded.
          mask_prior: of the run; without it, masks in another order of classes are not recognized.
          parser: of the run, or a function that reads it on first use; only `segment`, and `edit` without `image_mask`
            and `region`, need it.
        """
        self.config = config
        self.mask_prior = mask_prior
        self._parser = parser
        self.step = step
        self.autoencoder = autoencoder or IdentityAutoencoder()
        self.mesh = sharding.make_mesh(MeshConfig()) if mesh is None else mesh
        self.sampler = Sampler(config, params, self.autoencoder, self.mesh)

    @property
    def params(self) -> Params:
        """EMA parameters of the denoiser, sharded over the mesh; they may be replaced by others of the same shapes."""
        return self.sampler.params

    @params.setter
    def params(self, params: Params) -> None:
        """Replaces the parameters."""
        self.sampler.params = params

    @functools.cached_property
    def parser(self) -> FaceParser | None:
        """The face parser, which predicts masks of photographs; None if the run has none. It is read on first use.

        Raises:
          InputError: the file of the face parser does not exist or is damaged.
        """
        return self._parser() if callable(self._parser) else self._parser

    @overload
    def __call__(
        self, mask: Masks, *, key: Keys, output: Literal["array"] = "array", **options: Any
    ) -> UInt8[np.ndarray, "N S S 3"]: ...
    @overload
    def __call__(self, mask: Masks, *, key: Keys, output: Literal["pil"], **options: Any) -> list[Image.Image]: ...
    def __call__(
        self,
        mask: Masks,
        *,
        key: Keys,
        num_samples: int = 1,
        output: Output = "array",
        classes: ClassSet | str | None = None,
        sampling: Sampling | None = None,
        **overrides: Any,
    ) -> UInt8[np.ndarray, "N S S 3"] | list[Image.Image]:
        """Returns sampled faces as RGB images of the model's resolution S x S.

        The same key, mask and settings give the same faces, independently of the number of faces per call; up to
        rounding on CPUs where batches of different sizes round differently.

        >>> pipe = sisma_jax.load("demo")
        >>> size, classes = pipe.config.data.image_size, pipe.config.data.classes
        >>> mask = np.full((size, size), classes.names.index("skin"), np.uint8)
        >>> faces = pipe(mask, key=jax.random.key(0), num_samples=2, steps=1)
        >>> faces.shape == (2, size, size, 3)
        True
        >>> [image] = pipe(mask, key=jax.random.key(0), output="pil")
        >>> image.mode
        'RGB'

        Args:
          mask: one mask or several: class indices, (H, W) or (B, H, W), one-hot, class colours, a PIL image, a path, or
            a list of these; see `sisma_jax.data.masks`. A mask that is not square is cropped to its central square,
            and then resized to S x S with nearest-neighbour sampling.
          key: one key, or one key for each of the N faces. Face n depends on `fold_in(key, n)` or on key n. With the
            same key, another mask gives a face of a similar style.
          num_samples: faces per mask. The faces of mask i start at row i * num_samples of the result.
          output: "array", or "pil" for a list of PIL images.
          classes: classes in whose order or colours the mask is, if these are not the classes of the model: a built-in
            name, a JSON file, or a class set.
          sampling: settings in place of the configuration's section `sample`. Its `seed` is not used, because `key`
            replaces it.
          overrides: single fields of `Sampling`, such as `steps=4, guidance=2.0`.

        Raises:
          InputError: the mask has unknown class indices or another form, `key` is no key, the number of keys is wrong,
            or a setting is out of range.
          TypeError: `Sampling` has no field of the name of an override.
        """
        settings, is_list = self.settings(sampling, **overrides), is_pil(output)
        faces = self._sampled(self.faces(self.masks(mask, classes), key, num_samples), settings)
        return _pil_images(faces) if is_list else faces

    @overload
    def stream(
        self, mask: Masks, *, key: Keys, output: Literal["array"] = "array", **options: Any
    ) -> Iterator[tuple[int, UInt8[np.ndarray, "N S S 3"]]]: ...
    @overload
    def stream(
        self, mask: Masks, *, key: Keys, output: Literal["pil"], **options: Any
    ) -> Iterator[tuple[int, list[Image.Image]]]: ...
    def stream(
        self,
        mask: Masks,
        *,
        key: Keys,
        num_samples: int = 1,
        every: int = 1,
        output: Output = "array",
        classes: ClassSet | str | None = None,
        sampling: Sampling | None = None,
        **overrides: Any,
    ) -> Iterator[tuple[int, UInt8[np.ndarray, "N S S 3"] | list[Image.Image]]]:
        """Returns an iterator of (step, images): the predictions during sampling, and at last the sampled faces.

        The images of a step are the data that the model predicts at the last function evaluation of this step,
        x + (1 - t) v, decoded. The last item has the number of all steps and images that are bit-identical to those of
        `__call__` with the same arguments: both run the same compiled programs. The computation proceeds while the
        caller iterates.

        Args:
          mask: as for `__call__`.
          key: as for `__call__`.
          num_samples: as for `__call__`.
          every: the predictions of every so many steps.
          output: as for `__call__`.
          classes: as for `__call__`.
          sampling: as for `__call__`.
          overrides: as for `__call__`.

        Raises:
          InputError: as for `__call__`, or `every` is not positive.
          TypeError: `Sampling` has no field of the name of an override.
        """
        settings, every = self.settings(sampling, **overrides), whole_number(every, "every", least=1)
        form = _pil_images if is_pil(output) else lambda images: images
        batches = self._batches(self.faces(self.masks(mask, classes), key, num_samples), settings)
        streams = [self.sampler.steps(faces, settings, size, every) for faces, size in batches]
        return (
            (items[0][0], form(np.concatenate([images for _, images in items]))) for items in zip(*streams, strict=True)
        )

    @overload
    def edit(
        self, image: Photograph, mask: Masks, *, key: Keys, output: Literal["array"] = "array", **options: Any
    ) -> np.ndarray: ...
    @overload
    def edit(
        self, image: Photograph, mask: Masks, *, key: Keys, output: Literal["pil"], **options: Any
    ) -> list[Image.Image]: ...
    def edit(
        self,
        image: Photograph,
        mask: Masks,
        *,
        key: Keys,
        image_mask: Masks | None = None,
        region: regions.Region | None = None,
        square: Square | None = None,
        margin: float | None = None,
        num_samples: int = 1,
        output: Output = "array",
        classes: ClassSet | str | None = None,
        sampling: Sampling | None = None,
        **overrides: Any,
    ) -> np.ndarray | list[Image.Image]:
        """Returns edits of a photograph, (N, H, W, 3), which is generated anew where its mask was edited.

        All other pixels stay bit-identical. The face is sampled at the model's resolution in a square of the
        photograph, and resized to the resolution of the photograph.

        Args:
          image: photograph, uint8 or uint16 (H, W, 3), RGB, of any size; a PIL image; or a path. The edits have its
            dtype.
          mask: edited mask, or a batch of edited masks, as for `__call__`. Each gives an edit of the same photograph.
            It has the aspect ratio of the photograph, or is square, for the central square of the photograph.
          key: as for `__call__`.
          image_mask: mask of the photograph before it was edited. The region to generate is where it differs from
            `mask`. Without `image_mask` and `region`, the face parser predicts it, which is a rough guess.
          region: the region to generate, in place of `image_mask`: where it is not zero. Its form is that of `mask`.
          square: part of the photograph in which the model generates. None: the square that frames the face to which
            the region belongs; if there is no such face, the central square, or the largest one around the region.
          margin: width, in pixels at the model's resolution S, of the band around the region in which the face is
            blended with the photograph. None: S / 32. 0: no pixel outside of the region changes.
          num_samples: edits per mask. The edits of mask i start at row i * num_samples of the result.
          output: as for `__call__`.
          classes: as for `__call__`, of `mask` and `image_mask`.
          sampling: as for `__call__`.
          overrides: as for `__call__`.

        Raises:
          InputError: the photograph is not RGB with 8 or 16 bits, a mask has unknown class indices, `mask` and
            `image_mask` have different sizes, the region is empty or lies outside of `square`, `image_mask` and
            `region` are both given, or neither and there is no face parser, `margin` is negative, the number of keys is
            wrong, a setting is out of range, or PIL images are to have 16 bits.
          TypeError: `Sampling` has no field of the name of an override.
        """
        photo, is_list = as_photo(image, "image"), is_pil(output)
        if is_list and photo.dtype != np.uint8:
            raise InputError("image has 16 bits per sample, and a PIL image 8; take the edits as output='array'.")
        edit = prepare_edit(
            self,
            photo,
            mask,
            key=key,
            image_mask=image_mask,
            region=region,
            square=square,
            margin=margin,
            num_samples=num_samples,
            classes=classes,
        )
        edits = edit.composite(self._sampled(edit.faces, self.settings(sampling, **overrides)))
        return _pil_images(edits) if is_list else edits

    @overload
    def segment(
        self, photo: Photograph, *, whole: bool = False, output: Literal["array"] = "array"
    ) -> UInt8[np.ndarray, "_ _"]: ...
    @overload
    def segment(self, photo: Photograph, *, whole: bool = False, output: Literal["pil"]) -> Image.Image: ...
    def segment(
        self, photo: Photograph, *, whole: bool = False, output: Output = "array"
    ) -> UInt8[np.ndarray, "_ _"] | Image.Image:
        """Returns the mask of a photograph, as the face parser predicts it: class indices.

        Faces are found first. The mask is that of the largest face, in a square that frames it as the training images
        are framed, and fits `__call__`. If no face is found, the square is the central one.

        Args:
          photo: uint8 or uint16 (H, W, 3), RGB, of any size; a PIL image; or a path.
          whole: return the mask (H, W) of the whole photograph with all its faces, which fits `edit`.
          output: "array", or "pil" for a palette image with the colours of the classes.

        Raises:
          InputError: the photograph is not RGB with 8 or 16 bits, or there is no face parser.
        """
        pixels, is_image = to_8_bits(as_photo(photo, "photo")), is_pil(output)
        if self.parser is None:
            raise InputError(
                "there is no face parser; train one with the command `parser`, or load a run or a file that has one."
            )
        faces = segment(pixels, self.parser, "photo")
        mask = paint(faces, *pixels.shape[:2]) if whole else faces[0].mask
        return palette_image(mask, self.config.data.classes) if is_image else mask

    def settings(self, sampling: Sampling | None = None, **overrides: Any) -> Sampling:
        """Returns the given settings, or those of the configuration, with single fields replaced.

        Args:
          sampling: as for `__call__`.
          overrides: as for `__call__`.

        Raises:
          InputError: a setting is out of range, or `seed` is given.
          TypeError: `Sampling` has no field of the name of an override.
        """
        if "seed" in overrides:
            raise InputError("seed cannot be overridden in a call; give key=jax.random.key(seed).")
        settings = dataclasses.replace(self.config.sample if sampling is None else sampling, **overrides)
        self.config.flow.check_sampling(settings)
        return settings

    def masks(self, mask: Masks, classes: ClassSet | str | None = None) -> UInt8[np.ndarray, "B S S"]:
        """Returns masks as `__call__` reads them: class indices of the model, at its resolution.

        Args:
          mask: as for `__call__`.
          classes: as for `__call__`.

        Raises:
          InputError: the mask has unknown class indices or another form.
        """
        classes = as_classes(classes)
        return self._resized(self.require_known_order(self.read_masks(mask, "mask", classes), "mask", classes))

    def faces(
        self,
        masks: UInt8[np.ndarray, "B S S"],
        key: Keys,
        num_samples: int = 1,
        image: UInt8[np.ndarray, "S S 3"] | None = None,
        region: Bool[np.ndarray, "B S S"] | None = None,
    ) -> Faces:
        """Returns the inputs of the sampler, one row per face.

        Args:
          masks: of `masks`.
          key: as for `__call__`.
          num_samples: faces per mask.
          image: photograph to edit, at the model's resolution.
          region: its pixels to generate, for each mask.

        Raises:
          InputError: `key` is no key, the number of keys is wrong, or `num_samples` is not positive.
        """
        num_samples = whole_number(num_samples, "num_samples", least=1)
        keys = random_keys(key, total := len(masks) * num_samples)
        rows = np.arange(total) // num_samples
        return Faces(
            np.asarray(jax.random.key_data(keys)),
            masks[rows],
            None if image is None else np.repeat(image[None], total, axis=0),
            None if region is None else region[rows],
            str(jax.random.key_impl(keys)),
        )

    def _sampled(self, faces: Faces, settings: Sampling) -> UInt8[np.ndarray, "N S S 3"]:
        """Returns the sampled images, in batches of at most `settings.batch_size`."""
        batches = self._batches(faces, settings)
        return np.concatenate(
            [images for one, size in batches for _, images in self.sampler.steps(one, settings, size)]
        )

    def _batches(self, faces: Faces, settings: Sampling) -> list[tuple[Faces, int]]:
        """Returns the faces of each batch and the size of its program, which is the same for all of them."""
        size = self.sampler.batch_size(len(faces), settings.batch_size)
        starts = range(0, len(faces), size)
        return [(faces.take(range(start, min(start + size, len(faces)))), size) for start in starts]

    def _resized(self, masks: Sequence[UInt8[np.ndarray, "_ _"]]) -> UInt8[np.ndarray, "B S S"]:
        report_cropping(masks)
        return np.stack([resize_mask(mask, self.config.data.image_size) for mask in masks])

    def read_masks(self, mask: Masks, name: str, classes: ClassSet | None) -> list[UInt8[np.ndarray, "_ _"]]:
        """Returns masks in their own sizes: class indices of the model, each (H, W).

        Args:
          mask: as for `__call__`.
          name: of the argument, for messages.
          classes: of the masks; None for those of the model.

        Raises:
          InputError: the mask has unknown class indices or another form.
        """
        own = self.config.data.classes
        masks = read_masks(mask, own if classes is None else classes, name)
        if classes is not None and classes != own:
            masks = [convert_mask(one, classes, own, name) for one in masks]
        return masks

    def require_known_order(
        self, masks: Sequence[UInt8[np.ndarray, "_ _"]], name: str, named: ClassSet | None
    ) -> list[UInt8[np.ndarray, "_ _"]]:
        """Returns masks, after a comparison with where the classes lie in the training masks (`LocationPrior.check`).

        Args:
          masks: class indices of the model.
          name: of the argument, for the message.
          named: the classes from which they were converted, if the caller named them.

        Raises:
          InputError: the classes of a mask lie where those of another class set would.
        """
        if self.mask_prior is None:
            return list(masks)
        labels = [name] if len(masks) == 1 else [f"{name}[{i}]" for i in range(len(masks))]
        own = self.config.data.classes
        return [self.mask_prior.check(one, own, label, named=named) for one, label in zip(masks, labels, strict=True)]


def _pil_images(images: UInt8[np.ndarray, "N H W 3"]) -> list[Image.Image]:
    return [Image.fromarray(image) for image in images]


def load(path: str | os.PathLike[str], *, checkpoint: "Checkpoint" = "newest", mesh: Mesh | None = None) -> Pipeline:
    """Returns the pipeline for a run's folder, or for a file that the command `export` wrote.

    Args:
      path: folder or file, on the disk or in a bucket (gs://...); "demo", the weights in the package, for
        drawn faces of 64 px; or `hf://OWNER/NAME[/FILE][@REVISION]`, an exported file on the Hugging Face Hub.
      checkpoint: for a folder, the checkpoint whose EMA parameters are used: "newest", "best" (by the metric
        `train.best`), or the step of a checkpoint. The first two skip damaged checkpoints.
      mesh: of all devices. By default, the parameters are replicated and batches are sharded.

    Raises:
      InputError: the folder contains no run; its checkpoint or its autoencoder does not exist or is damaged; or the
        file does not exist, is damaged, or was written by another program.
    """
    path = to_path(named_weights.find(path))
    if path.suffix == EXPORT_SUFFIX:
        return from_exported(path, mesh=mesh)
    from sisma_jax.runs.folder import RunFolder  # exported files do not need it

    return from_run(RunFolder.open(path), checkpoint=checkpoint, mesh=mesh)


def from_exported(path: str | os.PathLike[str], config: Config | None = None, *, mesh: Mesh | None = None) -> Pipeline:
    """Returns the pipeline for a file that the command `export` wrote.

    Args:
      path: file, on the disk or in a bucket.
      config: configuration in place of that of the file, from which it may differ only in values that may change when
        a run resumes.
      mesh: as for `load`.

    Raises:
      InputError: the file does not exist, is damaged, or was written by another program; or `config` differs.
    """
    exported = load_exported(path)
    if config is not None and (different := config_files.differences(exported.config, config)):
        raise InputError(
            f"{os.fspath(path)} contains a model with another configuration:\n  "
            + "\n  ".join(different)
            + "\nLeave out the options that differ."
        )
    return Pipeline(
        exported.config if config is None else config,
        exported.params,
        exported.step,
        exported.autoencoder,
        mesh,
        exported.mask_prior,
        exported.parser,
    )


def from_run(run: "RunFolder", *, checkpoint: "Checkpoint" = "newest", mesh: Mesh | None = None) -> Pipeline:
    """Returns the pipeline for an opened run.

    Args:
      run: the run.
      checkpoint: as for `load`.
      mesh: as for `load`.

    Raises:
      InputError: the checkpoint or the autoencoder does not exist or is damaged.
    """
    mesh = sharding.make_mesh(MeshConfig()) if mesh is None else mesh
    step, params = run.restore_ema(mesh, checkpoint)
    parser = (lambda: run.parser) if run.has_parser() else None  # sampling does not need its file
    return Pipeline(run.config, params, step, run.autoencoder, mesh, run.mask_prior, parser)
