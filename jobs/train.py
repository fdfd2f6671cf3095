"""Train a network and write its bundle: `python jobs/train.py --config jobs/train.yaml ...`."""

import sys

from imgcls.cli import run

if __name__ == "__main__":
    sys.exit(run("train", sys.argv[1:]))
