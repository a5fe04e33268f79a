"""The command line of sisma_jax: python run.py --config FILE [COMMAND] [--workdir DIR] [--section.key=value ...]."""

import sys

from sisma_jax.allocator import keep_freed_memory
from sisma_jax.cli import main

if __name__ == "__main__":
    keep_freed_memory()
    main(sys.argv[1:])
