"""``python -m xdfast`` and ``torchrun … -m xdfast``: the command line."""

from __future__ import annotations

import sys

from xdfast.cli import main

if __name__ == "__main__":  # loader workers started by "spawn" import this module too
    sys.exit(main())
