"""`python -m controller.ledger`: the audit of a run's rollouts."""

import sys

from controller.ledger.audit import main

if __name__ == "__main__":
    sys.exit(main())
