"""Every code block of the documents: Python runs, commands and their options exist, JSON is valid.

The blocks of a document run in turn, in one namespace and an empty folder, with a tiny model in place of the files that
a document assumes. Commands are parsed and not run. What cannot be checked here is in `ELSEWHERE`, with the reason.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import json
import re
import runpy
import shlex
import string
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from flax import nnx
from markdown_it import MarkdownIt

import sisma_jax
from sisma_jax import cli, config_files, pipeline
from sisma_jax.data import photos
from sisma_jax.data.drawing import draw_face
from sisma_jax.kernels import selective_scan
from sisma_jax.kernels.selective_scan import CHECKPOINT_NAME
from sisma_jax.runs import export, folder, stablehlo
from tests.processes import ROOT

DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("README.md", "CONTRIBUTING.md", "kernels/README.md", "docs/*.md", "docs_site/api/*.md")
    for path in ROOT.glob(pattern)
)
LANGUAGES = ("bash", "bash tested", "json", "python", "text")

# The first words of commands that are not checked here, and why.
ELSEWHERE = {
    "curl": "needs a server; tests/serving/test_api.py sends such requests",
    "export": "sets variables, which are replaced in the commands below it",
    "gcloud": "needs an account and rents machines; tests/test_docs.py runs the copies to a bucket with a stand-in",
    "scontrol": "is a part of Slurm",
    "tensorboard": "is a server of another project",
    "[": "is a part of the shell",
}
# Words before a command that do not change what it is.
_PREFIXES = ("srun", "{", "}", "&&")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    document: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def _tokens(document: str) -> list:
    return MarkdownIt("commonmark").enable("table").parse((ROOT / document).read_text())


def blocks(document: str) -> list[Block]:
    return [
        Block(document, token.map[0] + 1, token.info, token.content)
        for token in _tokens(document)
        if token.type in ("fence", "code_block")
    ]


def inline_code(document: str) -> list[str]:
    """Code within sentences and tables."""
    children = [child for token in _tokens(document) for child in token.children or ()]
    return [child.content for child in children if child.type == "code_inline"]


BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
SHELL_BLOCKS = [block for block in BLOCKS if block.language == "bash"]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_names_its_language(block):
    assert block.language in LANGUAGES, "use `text` for what is neither a program nor data"
    if block.language == "json":
        json.loads(block.text)


# Python.


def _face(size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    return draw_face(3, size)


def _edited(mask: np.ndarray) -> np.ndarray:
    edited = mask.copy()
    edited[:8] = 13
    return edited


def _scan_arguments() -> dict[str, jax.Array]:
    shapes = {
        "u": (1, 5, 8),
        "delta": (1, 5, 8),
        "A": (8, 4),
        "B": (1, 5, 4),
        "C": (1, 5, 4),
        "D": (8,),
        "z": (1, 5, 8),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}
    return arrays | {"A": -jnp.exp(arrays["A"]), "delta_bias": jnp.zeros(8)}


def _names_of_readme() -> dict[str, object]:
    photo, mask = _face()
    return {"mask": mask, "edited_mask": _edited(mask), "photo": photo, **_scan_arguments()}


def _names_of_masks() -> dict[str, object]:
    photo, mask = _face()
    return {"pipe": sisma_jax.load("runs/demo"), "jax": jax, "mask": mask, "photo": photo}


def _names_of_painting_page() -> dict[str, object]:
    Path("settings.json").write_text(json.dumps({"seeds": [7], "steps": 2, "guidance": 1.5}))
    Path("mask.png").write_bytes(photos.encode_png(_face()[1]))
    return {}


def _names_of_export() -> dict[str, object]:
    pipe = sisma_jax.load("runs/demo")
    stablehlo.export_sampler("faces.stablehlo", pipe.config, jax.device_get(pipe.params), pipe.autoencoder, ["cpu"])
    Path("mask.png").write_bytes(photos.encode_png(_face(pipe.config.data.image_size)[1]))
    return {}


def _names_of_kernels() -> dict[str, object]:
    modules = {"jax": jax, "jnp": jnp, "nnx": nnx, "eqx": eqx}
    return {**modules, **_scan_arguments(), "selective_scan": selective_scan, "CHECKPOINT_NAME": CHECKPOINT_NAME}


# What the text of a document says is there before its first block.
GIVEN: dict[str, Callable[[], dict[str, object]]] = {
    "README.md": _names_of_readme,
    "docs/export.md": _names_of_export,
    "docs/masks.md": _names_of_masks,
    "docs/painting_page.md": _names_of_painting_page,
    "docs_site/api/index.md": lambda: {"mask": _face()[1]},
    "kernels/README.md": _names_of_kernels,
}
# What a document says of its variables after its last block.
SHAPES = {
    "README.md": {"faces": (4, 64, 64, 3), "edits": (1, 32, 32, 3), "y": (1, 5, 8)},
    "docs/export.md": {"faces": (4, 16, 16, 3)},
    "docs/first_faces.md": {"faces": (4, 64, 64, 3), "edits": (3, 64, 64, 3)},
    "docs/masks.md": {"faces": (1, 16, 16, 3), "mask": (32, 32)},
    "docs/painting_page.md": {"face": (1, 64, 64, 3)},
}


@pytest.fixture(scope="module")
def model(weights) -> pipeline.Pipeline:
    return pipeline.load(weights)


@pytest.fixture(scope="module")
def demo() -> pipeline.Pipeline:
    return pipeline.load("demo")


@pytest.mark.parametrize("document", sorted({block.document for block in BLOCKS if block.language == "python"}))
def test_python_blocks_run(document, demo, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # One pipeline for all documents compiles its programs once.
    models = {"demo": demo, "runs/demo": model, "faces.safetensors": model}
    monkeypatch.setattr(sisma_jax, "load", models.__getitem__)
    names = GIVEN.get(document, dict)()
    for block in blocks(document):
        if block.language == "python":
            # Lines of errors are those of the document.
            exec(compile("\n" * block.line + block.text, document, "exec"), names)
    for name, shape in SHAPES.get(document, {}).items():
        assert np.shape(names[name]) == shape, name


# Commands.


def commands(text: str, variables: dict[str, str]) -> Iterator[list[str]]:
    """Yields the words of each simple command; `variables` are replaced, and gain those that the text exports."""
    text = re.sub(r"(?m)(^|\s)#.*$", "", text.replace("\\\n", " "))
    for match in re.finditer(r"(\w+)=(\"[^\"]*\"|\S+)", "".join(re.findall(r"(?m)^export .*\n", text))):
        variables[match[1]] = match[2].strip('"')
    lexer = shlex.shlex(string.Template(text).safe_substitute(variables), posix=True, punctuation_chars="();|&\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    words: list[str] = []
    for word in [*lexer, "\n"]:
        if set(word) <= set(lexer.punctuation_chars):
            while words and words[0] in _PREFIXES:
                words = words[1:]
            if words:
                yield words
            words = []
        else:
            words.append(word)


def test_commands_of_a_block_are_found():
    text = "export A=1 B='x'\nsrun python run.py $A \\\n  --b='c d' || { [ 1 ] && make x; }   # make y\nls | wc\n"
    assert list(commands(text, {})) == [
        ["export", "A=1", "B=x"],
        ["python", "run.py", "1", "--b=c d"],
        ["[", "1", "]"],
        ["make", "x"],
        ["ls"],
        ["wc"],
    ]


class _Parsed(Exception):
    """The arguments of a program are accepted; it need not run."""


@pytest.fixture
def parse_only(tmp_path, monkeypatch) -> Callable[[list[str]], None]:
    """Parses the words of a command, in a folder where the files that the documents name exist."""
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    Path("faces").mkdir()
    (classes,) = [block.text for block in blocks("docs/own_classes.md") if block.language == "json"]
    Path("faces/classes.json").write_text(classes)
    demo, faces = (config_files.load(f"configs/{name}.py") for name in ("demo", "celebamask_sample"))
    monkeypatch.setattr(folder, "read_config", lambda workdir: demo if workdir.name == "demo" else faces)
    monkeypatch.setattr(export, "read_config", lambda file: faces)
    real_cli, real_parse_args = tyro.cli, argparse.ArgumentParser.parse_args

    def parse_run(words: list[str]) -> None:
        # Brackets mark options that may be left out.
        cli.parse([word.strip("[]") for word in words])

    def parse_benchmark(file: str, words: list[str]) -> None:
        def tyro_cli(program, **options):
            idle = functools.wraps(program)(lambda *_, **__: None) if inspect.isfunction(program) else program
            real_cli(idle, args=words, **options)
            raise _Parsed

        def parse_args(parser, *_):
            real_parse_args(parser, words)
            raise _Parsed

        with monkeypatch.context() as patched, contextlib.suppress(_Parsed):
            patched.setattr(tyro, "cli", tyro_cli)
            patched.setattr(argparse.ArgumentParser, "parse_args", parse_args)
            runpy.run_path(str(ROOT / file), run_name="__main__")
            pytest.fail(f"{file} does not parse its arguments")

    def parse_python(words: list[str]) -> None:
        if words[0] == "-m" and words[1].startswith("benchmarks."):
            words = [f"{words[1].replace('.', '/')}.py", *words[2:]]
        if words[0] == "run.py":
            parse_run(words[1:])
        elif words[0] == "-m" and words[1] == "pip":
            parse_pip(words[2:])
        elif words[0] == "-m":
            assert importlib.util.find_spec(words[1]), words
        else:
            assert (ROOT / words[0]).is_file(), words
            parse_benchmark(words[0], words[1:])

    def parse_pip(words: list[str]) -> None:
        assert words[0] == "install", words
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for option, value in zip(words, [*words[1:], ""], strict=True):
            if option in ("-r", "--requirement"):
                assert (ROOT / value).is_file(), words
            elif option.startswith(".["):
                assert set(option[2:-1].split(",")) <= set(project["optional-dependencies"]), words

    def parse_make(words: list[str]) -> None:
        makefile = (ROOT / "Makefile").read_text()
        targets = set(" ".join(re.findall(r"^([^\s:=#][^:=#]*):(?!=)", makefile, re.M)).split())
        variables = set(re.findall(r"^(\w+) *[?:]?=", makefile, re.M))
        for word in words:
            name, is_variable, _ = word.partition("=")
            assert name in (variables if is_variable else targets), words

    def parse(words: list[str]) -> None:
        program = Path(words[0]).name
        if re.fullmatch(r"python[\d.]*", program):
            parse_python(words[1:])
        elif program == "pip":
            parse_pip(words[1:])
        elif program == "make":
            parse_make(words[1:])
        else:
            assert program in ELSEWHERE, f"add a check of {program}, or the reason why there is none: {words}"

    return parse


def _check(parse: Callable[[list[str]], None], words: list[str], capsys) -> None:
    try:
        parse(words)
    except (SystemExit, sisma_jax.InputError) as error:
        pytest.fail(f"{shlex.join(words)}\n{error}\n{capsys.readouterr().err}")


@pytest.mark.parametrize("document", sorted({block.document for block in SHELL_BLOCKS}))
def test_commands_and_their_options_exist(document, parse_only, capsys):
    variables: dict[str, str] = {}
    for block in SHELL_BLOCKS:
        if block.document == document:
            for words in commands(block.text, variables):
                _check(parse_only, words, capsys)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_within_sentences_exist(document, parse_only, capsys):
    for code in inline_code(document):
        found = re.search(r"(?:^|^\S*=.* )((?:python3?|make) .*)", code, re.S)
        if found and found[1] != "python run.py":  # that is the name of the command line
            for words in commands(found[1].replace("--config FILE", "--config configs/demo.py"), {}):
                _check(parse_only, words, capsys)


@pytest.mark.parametrize(
    "text",
    [
        "python run.py sample --weights faces.safetensors --maks FILE",
        "python run.py simple --config configs/demo.py",
        "python run.py --config configs/no.py",
        "python benchmarks/ssd.py --two-cores",
        "python benchmarks/device_check.py --platform abacus",
        "make demos",
        "pip install '.[severe]'",
        "rm -rf runs",
    ],
)
def test_wrong_commands_are_found(text, parse_only):
    (words,) = commands(text, {})
    with pytest.raises((SystemExit, AssertionError, sisma_jax.InputError)):
        parse_only(words)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_options_of_the_configuration_exist(document):
    text = (ROOT / document).read_text()
    named = {f"{section}.{key}" for section, key in re.findall(r"--([a-z]+)\.([a-z_0-9]+)", text)}
    assert named - {"section.key"} <= set(config_files.keys())


def test_every_reason_is_needed():
    used = {words[0] for block in SHELL_BLOCKS for words in commands(block.text, {})}
    assert set(ELSEWHERE) <= used


def test_blocks_that_are_run_elsewhere_are_those_of_one_document():
    """tests/test_docs.py runs them."""
    assert {block.document for block in BLOCKS if block.language == "bash tested"} == {"docs/tpu_vm.md"}
