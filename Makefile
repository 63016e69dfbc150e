# The two commands that a new user needs are `make demo` and `make test`; both create the environment when it is missing.
PYTHON ?= python3.11
PY := .venv/bin/python
# Overrides for the runs: make study-quick ARGS="hydra/launcher=joblib hydra.launcher.n_jobs=2"
ARGS ?=
# Where studies/five_reasons/conf/arm comes from: a tuning that was run here, and for arms that it has not the one of the study in docs.
TUNING := --tuning runs/five_reasons_tuning docs/results/study.json
# A study that is run in pieces: no seed is begun that would take longer. What it leaves in docs/results is to be committed.
MINUTES ?= 100
MISSING = $(PY) -m studies.five_reasons.run_missing --minutes $(MINUTES) $(ARGS)
# Most of the tests' time is the start of processes, which uses one core: two files at a time, each with its own cores.
TWO := -n 2 --dist loadfile --no-loadscope-reorder
# Processes of tests by the hundred import these. What is compiled they read, even where PYTHONDONTWRITEBYTECODE is set.
COMPILE := $(PY) -m compileall -q -j 2 actors common contracts controller learner reward_service studies submission hydra_plugins \
	tests train.py submit.py
# A shell keeps Ctrl-C from what it starts in the background.
HEARS_CTRL_C := env --default-signal=INT
# The tests that $(1) chooses, and beside them lint, which takes the time that they leave; what it says comes after them.
define with_lint
	$(COMPILE)
	@said=$$(mktemp); trap 'rm -f $$said' EXIT; \
	$(HEARS_CTRL_C) nice -n 19 $(MAKE) --no-print-directory lint >$$said 2>&1 & lint=$$!; \
	$(HEARS_CTRL_C) $(PY) -m pytest $(TWO) -m "$(1)" & tests=$$!; \
	trap 'wait $$tests; exit 130' INT; trap 'kill $$tests; wait $$tests; exit 143' TERM; \
	wait $$tests; tested=$$?; wait $$lint; linted=$$?; cat $$said; test $$tested -eq 0 || exit $$tested; exit $$linted
endef

.PHONY: help setup demo demo-long demo-verify study-quick study study-tuning study-second study-second-tuning study-products \
	study-products-tuning test test-unit test-full test-chaos test-nodes test-fuzz lint bench lock clean
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/'

setup: .venv/.ready ## create .venv and fetch the demos' model and data (done by the other targets when needed)
.venv/.ready: pyproject.toml deploy/setup_env.py controller/data/demo_assets.py
	$(PYTHON) deploy/setup_env.py --extra $$(cat .venv/.ready 2>/dev/null || echo cpu)

demo: setup ## SFT, reward models, PPO and evaluation on real data, on two cores
	$(PY) train.py $(ARGS)

demo-long: setup ## the same road with a larger budget
	$(PY) train.py +experiment=demo_long $(ARGS)

demo-verify: setup ## GRPO on verifiable sums: no SFT, no reward model
	$(PY) train.py +experiment=verify $(ARGS)

study-quick: setup ## the study of docs/study.md with one seed: 12 arms
	-$(PY) train.py -m +experiment=five_reasons_quick $(ARGS)
	$(PY) -m controller.study.negation runs/five_reasons_quick
	$(PY) -m controller.study runs/five_reasons_quick $(TUNING)

study: setup ## the whole study: 15 arms, 3 seeds, some hours; started again it goes on
	-$(PY) train.py -m +experiment=five_reasons $(ARGS)
	$(PY) -m controller.study.negation runs/five_reasons
	$(PY) -m controller.study runs/five_reasons $(TUNING)

study-tuning: setup ## before it: the same four settings for every arm
	-$(PY) train.py -m +experiment=five_reasons_tuning $(ARGS)
	$(PY) train.py -m +experiment=five_reasons_tuning_rank $(ARGS)

study-second-tuning: setup ## what is missing of the second study's tuning, in MINUTES
	$(MISSING) five_reasons_2_tuning_rates five_reasons_2_tuning_filtered five_reasons_2_tuning_rank five_reasons_2_tuning_base \
		five_reasons_2_tuning_combined five_reasons_2_tuning_turns
	$(PY) -m studies.five_reasons.tuning docs/results/five_reasons_2_tuning

study-second: setup ## what is missing of the second study, in MINUTES; on another machine it goes on
	$(MISSING) five_reasons_2
	-$(PY) -m controller.study.negation runs/five_reasons_2 --into docs/results/five_reasons_2
	$(PY) -m controller.study docs/results/five_reasons_2 --tuning docs/results/five_reasons_2_tuning docs/results/study.json

study-products-tuning: setup ## the tuning of its replication on product reviews
	$(MISSING) five_reasons_products_tuning
	$(PY) -m studies.five_reasons.tuning docs/results/five_reasons_products_tuning

study-products: setup ## the replication on product reviews, in MINUTES
	$(MISSING) five_reasons_products
	-$(PY) -m controller.study.negation runs/five_reasons_products --into docs/results/five_reasons_products
	$(PY) -m controller.study docs/results/five_reasons_products

lint: setup ## style, format, types, import direction
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	MYPYPATH=benchmarks .venv/bin/mypy benchmarks
	.venv/bin/lint-imports

test-unit: setup ## the tests that start no engine
	$(COMPILE)
	$(PY) -m pytest $(TWO) tests/unit

test: setup ## everything CI runs, about 25 minutes on two cores
	$(call with_lint,not gpu and not full and not chaos and not nodes and not fuzz)

test-full: setup ## the longer proofs too
	$(call with_lint,not gpu and not chaos and not nodes and not fuzz)

test-chaos: setup ## kill and stop the processes of whole runs, then 15 minutes of it at random
	$(COMPILE)
	$(PY) -m pytest -m chaos --soak-minutes 15

test-nodes: setup ## runs on several machines, which are namespaces of this one (needs root), their faults, and 15 minutes of them at random
	$(COMPILE)
	$(PY) -m pytest -m nodes --soak-minutes 15

test-fuzz: setup ## 10,000 requests of all kinds to the reward service, and what others may write into files
	$(COMPILE)
	$(PY) -m pytest -m fuzz

bench: setup ## all benchmarks, for hours, against the committed results; ARGS=--quick: those of a few minutes
	$(PY) benchmarks/run_all.py $(ARGS)

lock: setup ## write the versions that .venv holds into pyproject.toml
	$(PY) deploy/setup_env.py --write-lock

clean: ## remove the environment, the cache and the runs
	rm -rf .venv .cache runs
