"""`python -m bench report|compare`: see report.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # where the suites find one another under pytest, too

import report

if __name__ == "__main__":
    sys.exit(report.main())
