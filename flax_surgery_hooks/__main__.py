"""`python -m flax_surgery_hooks`: see `cli`."""

import sys

from flax_surgery_hooks.cli import main

if __name__ == "__main__":
    sys.exit(main())
