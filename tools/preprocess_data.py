#!/usr/bin/env python
"""`haplovl-preprocess` of this checkout: turns LLaVA records and images into indexed files."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_haplovl.commands.preprocess import main

if __name__ == "__main__":
    sys.exit(main())
