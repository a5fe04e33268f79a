"""The compiled sampler of a pipeline: a batch of faces starts, advances by evaluations, and is decoded."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, UInt8, UInt32

from sisma_jax.config import Config, FlowConfig, Sampling
from sisma_jax.diffusion import editing, solvers, stepping
from sisma_jax.diffusion.stepping import MAX_EVALUATIONS, Carry, Given, Guidance
from sisma_jax.models.autoencoder import IdentityAutoencoder, KlAutoencoder, to_uint8
from sisma_jax.models.denoiser import Denoiser
from sisma_jax.models.factory import Params, make_graph
from sisma_jax.parallel import compiler, sharding

Autoencoder = IdentityAutoencoder | KlAutoencoder


@dataclasses.dataclass(frozen=True)
class Faces:
    """The inputs of faces to sample, one row per face.

    Attributes:
      key_data: words of the random keys.
      masks: class indices at the model's resolution.
      image: photographs to edit at the model's resolution; None to sample without one.
      region: pixels of the photographs to generate; None without a photograph.
      key_impl: implementation of the random keys.
    """

    key_data: UInt32[np.ndarray, "B words"]
    masks: UInt8[np.ndarray, "B S S"]
    image: UInt8[np.ndarray, "B S S 3"] | None = None
    region: Bool[np.ndarray, "B S S"] | None = None
    key_impl: str = "threefry2x32"

    def __len__(self) -> int:
        return len(self.masks)

    def take(self, rows: Sequence[int] | np.ndarray) -> "Faces":
        """Returns the faces of some rows, in their order."""
        index = np.asarray(rows)
        image, region = (None if x is None else x[index] for x in (self.image, self.region))
        return dataclasses.replace(
            self, key_data=self.key_data[index], masks=self.masks[index], image=image, region=region
        )

    @classmethod
    def joined(cls, parts: Sequence["Faces"]) -> "Faces":
        """Returns the faces of several parts; all or none of them have a photograph."""

        def join(arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
            present = [x for x in arrays if x is not None]
            return np.concatenate(present) if present else None

        key_data, masks, image, region = (
            join([getattr(part, name) for part in parts]) for name in ("key_data", "masks", "image", "region")
        )
        assert key_data is not None
        assert masks is not None
        return cls(key_data, masks, image, region, parts[0].key_impl)


@dataclasses.dataclass(frozen=True)
class State:
    """The state of a batch after a step: the data that the model predicts, or the sampled data after the last step."""

    sampler: "Sampler"
    latents: Array
    count: int

    def wait(self) -> None:
        """Returns when the step is computed; until then the device works in the background."""
        jax.block_until_ready(self.latents)

    def images(self) -> UInt8[np.ndarray, "B S S 3"]:
        """Returns the decoded images."""
        return self.sampler.decode(self.latents)[: self.count]


class Sampler:
    """Samples batches of faces on all devices of a mesh.

    A face has the same bits in batches of all sizes, on one device, if the network computes its rows independently of
    each other: the solver's time is the same for all rows, and everything but the network runs per image. Where it does
    not, faces in batches of different sizes may differ by rounding.

    Attributes:
      mesh: of the devices that sample.
    """

    def __init__(self, config: Config, params: Params, autoencoder: Autoencoder, mesh: Mesh):
        """Places the parameters on the devices.

        Args:
          config: configuration of the run.
          params: EMA parameters of the denoiser.
          autoencoder: of the run.
          mesh: of all devices. The parameters are sharded over it.
        """
        self.mesh = mesh
        self.params = sharding.distribute(params, sharding.of_state(params, mesh))
        graph, autoencoder_params = nnx.split(autoencoder)
        replicated = jax.tree.map(lambda _: sharding.replicated(mesh), autoencoder_params)
        self._autoencoder_params = sharding.distribute(autoencoder_params, replicated)
        self._flow = config.flow
        denoiser = make_graph(config)
        compiler_options = compiler.options(mesh)
        self._start = jax.jit(functools.partial(_start, denoiser, graph), static_argnames="key_impl")
        self._read = jax.jit(functools.partial(_read, denoiser), compiler_options=compiler_options)
        self._advance = jax.jit(
            functools.partial(_advance, denoiser, config.flow),
            donate_argnames="carry",
            compiler_options=compiler_options,
        )
        self._decode = jax.jit(functools.partial(_decode, graph), out_shardings=sharding.replicated(mesh))
        self._join = jax.jit(lambda *rows: jax.tree.map(lambda *x: jnp.concatenate(x), *rows))

    def batch_size(self, count: int, limit: int) -> int:
        """Returns the batch size in which faces are sampled: a power of two, so that few programs are compiled.

        Args:
          count: number of faces, at least 1.
          limit: largest batch size, unless the mesh needs a larger one.
        """
        return sharding.round_up(min(1 << (count - 1).bit_length(), limit), self.mesh)

    def num_programs(self) -> int:
        """Returns the number of compiled programs for the network, one per batch size, with guidance and without."""
        assert isinstance(self._advance, jax.stages.Wrapped)
        return self._advance._cache_size()  # pyright: ignore

    def steps(
        self, faces: Faces, settings: Sampling, batch_size: int, every: int = 0
    ) -> Iterator[tuple[int, UInt8[np.ndarray, "B S S 3"]]]:
        """Yields (step, images) for a batch: the predicted images of some steps, and at last the sampled images.

        The computation proceeds only while the caller iterates.

        Args:
          faces: at most `batch_size`.
          settings: how to sample.
          batch_size: rows of the program.
          every: yield the predictions of every so many steps; 0 yields the sampled images alone.
        """
        shown = [step for step in range(1, settings.steps) if every and step % every == 0]
        for step, state in self.trajectory(faces, settings, batch_size, [*shown, settings.steps]):
            yield step, state.images()

    def trajectory(
        self, faces: Faces, settings: Sampling, batch_size: int, stops: Sequence[int]
    ) -> Iterator[tuple[int, "State"]]:
        """Yields (step, state) for a batch after some steps. A state is valid until the next one is requested.

        Args:
          faces: at most `batch_size`; missing rows are copies of the last one.
          settings: how to sample.
          batch_size: rows of the program.
          stops: steps in increasing order; the last one is `settings.steps`.
        """
        given, carry = self._begin(faces, batch_size)
        with jax.set_mesh(self.mesh):
            given = self._read(self.params, given)
        is_edit = self._flow.objective == "mean_flow" and faces.image is not None
        num_steps = max(settings.steps, editing.LEAST_STEPS if is_edit else 1)
        ends = solvers.step_ends(num_steps, settings.solver)[num_steps - settings.steps :]
        table = solvers.evaluations(num_steps, settings.shift, settings.solver)
        guidance, done = Guidance.of(settings, self._flow), 0
        for step in stops:
            carry = self._run(given, carry, table, guidance, done, ends[step - 1])
            done = ends[step - 1]
            yield step, State(self, carry.data if step < settings.steps else carry.point, len(faces))

    def _begin(self, faces: Faces, batch_size: int) -> tuple[Given, Carry]:
        if self.mesh.size == 1:
            rows = [self._begin_rows(faces.take([i]), 1) for i in range(len(faces))]
            rows += rows[-1:] * (batch_size - len(rows))
            return self._join(*rows) if batch_size > 1 else rows[0]
        return self._begin_rows(faces.take(np.minimum(np.arange(batch_size), len(faces) - 1)), batch_size)

    def _begin_rows(self, faces: Faces, batch_size: int) -> tuple[Given, Carry]:
        inputs = {"mask": faces.masks, "image": faces.image, "region": faces.region}
        batch = sharding.to_devices({name: x for name, x in inputs.items() if x is not None}, self.mesh, batch_size)
        with jax.set_mesh(self.mesh):
            return self._start(
                self.params,
                self._autoencoder_params,
                faces.key_data,
                batch,
                key_impl=faces.key_impl,
            )

    def _run(
        self, given: Given, carry: Carry, table: np.ndarray, guidance: Guidance | None, first: int, stop: int
    ) -> Carry:
        for start in range(0, stop, MAX_EVALUATIONS):
            part = table[:, start : start + MAX_EVALUATIONS]
            ends = max(first - start, 0), min(stop - start, part.shape[1])
            if ends[0] >= ends[1]:
                continue
            part = np.pad(part, ((0, 0), (0, MAX_EVALUATIONS - part.shape[1])))
            with jax.set_mesh(self.mesh):
                carry = self._advance(self.params, given, carry, part, guidance, *map(np.int32, ends))
        return carry

    def decode(self, latents: Array) -> UInt8[np.ndarray, "B S S 3"]:
        """Returns the images of latents.

        Args:
          latents: of the state of a batch.
        """
        with jax.set_mesh(self.mesh):
            if self.mesh.size > 1:
                return np.asarray(self._decode(self._autoencoder_params, latents))
            rows = np.asarray(latents)
            return np.concatenate(
                [np.asarray(self._decode(self._autoencoder_params, rows[i : i + 1])) for i in range(len(rows))]
            )


def _start(
    graph: nnx.GraphDef[Denoiser],
    autoencoder_graph: nnx.GraphDef[Autoencoder],
    params: Params,
    autoencoder_params: nnx.State[Any, Any],
    key_data: UInt32[Array, "B words"],
    batch: dict[str, Array],
    *,
    key_impl: str,
) -> tuple[Given, Carry]:
    return stepping.start(
        nnx.merge(graph, params),
        jax.random.wrap_key_data(key_data, impl=key_impl),
        {"mask": batch["mask"]},
        autoencoder=nnx.merge(autoencoder_graph, autoencoder_params),
        image=batch.get("image"),
        region=batch.get("region"),
    )


def _read(graph: nnx.GraphDef[Denoiser], params: Params, given: Given) -> Given:
    return stepping.read(nnx.merge(graph, params), given)


def _advance(
    graph: nnx.GraphDef[Denoiser],
    flow: FlowConfig,
    params: Params,
    given: Given,
    carry: Carry,
    table: Array,
    guidance: Guidance | None,
    first: Array,
    stop: Array,
) -> Carry:
    return stepping.advance(nnx.merge(graph, params), given, carry, table, guidance, first, stop, flow=flow)


def _decode(
    autoencoder_graph: nnx.GraphDef[Autoencoder], autoencoder_params: nnx.State[Any, Any], latents: Array
) -> UInt8[Array, "B S S 3"]:
    return to_uint8(nnx.merge(autoencoder_graph, autoencoder_params).decode(latents))
