"""``python -m proxy``, equivalent to ``pg-background-proxy``."""

import sys

from proxy.cli import main

if __name__ == "__main__":
    sys.exit(main())
