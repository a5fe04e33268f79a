"""The command `sisma-jax`, or `python -m sisma_jax`: the command line of the installed package."""

import sys

_PROGRAM = "sisma-jax"


def main() -> None:
    """Runs the command line with the arguments of this process; exits with code 2 if a package is missing."""
    try:
        from sisma_jax import allocator, cli
    except ModuleNotFoundError as error:
        print(
            f"Error: the command line needs the package {error.name}: pip install 'sisma-jax[train]'. "
            "Sampling from Python, with sisma_jax.load(FILE), does not need it.",
            file=sys.stderr,
        )
        sys.exit(2)
    allocator.keep_freed_memory()
    cli.main(sys.argv[1:], program=_PROGRAM)


if __name__ == "__main__":
    main()
