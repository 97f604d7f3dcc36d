# make demo           segment one image with the demo model: the edge install, no PyTorch
# make demo-export    convert, export, verify and segment: what needs PyTorch
# make test           all tests but those of the following targets
# make test-extended  real sizes and long runs
# make test-vllm      tests with a real vLLM engine, in an environment of its own
# make test-quantize  tests of `quantize` with llm-compressor, in an environment of its own
# make test-browser   tests of the web page in Chromium, which must be installed
# make fuzz           property tests marked `fuzz` with random examples, for at most 20 minutes
# make lint           format, lint, types, import contracts, words
# make check-extras   resolve the extras that the docs install together; reads the package index
# make check          lint and the fast tests: before every commit
# make format         format the code and fix what ruff can fix
# make demo-model     train the demo model, put it into the package, record its golden outputs
# make report         the committed benchmark reports and tables; takes hours, needs an idle machine
# make clean          remove environments and outputs
#
# Each target sets up its environment first. Variables: PYTHON, VENV, EDGE_VENV, VLLM_VENV,
# QUANTIZE_VENV.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EDGE_VENV ?= .venv-edge
EDGE_BIN := $(EDGE_VENV)/bin
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
QUANTIZE_VENV ?= .venv-quantize
QUANTIZE_BIN := $(QUANTIZE_VENV)/bin
DEMO ?= demo-output
SCENE := examples/scene.png "the largest red circle"

CHECK_PYTHON := $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'

# Compiling the bytecode of all modules takes most of pip's time; Python compiles what it imports.
PIP_INSTALL := -m pip install --quiet --no-compile

# One process per core, four at most; the crash of one ends the run.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

.PHONY: demo demo-export test test-extended test-vllm test-quantize test-browser fuzz lint check-extras check format demo-model report clean

$(VENV)/.base: pyproject.toml constraints.txt
	$(CHECK_PYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) --constraint constraints.txt --editable ".[cpu,edge,policy-export]"
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python $(PIP_INSTALL) --constraint constraints.txt --editable ".[dev]"
	# Triton's schema: one generated module; the client around it asks for other versions.
	$(BIN)/python $(PIP_INSTALL) --no-deps tritonclient==2.73.0
	touch $@

$(EDGE_VENV)/.ready: pyproject.toml constraints.txt
	$(CHECK_PYTHON)
	test -x $(EDGE_BIN)/python || $(PYTHON) -m venv $(EDGE_VENV)
	$(EDGE_BIN)/python $(PIP_INSTALL) --constraint constraints.txt --editable ".[edge]"
	touch $@

demo: $(EDGE_VENV)/.ready
	$(EDGE_BIN)/python -m coprs_deploy segment $(SCENE) --out $(DEMO)/result
	@echo
	@echo "Results: $(DEMO)/result/overlay.png, prior.png, mask.png, result.json"

# Random weights, then the trained ones of the demo model with the policy as int8 graphs.
demo-export: $(VENV)/.base
	$(BIN)/python -m coprs_deploy convert --random --out $(DEMO)/checkpoint --overwrite
	$(BIN)/python -m coprs_deploy export $(DEMO)/checkpoint --out $(DEMO)/random-bundle --overwrite
	$(BIN)/python -m coprs_deploy verify $(DEMO)/random-bundle --against $(DEMO)/checkpoint
	$(BIN)/python -m coprs_deploy export coprs_deploy/demo/checkpoint --out $(DEMO)/bundle \
		--policy-runtime openvino --overwrite
	$(BIN)/python -m coprs_deploy segment $(SCENE) --bundle $(DEMO)/bundle --out $(DEMO)/exported
	@echo
	@echo "Results: $(DEMO)/bundle, $(DEMO)/exported/overlay.png"

test: $(VENV)/.dev
	$(PYTEST) -m "not extended"

test-extended: $(VENV)/.dev
	$(PYTEST) -m extended

$(VLLM_VENV)/.packages: constraints-vllm.txt
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python $(PIP_INSTALL) "$$(grep '^torch==' constraints-vllm.txt)"
	$(VLLM_BIN)/python $(PIP_INSTALL) --no-deps --requirement constraints-vllm.txt
	touch $@

$(VLLM_VENV)/.ready: $(VLLM_VENV)/.packages pyproject.toml
	$(VLLM_BIN)/python $(PIP_INSTALL) --no-deps --editable .
	touch $@

$(QUANTIZE_VENV)/.packages: constraints-quantize.txt
	test -x $(QUANTIZE_BIN)/python || $(PYTHON) -m venv $(QUANTIZE_VENV)
	$(QUANTIZE_BIN)/python $(PIP_INSTALL) "$$(grep '^torch==' constraints-quantize.txt)"
	$(QUANTIZE_BIN)/python $(PIP_INSTALL) --no-deps --requirement constraints-quantize.txt
	touch $@

$(QUANTIZE_VENV)/.ready: $(QUANTIZE_VENV)/.packages pyproject.toml
	$(QUANTIZE_BIN)/python $(PIP_INSTALL) --no-deps --editable .
	touch $@

# PyPI's torchvision beside a CPU build of torch needs the folder `site`.
OWN_PATH := PYTHONPATH=$(CURDIR)/tests/vllm_engine/site:$(CURDIR)

test-vllm: $(VLLM_VENV)/.ready $(QUANTIZE_VENV)/.ready
	$(OWN_PATH) QUANTIZE_PYTHON=$(abspath $(QUANTIZE_BIN)/python) $(VLLM_BIN)/python -m pytest tests/vllm_engine --numprocesses 2 --dist loadscope -W default

test-quantize: $(QUANTIZE_VENV)/.ready
	$(OWN_PATH) $(QUANTIZE_BIN)/python -m pytest tests/quantize_engine -W default

$(VENV)/.browser: $(VENV)/.dev
	$(BIN)/python $(PIP_INSTALL) --constraint constraints.txt --editable ".[browser]"
	touch $@

test-browser: $(VENV)/.browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/browser

fuzz: $(VENV)/.dev
	$(PYTEST) --dist worksteal -m fuzz --hypothesis-profile fuzz

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

check-extras: $(VENV)/.dev
	$(BIN)/python .ci/check_extras.py

check: lint
	$(PYTEST) -m "not slow and not extended" --quiet

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo-model: $(VENV)/.dev
	$(BIN)/python -m coprs_deploy train demo --out runs/demo
	$(BIN)/python -m coprs_deploy train demo_truncated --out runs/demo-truncated
	$(BIN)/python training/build_demo_model.py runs/demo-truncated
	$(BIN)/python export/record_golden.py tests/golden/demo.npz

REPORTS ?= benchmarks/reports
BENCH_WORK ?= benchmark-work
BENCH := $(BIN)/python -m coprs_deploy bench --work-dir $(BENCH_WORK)

report: $(VENV)/.dev
	$(BENCH) --suite engines,answer,policy,start,scaling --tag demo --out $(REPORTS)
	$(BENCH) --suite precision --tag precision --out $(REPORTS)
	$(BENCH) --suite engines --sizes vit_b,vit_h --tag full-size --rounds 2 --out $(REPORTS) \
		--filter 'vit_b: image_encoder(?!.*compile).*(fp32|bf16|int8)|vit_h: image_encoder.*(openvino.*cpu (fp32|int8)|eager cpu (fp32|bf16)|onnxruntime.*cpu fp32|anything.*openvino.*bf16)'
	$(BENCH) --suite export --sizes vit_b,vit_h --tag full-size-export --out export/reports
	$(BIN)/python benchmarks/full_size_engines.py --out engines/records --work-dir $(BENCH_WORK)/engines
	$(BIN)/python benchmarks/update_tables.py

clean:
	rm -rf $(VENV) $(EDGE_VENV) $(VLLM_VENV) $(QUANTIZE_VENV) $(DEMO) $(BENCH_WORK) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
