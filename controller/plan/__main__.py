"""`python -m controller.plan`: what every process of a job will hold."""

import os
import sys

from common.processes.process_env import driver_env

os.environ.update({key: value for key, value in driver_env().items() if key not in os.environ})

from controller.plan.show import main

if __name__ == "__main__":
    sys.exit(main())
