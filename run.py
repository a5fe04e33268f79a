"""The command line: python run.py --config FILE [COMMAND] [--workdir DIR] [--section.key=value ...]."""

import argparse
import dataclasses
import errno
import logging
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from sisma_jax import commands, config
from sisma_jax.commands import SampleOptions
from sisma_jax.config import Config
from sisma_jax.errors import InputError

# Failures of the disk or of its permissions, which the user can mend; any other OSError is a defect of the program.
_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


Command = Literal["all", "prepare", "autoencoder", "latents", "train", "sample", "evaluate"]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Paints photorealistic faces into semantic masks: prepares data, trains, samples and evaluates.

    Every value of the configuration file can be overridden: --train.batch_size=32.
    """

    config: Path
    """Configuration file, for example configs/demo.py."""
    command: tyro.conf.Positional[Command] = "all"
    """Part of the job."""
    workdir: Path | None = None
    """Folder of the run; it is resumed if it exists. Default: runs/NAME for configs/NAME.py."""
    settings: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)


@dataclasses.dataclass(frozen=True)
class SampleArguments(Arguments):
    """Paints faces into masks of your own with a trained run."""

    options: Annotated[SampleOptions, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=lambda: SampleOptions(mask=tyro.MISSING)
    )


def parse(arguments: list[str]) -> Arguments:
    """Returns the arguments over the values of the configuration file; exits with code 2 on a wrong one."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config", type=Path)
    path = first.parse_known_args(arguments)[0].config
    kind = SampleArguments if "sample" in arguments else Arguments
    default = kind(tyro.MISSING) if path is None else kind(path, settings=config.load(path))
    return tyro.cli(kind, args=arguments, default=default, prog="run.py", use_underscores=True)


def main(arguments: list[str]) -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    logging.getLogger("sisma_jax").setLevel(logging.INFO)
    try:
        parsed = parse(arguments)
        settings = parsed.settings
        workdir = parsed.workdir or Path("runs") / parsed.config.stem
        match parsed.command:
            case "all":
                commands.run_all(settings, workdir)
            case "prepare":
                commands.prepare(settings)
            case "autoencoder":
                commands.autoencoder(settings, workdir)
            case "latents":
                commands.encode(settings, workdir)
            case "train":
                commands.train(settings, workdir)
            case "sample":
                commands.sample(settings, workdir, parsed.options)
            case "evaluate":
                commands.evaluate(settings, workdir)
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _STORAGE_ERRORS:
            raise
        print(f"Error: {error}. Free disk space or mend the folder; the same command goes on.", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Interrupted; the same command resumes from the last checkpoint.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])
