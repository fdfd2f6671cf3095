"""Evaluate predictions, or predict first: `python jobs/evaluate.py --predictions OUT ...`."""

import sys

from imgcls.cli import run

if __name__ == "__main__":
    sys.exit(run("evaluate", sys.argv[1:]))
