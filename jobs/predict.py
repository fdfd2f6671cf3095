"""Predict every image of a manifest: `python jobs/predict.py --config jobs/predict.yaml ...`."""

import sys

from imgcls.cli import run

if __name__ == "__main__":
    sys.exit(run("predict", sys.argv[1:]))
