# `make demo` and `make test` set up .venv themselves; PYTHON=python3.12 chooses another Python for it.
PYTHON ?= python3
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help venv test test-lowest demo docs quality style clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP) ## create .venv and install the pinned releases

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hf_gnp needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	@touch $@

# PATH: DeepSpeed looks there for ninja, to compile its CPU collectives.
test: $(STAMP) ## run the whole test suite (PYTEST_ARGS="-x tests/step/test_identity.py" for a part)
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

LOWEST := PATH="$(CURDIR)/.venv-lowest/bin:$$PATH" OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest

test-lowest: ## run the tests of one process and a case of each engine with the lowest releases promised
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install -c constraints-lowest.txt -e ".[deepspeed,sharpness]" bitsandbytes peft \
		pytest pytest-xdist psutil scikit-learn tensorboard optuna sentence-transformers trl
	$(LOWEST) --ignore tests/engines --ignore tests/clients --ignore tests/gpu \
		--ignore-glob "tests/sharpness/*_on_engines.py"
	$(LOWEST) "tests/engines/test_matrix.py::test_three_ranks[ddp zero1 zero2 zero3 zero2-offload]"

demo: $(STAMP) ## train a small ViT on digits with wrong labels, with and without the penalty (four minutes)
	$(BIN)/python examples/demo.py

docs: $(STAMP) ## build the documentation into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

quality: $(STAMP) ## check lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(STAMP) ## fix lint and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv, builds and caches
	rm -rf .venv .venv-lowest build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
