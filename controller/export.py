"""`python -m controller.export`: a plain checkpoint from a commit."""

import sys

from controller.commits.export import main

if __name__ == "__main__":
    sys.exit(main())
