"""`pipeline.run` whose rank 1 is given another value of a key: `differing KEY VALUE FILES...`."""

import os
import sys

from pipeline.run import main

if __name__ == "__main__":
    key, value, *words = sys.argv[1:]
    sys.exit(main([*words, *([f"--{key}", value] if os.environ["RANK"] == "1" else [])]))
