#!/usr/bin/env python
"""`haplovl-convert` of this checkout: converts checkpoints."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_haplovl.commands.convert import main

if __name__ == "__main__":
    main()
