#!/usr/bin/env python
"""`haplovl-verify` of this checkout: compares preprocessed data with its checksums."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_haplovl.commands.verify import main

if __name__ == "__main__":
    sys.exit(main())
