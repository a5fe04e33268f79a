"""The command line: python run.py [--config FILE] [COMMAND] [--workdir DIR] [--section.key=value ...].

No other module knows about flags. This one turns them into a command and a configuration, and turns the names of
arguments in the library's error messages back into flags.
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
from sisma_jax.commands.parser import Parser
from sisma_jax.commands.plan import Plan
from sisma_jax.commands.prepare import Prepare
from sisma_jax.commands.sample import Sample
from sisma_jax.commands.segment import Segment
from sisma_jax.commands.serve import Serve
from sisma_jax.commands.train import All, Train
from sisma_jax.config import Config, Sampling
from sisma_jax.data.classes import ClassSet
from sisma_jax.errors import InputError, Preempted
from sisma_jax.files import AnyPath, to_path
from sisma_jax.parallel import distributed
from sisma_jax.parallel.distributed import DistributedOptions
from sisma_jax.parallel.preemption import stopping
from sisma_jax.runs import export, folder
from sisma_jax.runs.named_weights import DEMO

# Disk and permission errors, which the user can fix. Any other OSError is a defect of the program.
_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}

_COMMANDS = (All, Prepare, Autoencoder, Latents, Train, Parser, Segment, Sample, Serve, Evaluate, Export, Plan)


class Command(Protocol):
    """A command. It is also a frozen dataclass, whose fields are the command's options."""

    def run(self, config: Config, workdir: AnyPath) -> None:
        """Runs the command with a configuration on the run in `workdir`; raises InputError for bad input."""
        ...


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Semantic face image synthesis: prepares data, trains, samples faces for masks, and evaluates.

    An option such as --train.batch_size=32 overrides a value of the configuration.
    """

    command: Any
    config: str = ""
    """Configuration file, for example configs/demo.py. If empty: the configuration of the run in workdir."""
    workdir: str = ""
    """Folder of the run, on a disk or in a bucket (gs://BUCKET/...). If empty: runs/NAME for configs/NAME.py."""
    compile_cache: str = ""
    """Folder of JAX's persistent compilation cache, or none to turn it off.
    If empty: JAX_COMPILATION_CACHE_DIR of the environment, or else ~/.cache/sisma_jax."""
    distributed: Annotated[DistributedOptions, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=DistributedOptions
    )
    settings: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)

    @property
    def run_folder(self) -> AnyPath:
        """Folder of the run: `workdir`, or runs/NAME for configs/NAME.py."""
        return to_path(self.workdir) if self.workdir else to_path("runs") / to_path(self.config).stem


def parse(arguments: list[str], program: str = "run.py") -> Arguments:
    """Returns the parsed arguments, which override the values of the configuration file.

    Args:
      arguments: the words after the program's name.
      program: name of the program in the usage message.

    Raises:
      InputError: the configuration cannot be read, or a value is out of range.
      SystemExit: a flag or a command is unknown or has the wrong type (code 2), or help was requested (code 0).
    """
    arguments = _with_demo(arguments)
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
        # tyro rewrites the message of an exception that a section raises. The original message names the value.
        if cause := _input_error(error):
            raise cause from None
        sys.stderr.write(messages.getvalue())
        raise
    if isinstance(parsed.command, Sample):
        parsed = _with_one_sampling(parsed, base.sample)
    return parsed


def _with_demo(arguments: list[str]) -> list[str]:
    """Returns the arguments; the command `serve` without a model serves the demo's weights."""
    given, rest = _first_arguments(arguments)
    is_named = given.weights or given.config or given.workdir or given.help
    return [*arguments, "--weights", DEMO] if "serve" in rest and not is_named else arguments


def _first_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the options that name the configuration, and the other arguments."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--config", "--workdir", "--weights"):
        first.add_argument(name, default="")
    first.add_argument("-h", "--help", action="store_true")
    return first.parse_known_args(arguments)


def _base_config(arguments: list[str]) -> Config:
    """Returns the configuration whose values the arguments override."""
    given, rest = _first_arguments(arguments)
    if given.weights:
        return export.read_config(given.weights)
    if given.config:
        return config_files.load(to_path(given.config))
    if given.help:
        return Config()
    if given.workdir:
        return folder.read_config(to_path(given.workdir))
    if any(word.partition("=")[0] == "--runs" for word in rest):  # `evaluate --runs` reads finished evaluations only
        return Config()
    raise InputError("There is no configuration; name one with `config`, or the folder of a run with `workdir`.")


def _arguments_type(sampling: Sampling) -> type[Arguments]:
    """Returns `Arguments` with all commands; the command `sample` takes its defaults from the configuration."""
    values: dict[type[Command], dict[str, Any]] = {
        Sample: {"mask": tyro.MISSING, "sampling": sampling},
        Segment: {"image": tyro.MISSING},
        Plan: {"topology": tyro.MISSING},
    }
    commands = [
        Annotated[kind, tyro.conf.subcommand(kind.__name__.lower(), default=kind(**values.get(kind, {})))]
        for kind in _COMMANDS
    ]
    field = ("command", Annotated[functools.reduce(operator.or_, commands), tyro.conf.arg(name="")])
    namespace = {"__doc__": Arguments.__doc__}
    return dataclasses.make_dataclass("Arguments", [field], bases=(Arguments,), frozen=True, namespace=namespace)


def _with_one_sampling(parsed: Arguments, base: Sampling) -> Arguments:
    """Merges `--steps` and `--sample.steps`, which set the same value; the first takes precedence."""
    short = dataclasses.asdict(parsed.command.sampling)
    changed = {name: value for name, value in short.items() if value != getattr(base, name)}
    sampling = dataclasses.replace(parsed.settings.sample, **changed)
    settings = dataclasses.replace(parsed.settings, sample=sampling)
    return dataclasses.replace(
        parsed, command=dataclasses.replace(parsed.command, sampling=sampling), settings=settings
    )


_REGISTRY = tyro.constructors.ConstructorRegistry()


@_REGISTRY.primitive_rule
def _class_set_rule(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[ClassSet] | None:
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
    """Returns the first InputError among an exception and its causes."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def with_flags(message: str) -> str:
    """Returns an error message of the library with flags in place of argument names.

    A configuration key, such as train.batch_size, becomes --train.batch_size. The name of an option in backticks, such
    as `workdir`, becomes --workdir.

    Args:
      message: of an `InputError`.
    """
    keys = "|".join(map(re.escape, config_files.keys()))
    message = re.sub(rf"(?<![\w./-])(?:{keys})\b", r"--\g<0>", message)
    return re.sub(r"`(\w+)`", lambda match: f"--{match[1]}" if match[1] in _option_names() else match[0], message)


@functools.cache
def _option_names() -> set[str]:
    return {field.name for kind in (Arguments, DistributedOptions, *_COMMANDS) for field in dataclasses.fields(kind)}


def main(arguments: list[str], program: str = "run.py") -> None:
    """Runs the command line.

    Args:
      arguments: the words after the program's name.
      program: name of the program in the usage message.

    Raises:
      SystemExit: with code 2 for bad input, 75 after SIGTERM, 130 after Ctrl-C, 141 if the reader of the output has
        closed the pipe, and 0 for help.
    """
    try:
        try:
            _run(arguments, program)
        finally:
            sys.stdout.flush()
    except BrokenPipeError as error:  # the reader of the output has closed the pipe
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
        print(
            f"Error: {error}. Free disk space or fix the folder, then run the same command again: it resumes.",
            file=sys.stderr,
        )
        sys.exit(2)
    except Preempted as error:
        print(error.message, file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print("Interrupted; the same command resumes from the last checkpoint.", file=sys.stderr)
        sys.exit(130)
