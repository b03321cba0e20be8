#!/usr/bin/env python
"""`haplovl-merge` of this checkout: joins preprocessed prefixes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_haplovl.commands.merge import main

if __name__ == "__main__":
    sys.exit(main())
