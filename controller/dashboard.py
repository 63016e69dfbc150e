"""`python -m controller.dashboard`: the curated wandb workspace."""

import sys

from controller.report.wandb_workspace import main

if __name__ == "__main__":
    sys.exit(main())
