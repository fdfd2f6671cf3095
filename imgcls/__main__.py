"""`python -m imgcls`: the `imgcls` command."""

from __future__ import annotations

from imgcls.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
