"""The command line: python run.py [--config FILE] [COMMAND] [--workdir DIR] [--section.key=value ...].

The only code that speaks of flags: it turns these into a command and a configuration, and the arguments that an error
of the library names back into flags.
"""

import argparse
import contextlib
import dataclasses
import errno
import functools
import io
import logging
import operator
import os
import re
import signal
import sys
from typing import Annotated, Any, Protocol

import tyro

from sisma_jax import compile_cache, config_files
from sisma_jax.commands.autoencoder import Autoencoder, Latents
from sisma_jax.commands.evaluate import Evaluate
from sisma_jax.commands.export import Export
from sisma_jax.commands.plan import Plan
from sisma_jax.commands.prepare import Prepare
from sisma_jax.commands.sample import Sample
from sisma_jax.commands.train import All, Train
from sisma_jax.config import Config, Sampling
from sisma_jax.data.classes import ClassSet
from sisma_jax.errors import InputError, Preempted
from sisma_jax.files import AnyPath, to_path
from sisma_jax.parallel import distributed
from sisma_jax.parallel.distributed import DistributedOptions
from sisma_jax.parallel.preemption import stopping
from sisma_jax.runs import export, folder

# Failures of the disk or of its permissions, which the user can fix; any other OSError is a defect of the program.
_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}

_COMMANDS = (All, Prepare, Autoencoder, Latents, Train, Sample, Evaluate, Export, Plan)


class Command(Protocol):
    """What every command is: its options, and what it does with a configuration and the folder of a run."""

    def run(self, config: Config, workdir: AnyPath) -> None: ...


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Generates photorealistic faces from semantic masks: prepares data, trains, samples and evaluates.

    Every value of the configuration file can be overridden: --train.batch_size=32.
    """

    command: Any
    config: str = ""
    """Configuration file, for example configs/demo.py. Without one, that of the run in workdir."""
    workdir: str = ""
    """Folder of the run, or gs://BUCKET/...; it is resumed if it exists. Default: runs/NAME for configs/NAME.py."""
    compile_cache: str = ""
    """Folder that keeps compiled programs for the next start, or none. Default: the environment's
    JAX_COMPILATION_CACHE_DIR, or ~/.cache/sisma_jax."""
    distributed: Annotated[DistributedOptions, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=DistributedOptions
    )
    settings: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)

    @property
    def run_folder(self) -> AnyPath:
        """The folder of the run."""
        return to_path(self.workdir) if self.workdir else to_path("runs") / to_path(self.config).stem


def parse(arguments: list[str], program: str = "run.py") -> Arguments:
    """Returns the arguments over the values of the configuration file; exits with code 2 on a wrong one.

    Args:
      arguments: the words after the program's name.
      program: its name in the usage.

    Raises:
      InputError: the configuration cannot be read, or a value is out of range.
    """
    base = _base_config(arguments)
    kind, messages = _arguments_type(base.sample), io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            parsed = tyro.cli(
                kind,
                args=arguments,
                default=kind(All(), settings=base),
                prog=program,
                use_underscores=True,
                config=(tyro.conf.CascadeSubcommandArgs, tyro.conf.OmitSubcommandPrefixes),
                registry=_REGISTRY,
            )
    except SystemExit as error:
        # tyro shows what a section raises in words of its own; ours name the value.
        if cause := _input_error(error):
            raise cause from None
        sys.stderr.write(messages.getvalue())
        raise
    if isinstance(parsed.command, Sample):
        parsed = _with_one_sampling(parsed, base.sample)
    return parsed


def _base_config(arguments: list[str]) -> Config:
    """Returns the configuration whose values the other arguments override."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--config", "--workdir", "--weights"):
        first.add_argument(name, default="")
    first.add_argument("-h", "--help", action="store_true")
    given = first.parse_known_args(arguments)[0]
    if given.weights:
        return export.read_config(given.weights)
    if given.config:
        return config_files.load(to_path(given.config))
    if given.help:
        return Config()
    if given.workdir:
        return folder.read_config(to_path(given.workdir))
    raise InputError("There is no configuration: name one with `config`, or the folder of a run with `workdir`.")


def _arguments_type(sampling: Sampling) -> type:
    """Returns `Arguments` with the commands, of which `sample` takes its defaults from the configuration."""
    defaults = {Sample: Sample(mask=tyro.MISSING, sampling=sampling), Plan: Plan(topology=tyro.MISSING)}
    commands = [
        Annotated[kind, tyro.conf.subcommand(kind.__name__.lower(), default=defaults.get(kind) or kind())]
        for kind in _COMMANDS
    ]
    field = ("command", Annotated[functools.reduce(operator.or_, commands), tyro.conf.arg(name="")])
    namespace = {"__doc__": Arguments.__doc__}
    return dataclasses.make_dataclass("Arguments", [field], bases=(Arguments,), frozen=True, namespace=namespace)


def _with_one_sampling(parsed: Arguments, base: Sampling) -> Arguments:
    """Joins `--steps` and the like, which override, with `--sample.steps`: both name the same value."""
    short = dataclasses.asdict(parsed.command.sampling)
    changed = {name: value for name, value in short.items() if value != getattr(base, name)}
    sampling = dataclasses.replace(parsed.settings.sample, **changed)
    settings = dataclasses.replace(parsed.settings, sample=sampling)
    return dataclasses.replace(
        parsed, command=dataclasses.replace(parsed.command, sampling=sampling), settings=settings
    )


_REGISTRY = tyro.constructors.ConstructorRegistry()


@_REGISTRY.primitive_rule
def _class_set_rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    if info.type is not ClassSet:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NAME|FILE",
        instance_from_str=lambda words: ClassSet.load(words[0]),
        is_instance=lambda value: isinstance(value, ClassSet),
        str_from_instance=lambda classes: [classes.known_name or classes.title],
    )


def _input_error(error: BaseException | None) -> InputError | None:
    """Returns the InputError among an exception and those that led to it."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def with_flags(message: str) -> str:
    """Returns a message of the library with flags for the configuration's keys, and for options in backticks."""
    keys = "|".join(map(re.escape, config_files.keys()))
    message = re.sub(rf"(?<![\w./-])(?:{keys})\b", r"--\g<0>", message)
    return re.sub(r"`(\w+)`", lambda match: f"--{match[1]}" if match[1] in _option_names() else match[0], message)


@functools.cache
def _option_names() -> set[str]:
    return {field.name for kind in (Arguments, DistributedOptions, *_COMMANDS) for field in dataclasses.fields(kind)}


def main(arguments: list[str], program: str = "run.py") -> None:
    """Runs the command line; exits with 2 on wrong input, 75 if it was told to stop, 130 if interrupted.

    Args:
      arguments: the words after the program's name.
      program: its name in the usage.
    """
    try:
        try:
            _run(arguments, program)
        finally:
            sys.stdout.flush()
    except BrokenPipeError as error:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(error.__context__.code if isinstance(error.__context__, SystemExit) else 128 + signal.SIGPIPE)


def _run(arguments: list[str], program: str) -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    logging.getLogger("sisma_jax").setLevel(logging.INFO)
    try:
        parsed = parse(arguments, program)
        num_processes = distributed.initialize(parsed.distributed)
        compile_cache.enable(parsed.compile_cache)
        with stopping() if num_processes == 1 else contextlib.nullcontext():
            parsed.command.run(parsed.settings, parsed.run_folder)
    except InputError as error:
        print(f"Error: {with_flags(str(error))}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _STORAGE_ERRORS:
            raise
        print(f"Error: {error}. Free disk space or fix the folder; the same command resumes.", file=sys.stderr)
        sys.exit(2)
    except Preempted as error:
        print(error.message, file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print("Interrupted; the same command resumes from the last checkpoint.", file=sys.stderr)
        sys.exit(130)
