#!/usr/bin/env python
"""`haplovl-generate` of this checkout: asks an exported model one question."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_haplovl.commands.generate import main

if __name__ == "__main__":
    main()
