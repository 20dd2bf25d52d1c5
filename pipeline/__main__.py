"""The command `ampseg`, as `python -m pipeline`."""

import sys

from ampseg import main

if __name__ == "__main__":
    sys.exit(main())
