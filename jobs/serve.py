"""Serve a model over HTTP: `python jobs/serve.py --config jobs/serve.yaml ...`."""

import sys

from imgcls.cli import run

if __name__ == "__main__":
    sys.exit(run("serve", sys.argv[1:]))
