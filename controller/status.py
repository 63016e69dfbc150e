"""`python -m controller.status`: where a run stands."""

import sys

from controller.report.status import main

if __name__ == "__main__":
    sys.exit(main())
