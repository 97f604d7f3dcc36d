# One command each: `make demo` shows the main job, `make test` runs the whole suite,
# `make check` runs format, lint, types, import contracts and the fast tests.
# `make test-vllm` runs the tests that need vLLM, in an environment beside the other.
# Each sets up its own environment first; PYTHON, VENV and VLLM_VENV may be given.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
DEMO ?= demo-output

# Test files side by side, a core each, on four at most; a crash of one ends the run.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --max-worker-restart 0

.PHONY: demo test test-vllm lint check format demo-model report clean

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[cpu]"
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/.base
	$(BIN)/python -m coprs_deploy.cli.main export coprs_deploy/demo/checkpoint --out $(DEMO)/bundle --overwrite
	$(BIN)/python -m coprs_deploy.cli.main segment examples/scene.png "the largest red circle" \
		--bundle $(DEMO)/bundle --out $(DEMO)/answer
	@echo
	@echo "Look at $(DEMO)/answer/overlay.png, prior.png, mask.png and result.json."

test: $(VENV)/.dev
	$(PYTEST)

$(VLLM_VENV)/.ready: pyproject.toml constraints-vllm.txt
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints-vllm.txt)"
	$(VLLM_BIN)/python -m pip install --quiet --no-deps --requirement constraints-vllm.txt
	$(VLLM_BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

test-vllm: $(VLLM_VENV)/.ready
	PYTHONPATH=$(CURDIR)/tests/vllm_engine/site $(VLLM_BIN)/python -m pytest tests/vllm_engine -W default

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint
	$(PYTEST) -m "not slow" --quiet

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo-model: $(VENV)/.dev
	$(BIN)/python -m coprs_deploy train demo --out runs/demo
	$(BIN)/python training/build_demo_model.py runs/demo
	$(BIN)/python export/record_golden.py tests/golden/demo.npz

# Measures on this machine, which should have nothing else to do.
REPORTS ?= docs/reports/benchmarks
BENCH_WORK ?= benchmark-work
BENCH := $(BIN)/python -m coprs_deploy.cli.main bench --work $(BENCH_WORK) --out $(REPORTS)

report: $(VENV)/.dev
	$(BENCH) --suite engines,answer,policy,start,scaling,export --theme shipped
	$(BENCH) --suite precision --theme precision
	$(BENCH) --suite engines --full --sizes vit_b,vit_h --theme full-size --rounds 2 \
		--only 'vit_b: image_encoder(?!.*compile).*(fp32|bf16|int8)|vit_h: image_encoder.*(openvino.*cpu (fp32|int8)|eager cpu (fp32|bf16)|onnxruntime.*cpu fp32|anything.*openvino.*bf16)'
	$(BIN)/python -m coprs_deploy.cli.main bench --suite full-size-export --out docs/reports
	$(BIN)/python -m coprs_deploy.benchmarks.full_size_engines --out docs/reports --work $(BENCH_WORK)/engines
	$(BIN)/python -m coprs_deploy.benchmarks.committed

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(DEMO) $(BENCH_WORK) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
