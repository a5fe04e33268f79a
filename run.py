"""The command line of sisma_jax: python run.py --config FILE [COMMAND] [--workdir DIR] [--section.key=value ...]."""

import sys

from sisma_jax.cli import main

if __name__ == "__main__":
    main(sys.argv[1:])
