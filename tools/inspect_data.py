#!/usr/bin/env python
"""`haplovl-inspect` of this checkout: shows samples and numbers of preprocessed data."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_haplovl.commands.inspect_data import main

if __name__ == "__main__":
    sys.exit(main())
