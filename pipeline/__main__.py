"""The commands; each tells more with `--help`.

python -m pipeline check DATASET_DIR --plan                        looks at a dataset
python -m pipeline.run configs/amp.json --dataset_dir DATASET_DIR  trains, and goes on training
python -m pipeline predict RUN_DIR INPUT OUTPUT_DIR                predicts with a run
python -m pipeline evaluate PRED_DIR LABEL_DIR                     scores predictions
python -m pipeline compare --a A.csv ... --b B.csv ...             compares two ways of training
python -m pipeline certify configs/amp.json --dataset_dir DIR      compares precisions
python -m pipeline export RUN_DIR                                  packs a bundle to hand on
python -m pipeline report RUN_DIR                                  writes the report of a run again
"""

import sys
from importlib import import_module

from pipeline import COMMANDS


def main() -> int:
    """Run the command that the first word names; returns the exit status."""
    name, words = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if name not in COMMANDS:
        print(__doc__, end="")
        return 0 if name in ("-h", "--help") else 2
    module = "pipeline.run" if name == "run" else f"pipeline.commands.{name}"
    return import_module(module).main(words)


if __name__ == "__main__":
    sys.exit(main())
