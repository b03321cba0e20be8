#!/usr/bin/env python
"""`haplovl-plan` of this checkout: finds the parallel layout that fits a cluster."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_haplovl.commands.plan import main

if __name__ == "__main__":
    sys.exit(main())
