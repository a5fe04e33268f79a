"""The command `export`: one file that samples."""

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
    """Writes a run's EMA parameters, configuration and autoencoder to one file that samples."""

    out: str = ""
    """The file, *.safetensors; WORKDIR/NAME_STEP.safetensors if empty, with the name of the run's folder."""
    checkpoint: Checkpoint = "newest"
    """The newest, the best (lowest held-out loss), or that of a step."""
    overwrite: bool = False
    """Replace a file that exists."""

    def run(self, config: Config, workdir: AnyPath) -> None:
        if self.out and not self.out.endswith(EXPORT_SUFFIX):
            raise InputError(f"`out` {self.out} must end in {EXPORT_SUFFIX}.")
        run = RunFolder.open(workdir, config)
        if self.out:
            require_free([to_path(self.out)], self.overwrite)
        mesh = sharding.make_mesh(config.mesh)
        step, params = run.restore_ema(mesh, self.checkpoint)
        path = to_path(self.out) if self.out else run.exported(step)
        require_free([path], self.overwrite)
        export_params(path, config, step, sharding.fetch(params, mesh), run.autoencoder)
        tell(f"Parameters of step {step}: {path}")
        tell(f"From Python: sisma_jax.load({str(path)!r}); the command `sample` takes it as `weights`.")
