"""The command `prepare`: converts raw files, or drawn faces, to array_record shards."""

import dataclasses

from sisma_jax.commands.report import tell
from sisma_jax.config import Config
from sisma_jax.data.dataset import DataSet
from sisma_jax.files import AnyPath


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Prepares the data set: writes its shards, unless they exist."""

    def run(self, config: Config, workdir: AnyPath) -> None:
        """Runs the command; `workdir` is not used.

        Raises:
          InputError: the raw files are missing or damaged, or the shards cannot be written.
        """
        prepare_data(config)


def prepare_data(config: Config) -> DataSet:
    """Returns the data set of a configuration, and writes its shards if they do not exist.

    Raises:
      InputError: the raw files are missing or damaged, or the shards cannot be written.
    """
    dataset = DataSet.prepare(config.data)
    counts = ", ".join(f"{count} {split}" for split, count in dataset.counts.items())
    tell(f"Data: {config.data.name} in {config.data.cache_dir} ({counts} examples)")
    return dataset
