"""The commands; each tells more with `--help`.

python -m pipeline.check DATASET_DIR --plan                        looks at a dataset
python -m pipeline.run configs/amp.json --dataset_dir DATASET_DIR  trains, and goes on training
python -m pipeline.predict RUN_DIR INPUT OUTPUT_DIR                predicts with a run
python -m pipeline.evaluate PRED_DIR LABEL_DIR                     scores predictions
python -m pipeline.compare --a A.csv ... --b B.csv ...             compares two ways of training
python -m pipeline.certify configs/amp.json --dataset_dir DIR      compares precisions
python -m pipeline.export RUN_DIR                                  packs a bundle to hand on
python -m pipeline.report RUN_DIR                                  writes the report of a run again
"""

import sys

if __name__ == "__main__":
    print(__doc__, end="")
    sys.exit(0 if {"-h", "--help"} & {*sys.argv} else 2)
