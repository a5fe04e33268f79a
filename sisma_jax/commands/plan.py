"""The command `plan`: memory and cost of a run on devices that are not present."""

import dataclasses

from sisma_jax import planning
from sisma_jax.commands.report import make_folder, tell
from sisma_jax.config import Config
from sisma_jax.files import AnyPath, write_atomically
from sisma_jax.runs.folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Plan:
    """Compiles the training step and the sampler for devices that need not be present, and reports memory and cost."""

    topology: str
    """TPU topology in libtpu's notation, such as v5e:4x4 or v5p:2x2x1; or cpu:8 for eight virtual CPU devices."""
    search: bool = True
    """Search for the largest batch that fits into memory."""
    memory_gib: float | None = None
    """Memory per device that the programs may use, in GiB. None: the limit of the TPU compiler."""

    def run(self, config: Config, workdir: AnyPath) -> None:
        """Runs the command, and writes the plan to `workdir`, which need not contain a run.

        Raises:
          InputError: the topology is unknown, the mesh or the batch does not match it, or the plan cannot be written.
        """
        planned = planning.plan(config, self.topology, search=self.search, memory_gib=self.memory_gib)
        path = RunFolder(workdir, config).plan(self.topology)
        make_folder(path.parent)
        write_atomically(path, planning.to_json(planned))
        tell(planning.format_plan(planned))
        tell(f"Plan: {path}")
