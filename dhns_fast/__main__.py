"""`python -m dhns_fast` is the command line `dhns-fast`."""

import sys

from dhns_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
