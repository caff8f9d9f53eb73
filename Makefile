# The tasks of this project; a laptop and CI run the same ones. `make` alone lists them.
PYTHON ?= python3
BIN := .venv/bin
SOURCE ?=
SOAK_MINUTES ?= 10

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-ops test-containers faults lint export verify serve bench loadtest soak gpu-check api clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

demo: $(BIN)/installed ## export, serve on real Triton, tell the voices of samples/ apart
	@$(BIN)/python -m examples.demo

# The fault tests have the machine to themselves: they hold many requests in flight.
test: $(BIN)/installed lint ## lint, types and tests, the served ones against a real tritonserver
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --ignore=tests/faults --ignore=tests/engine -m "not slow"
	$(BIN)/python -m pytest tests/faults -m "not slow"

test-slow: $(BIN)/installed ## what `make test` leaves out: exports by README's commands, pip resolving what images install
	$(BIN)/python -m pytest --ignore=tests/engine -m slow

test-containers: $(BIN)/installed ## the compose files in a real Docker engine, on the pinned base images or on stand-ins
	$(BIN)/python -m pytest tests/engine

test-ops: $(BIN)/installed ## containers, monitoring, Kubernetes, several servers, TLS and keys alone
	$(BIN)/python -m pytest $(addprefix tests/test_,$(addsuffix .py,compose monitoring kubernetes balancing security))

faults: $(BIN)/installed ## the fault tests alone: hostile requests, overload, kills; counts what came of every reply
	$(BIN)/python -m pytest tests/faults

lint: $(BIN)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

export: $(BIN)/installed ## the model into model_repository/ (SOURCE=mini, a folder or a hub id)
	$(BIN)/python -m export $(if $(SOURCE),--source $(SOURCE))

verify: $(BIN)/installed ## the exported model against SpeechBrain once more
	$(BIN)/python -m export verify

serve: $(BIN)/installed ## Triton on 127.0.0.1, ports 8000 (HTTP), 8001 (gRPC), 8002 (metrics)
	$(BIN)/python -m server

bench: $(BIN)/installed ## the model in process on the CPU, against SpeechBrain: agreement, speed
	$(BIN)/python -m loadtest bench $(if $(SOURCE),--source $(SOURCE))

loadtest: $(BIN)/installed ## servers under load, CPU and GPU, the packed model and SpeechBrain: a report in loadtest/results/ (SOURCE=random)
	$(BIN)/python -m loadtest run --local cpu --local gpu $(if $(SOURCE),--source $(SOURCE))

soak: $(BIN)/installed ## a minute of damaged audio files, then the server under mixed and hostile load for SOAK_MINUTES (10)
	$(BIN)/python -m tests.fuzz_audio --seconds 60
	$(BIN)/python -m loadtest soak --minutes $(SOAK_MINUTES) $(if $(SOURCE),--source $(SOURCE)) \
		--json build/soak.json --plot build/soak.png

gpu-check: $(BIN)/installed ## all that needs a GPU, measured on this host's, into loadtest/results/
	$(BIN)/python -m loadtest bench --device gpu --json loadtest/results/$$(date +%F)-gpu-model.json $(if $(SOURCE),--source $(SOURCE))
	$(BIN)/python -m loadtest run --local gpu $(if $(SOURCE),--source $(SOURCE))

api: $(BIN)/installed ## the client's reference from its docstrings: build/api/index.html
	@$(BIN)/python -W error docs/api.py build/api && echo build/api/index.html

clean: ## remove the environment and the exported models
	rm -rf .venv model_repository/*/1/model.*

# One environment for everything; made again when what it installs changes.
$(BIN)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' || \
		{ echo "$$($(PYTHON) --version) found, Python 3.10 to 3.12 is needed: make PYTHON=python3.11 ..." >&2; exit 2; }
	@echo "install into .venv (some minutes the first time) ..."
	@begun=$$(date +%s) && $(PYTHON) -m venv .venv && \
		$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[export,server,loadtest,bulk,evaluate,ray,dev]' && \
		echo "install into .venv: $$(($$(date +%s) - begun)) s"
	@touch $@
