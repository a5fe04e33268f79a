"""The command `prepare`: raw files or drawn faces to shards."""

import dataclasses

from sisma_jax.commands.report import tell
from sisma_jax.config import Config
from sisma_jax.data.dataset import DataSet
from sisma_jax.files import AnyPath


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Writes the shards of the data set."""

    def run(self, config: Config, workdir: AnyPath) -> None:
        prepare_data(config)


def prepare_data(config: Config) -> DataSet:
    """Returns the data set of a configuration, prepared if it was not."""
    dataset = DataSet.prepare(config.data)
    counts = ", ".join(f"{count} {split}" for split, count in dataset.counts.items())
    tell(f"Data: {config.data.name} in {config.data.cache_dir} ({counts} examples)")
    return dataset
