"""The command `sisma-jax`, or `python -m sisma_jax`: the command line of the installed package."""

import sys

_PROGRAM = "sisma-jax"


def main() -> None:
    """Runs the command line on the arguments of the process; exits with 2 if the packages that it needs are absent."""
    try:
        from sisma_jax import cli
    except ModuleNotFoundError as error:
        print(
            f"Error: the command line needs the package {error.name}: pip install 'sisma-jax[train]'. "
            "To sample from Python, sisma_jax.load(FILE) needs nothing more.",
            file=sys.stderr,
        )
        sys.exit(2)
    cli.main(sys.argv[1:], program=_PROGRAM)


if __name__ == "__main__":
    main()
