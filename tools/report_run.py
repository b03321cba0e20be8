#!/usr/bin/env python
"""`haplovl-report` of this checkout: draws one run or several."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_haplovl.commands.report_run import main

if __name__ == "__main__":
    main()
