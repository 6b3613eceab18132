"""``python -m focaldet``: the command ``focaldet``."""

import sys

from focaldet.cli import main

if __name__ == "__main__":
    sys.exit(main())
