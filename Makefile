# One command each: `make demo` shows the main job, `make test` runs the whole suite,
# `make check` runs format, lint, types, import contracts and the fast tests.
# Each sets up its own environment first; PYTHON and VENV may be given.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo-output

.PHONY: demo test check format shipped report clean

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[cpu]"
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/.base
	$(BIN)/python -m coprs_deploy.cli.main export coprs_deploy/shipped/checkpoint --out $(DEMO)/bundle --overwrite
	$(BIN)/python -m coprs_deploy.cli.main segment examples/scene.png "the largest red circle" \
		--bundle $(DEMO)/bundle --out $(DEMO)/answer
	@echo
	@echo "Look at $(DEMO)/answer/overlay.png, prior.png, mask.png and result.json."

test: $(VENV)/.dev
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -m "not slow" --quiet

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

shipped: $(VENV)/.dev
	$(BIN)/python -m coprs_deploy.cli.main train shipped --out runs/shipped
	$(BIN)/python -m coprs_deploy.training.shipping runs/shipped

report: $(VENV)/.base
	$(BIN)/python -m coprs_deploy.cli.main bench --suite full-size-export --out docs/reports

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
