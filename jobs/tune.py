"""Hyperparameter search: `python jobs/tune.py --config jobs/tune.yaml ...`."""

import sys

from imgcls.cli import run

if __name__ == "__main__":
    sys.exit(run("tune", sys.argv[1:]))
