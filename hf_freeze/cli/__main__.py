"""`python -m hf_freeze.cli`, and `accelerate launch -m hf_freeze.cli`."""

from __future__ import annotations

import sys

from hf_freeze.cli import main

if __name__ == "__main__":
    sys.exit(main())
