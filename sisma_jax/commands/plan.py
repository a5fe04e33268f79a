"""The command `plan`: what a run takes on devices that need not be there."""

import dataclasses

from sisma_jax import planning
from sisma_jax.commands.report import make_folder, tell
from sisma_jax.config import Config
from sisma_jax.files import AnyPath, write_atomically
from sisma_jax.runs.folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Plan:
    """Compiles the training step and the sampler for devices that need not be there, and reports what they take."""

    topology: str
    """As libtpu names it, such as v5e:4x4 or v5p:2x2x1; or cpu:8, virtual devices of a CPU."""
    search: bool = True
    """Search the largest batch that fits."""
    memory_gib: float | None = None
    """Memory of a device that the programs may use; what its compiler allows if not given."""

    def run(self, config: Config, workdir: AnyPath) -> None:
        planned = planning.plan(config, self.topology, search=self.search, memory_gib=self.memory_gib)
        path = RunFolder(workdir, config).plan(self.topology)
        make_folder(path.parent)
        write_atomically(path, planning.to_json(planned))
        tell(planning.format_plan(planned))
        tell(f"Plan: {path}")
