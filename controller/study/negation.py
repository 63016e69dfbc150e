"""`python -m controller.study.negation`: the negation test of the study."""

import runpy

runpy.run_module("studies.five_reasons.negation", run_name="__main__", alter_sys=True)
