"""The command line: python run.py --config FILE [COMMAND] [--workdir DIR] [--section.key=value ...]."""

import argparse
import contextlib
import dataclasses
import errno
import logging
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sisma_jax import commands, compile_cache, config_files
from sisma_jax.commands import EvaluateOptions, ExportOptions, PlanOptions, SampleOptions
from sisma_jax.config import Config
from sisma_jax.errors import InputError, Preempted
from sisma_jax.files import to_path
from sisma_jax.parallel import distributed
from sisma_jax.parallel.distributed import DistributedOptions
from sisma_jax.parallel.preemption import stopping

# Failures of the disk or of its permissions, which the user can mend; any other OSError is a defect of the program.
_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}

Command = Literal["all", "prepare", "autoencoder", "latents", "train", "sample", "evaluate", "export", "plan"]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Paints photorealistic faces into semantic masks: prepares data, trains, samples and evaluates.

    Every value of the configuration file can be overridden: --train.batch_size=32.
    """

    config: Path
    """Configuration file, for example configs/demo.py."""
    command: tyro.conf.Positional[Command] = "all"
    """Part of the job."""
    workdir: str = ""
    """Folder of the run, or gs://BUCKET/...; it is resumed if it exists. Default: runs/NAME for configs/NAME.py."""
    compile_cache: str = ""
    """Folder that keeps compiled programs for the next start, or none. Default: the environment's
    JAX_COMPILATION_CACHE_DIR, or ~/.cache/sisma_jax."""
    distributed: Annotated[DistributedOptions, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=DistributedOptions
    )
    settings: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)


@dataclasses.dataclass(frozen=True)
class SampleArguments(Arguments):
    """Paints faces into masks of your own with a trained run, or with what was exported of one."""

    options: Annotated[SampleOptions, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=lambda: SampleOptions(mask=tyro.MISSING)
    )


@dataclasses.dataclass(frozen=True)
class EvaluateArguments(Arguments):
    """Paints faces into held-out masks and measures them."""

    options: Annotated[EvaluateOptions, tyro.conf.arg(name="")] = dataclasses.field(default_factory=EvaluateOptions)


@dataclasses.dataclass(frozen=True)
class ExportArguments(Arguments):
    """Writes a run's averaged parameters to one file that samples."""

    options: Annotated[ExportOptions, tyro.conf.arg(name="")] = dataclasses.field(default_factory=ExportOptions)


@dataclasses.dataclass(frozen=True)
class PlanArguments(Arguments):
    """Compiles the training step and the sampler for devices that need not be there, and says what they take."""

    options: Annotated[PlanOptions, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=lambda: PlanOptions(topology=tyro.MISSING)
    )


_KINDS = {"sample": SampleArguments, "evaluate": EvaluateArguments, "export": ExportArguments, "plan": PlanArguments}


def parse(arguments: list[str]) -> Arguments:
    """Returns the arguments over the values of the configuration file; exits with code 2 on a wrong one."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config", type=Path)
    path = first.parse_known_args(arguments)[0].config
    kind = next((kind for name, kind in _KINDS.items() if name in arguments), Arguments)
    default = kind(tyro.MISSING) if path is None else kind(path, settings=config_files.load(path))
    return tyro.cli(kind, args=arguments, default=default, prog="run.py", use_underscores=True)


def do(parsed: Any) -> None:
    """Does the command."""
    settings = parsed.settings
    workdir = to_path(parsed.workdir or Path("runs") / parsed.config.stem)
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
            commands.evaluate(settings, workdir, parsed.options)
        case "export":
            commands.export(settings, workdir, parsed.options)
        case "plan":
            commands.plan(settings, workdir, parsed.options)


def main(arguments: list[str]) -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    logging.getLogger("sisma_jax").setLevel(logging.INFO)
    try:
        parsed = parse(arguments)
        num_processes = distributed.initialize(parsed.distributed)
        compile_cache.enable(parsed.compile_cache)
        with stopping() if num_processes == 1 else contextlib.nullcontext():
            do(parsed)
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _STORAGE_ERRORS:
            raise
        print(f"Error: {error}. Free disk space or mend the folder; the same command goes on.", file=sys.stderr)
        sys.exit(2)
    except Preempted as error:
        print(error.message, file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print("Interrupted; the same command resumes from the last checkpoint.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])
