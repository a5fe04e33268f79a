"""The command `export`: writes one file from which faces can be sampled."""

import dataclasses
from typing import Literal

from sisma_jax.commands.report import require_free, tell
from sisma_jax.config import Config
from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, to_path
from sisma_jax.parallel import sharding
from sisma_jax.parallel.agreement import is_primary, together
from sisma_jax.runs import stablehlo
from sisma_jax.runs.export import EXPORT_SUFFIX, export_params
from sisma_jax.runs.folder import Checkpoint, RunFolder

_SUFFIXES = {"safetensors": EXPORT_SUFFIX, "stablehlo": stablehlo.SUFFIX}


@dataclasses.dataclass(frozen=True)
class Export:
    """Writes one file, from which faces can be sampled: by sisma_jax, or by JAX alone."""

    format: Literal["safetensors", "stablehlo"] = "safetensors"
    """safetensors: EMA parameters, configuration, autoencoder and face parser, for sisma_jax. stablehlo: the compiled
    function from keys and masks to faces with the settings of sample, for jax.export."""
    out: str = ""
    """File to write, *.safetensors or *.stablehlo. If empty: WORKDIR/NAME_STEP.FORMAT, with the name of the run's
    folder."""
    checkpoint: Checkpoint = "newest"
    """Checkpoint to export: the newest, the best (see train.best), or the one of a step."""
    platforms: tuple[Literal["cpu", "tpu", "cuda"], ...] = stablehlo.PLATFORMS
    """Platforms on which a stablehlo file runs."""
    overwrite: bool = False
    """Replace the file if it exists."""

    def run(self, config: Config, workdir: AnyPath) -> None:
        """Runs the command on the run in `workdir`.

        Raises:
          InputError: `out` has another suffix or exists, the run or its checkpoint cannot be read, or the file cannot
            be written.
        """
        suffix = _SUFFIXES[self.format]
        if self.out and not self.out.endswith(suffix):
            raise InputError(f"`out` {self.out} must end in {suffix}; change its suffix, or `format`.")
        if not self.platforms:
            raise InputError("`platforms` is empty; name cpu, tpu or cuda.")
        run = RunFolder.open(workdir, config)
        if self.out:
            require_free([to_path(self.out)], self.overwrite)
        mesh = sharding.make_mesh(config.mesh)
        step, params = run.restore_ema(mesh, self.checkpoint)
        path = to_path(self.out) if self.out else run.exported(step, suffix)
        require_free([path], self.overwrite)
        params = sharding.fetch(params, mesh)
        if self.format == "stablehlo":
            with together():
                if is_primary():
                    stablehlo.export_sampler(path, config, params, run.autoencoder, self.platforms)
            settings = config.sample
            tell(f"Sampler of step {step} with {settings.steps} steps and guidance {settings.guidance:g}: {path}")
            tell("Run it with jax.export.deserialize; docs/export.md has the program.")
            return
        parser = run.parser if run.has_parser() else None
        if parser is not None and not parser.is_own:
            tell(f"The file does not contain the face parser of parser.weights, {config.parser.weights}.")
            parser = None
        export_params(path, config, step, params, run.autoencoder, run.mask_prior, parser)
        tell(f"Parameters of step {step}: {path}")
        tell(f"Load it in Python with sisma_jax.load({str(path)!r}), or give it as `weights` to the command `sample`.")
