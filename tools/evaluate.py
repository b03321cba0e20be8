#!/usr/bin/env python
"""`haplovl-evaluate` of this checkout: measures an exported model."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_haplovl.commands.evaluate import main

if __name__ == "__main__":
    main()
