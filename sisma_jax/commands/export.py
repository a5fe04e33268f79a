"""The command `export`: writes one file from which faces can be sampled."""

import dataclasses

from sisma_jax.commands.report import require_free, tell
from sisma_jax.config import Config
from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, to_path
from sisma_jax.parallel import sharding
from sisma_jax.runs.export import EXPORT_SUFFIX, export_params
from sisma_jax.runs.folder import Checkpoint, RunFolder


@dataclasses.dataclass(frozen=True)
class Export:
    """Writes one file, from which faces can be sampled: EMA parameters, configuration, autoencoder and face parser."""

    out: str = ""
    """File to write, *.safetensors. If empty: WORKDIR/NAME_STEP.safetensors, with the name of the run's folder."""
    checkpoint: Checkpoint = "newest"
    """Checkpoint to export: the newest, the best (see train.best), or the one of a step."""
    overwrite: bool = False
    """Replace the file if it exists."""

    def run(self, config: Config, workdir: AnyPath) -> None:
        """Runs the command on the run in `workdir`.

        Raises:
          InputError: `out` has another suffix or exists, the run or its checkpoint cannot be read, or the file cannot
            be written.
        """
        if self.out and not self.out.endswith(EXPORT_SUFFIX):
            raise InputError(f"`out` {self.out} must end in {EXPORT_SUFFIX}; change its suffix.")
        run = RunFolder.open(workdir, config)
        if self.out:
            require_free([to_path(self.out)], self.overwrite)
        mesh = sharding.make_mesh(config.mesh)
        step, params = run.restore_ema(mesh, self.checkpoint)
        path = to_path(self.out) if self.out else run.exported(step)
        require_free([path], self.overwrite)
        parser = run.parser if run.has_parser() else None
        if parser is not None and not parser.is_own:
            tell(f"The file does not contain the face parser of parser.weights, {config.parser.weights}.")
            parser = None
        export_params(path, config, step, sharding.fetch(params, mesh), run.autoencoder, run.mask_prior, parser)
        tell(f"Parameters of step {step}: {path}")
        tell(f"Load it in Python with sisma_jax.load({str(path)!r}), or give it as `weights` to the command `sample`.")
