"""`python -m controller.study`: the page of the study."""

import runpy

runpy.run_module("studies.five_reasons", run_name="__main__")
