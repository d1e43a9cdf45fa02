# `make demo` and `make test` are all that a visitor needs; CONTRIBUTING.md lists the targets for developers.
# Each makes .venv on first use and reuses it afterwards.
PYTHON ?= python3
PYTHON_LOWEST ?= python3.10
PYTHON_NEWEST ?= python3.13
BIN := .venv/bin
READY := .venv/.ready

# The kernels run in Triton's interpreter where there is no GPU. One thread a process: the processes share the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo compare test style types imports sass unit quick test-all test-floors bench docs hub clean \
	floor-lowest floor-newest floor-blocks floor-trainer

demo: $(READY)
	$(BIN)/fastguard demo

# Every objective on the digits; about a quarter of an hour on two cores. Ctrl-C leaves a page, and the same resumes.
compare: $(READY)
	$(BIN)/fastguard compare digits --seeds 5 --run.epochs 12 --run.save-every 12 --run.images-every 0

test: style types imports sass unit

style: $(READY)
	@echo "== style: ruff"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	@echo "== types: mypy"
	$(BIN)/mypy

imports: $(READY)
	@echo "== imports go one way: import-linter"
	$(BIN)/lint-imports

sass: $(READY)
	@echo "== machine code for H100: no spills, wide accesses (compiled here, no GPU needed)"
	$(BIN)/python benchmarks/h100_code.py --faults-only

unit: $(READY)
	@echo "== tests: pytest"
	$(PYTEST)

quick: $(READY)
	@echo "== the short tests: pytest"
	$(PYTEST) -m 'not slow and not long'

test-all: test
	@echo "== tests of minutes"
	$(BIN)/python -m pytest -m slow

# The tests with the lowest versions that the package takes, and those of the core with the newest, each without what it
# does not need. numpy is for Triton's interpreter; up to triton 3.6 that wants it below 2.4. The four environments take
# 22 GB, most of it CUDA.
FLOORS := build/floors
FLOOR_NAMES := lowest newest blocks trainer
TOOLS := hypothesis pytest pytest-xdist
CORE := tests/loss tests/ops tests/test_sde.py tests/test_step.py
$(FLOORS)/lowest/.ready: PYTHON_HERE = $(PYTHON_LOWEST)
$(FLOORS)/lowest/.ready: VERSIONS = torch==2.6.0 triton==3.2.0 numpy
floor-lowest: TESTED = $(CORE)
$(FLOORS)/newest/.ready: PYTHON_HERE = $(PYTHON_NEWEST)
$(FLOORS)/newest/.ready: VERSIONS = --upgrade torch triton numpy
floor-newest: TESTED = $(CORE)
# Quantized weights need the trainer's versions. Helpers of these tests import parts of the trainer.
$(FLOORS)/blocks/.ready: PYTHON_HERE = $(PYTHON)
$(FLOORS)/blocks/.ready: VERSIONS = torch==2.9.0 triton==3.5.0 diffusers==0.42.0 peft==0.20.0 \
	accelerate jinja2 matplotlib 'numpy<2.4' pydantic requests scipy tqdm transformers tyro
floor-blocks: TESTED = tests/blocks -k 'not quantized'
$(FLOORS)/trainer/.ready: PYTHON_HERE = $(PYTHON)
$(FLOORS)/trainer/.ready: VERSIONS = '.[lowbit,demo,bench]' torch==2.11.0 triton==3.6.0 diffusers==0.42.0 peft==0.20.0 \
	accelerate==1.10.0 pydantic==2.12.0 requests==2.32.5 urllib3==2.0.2 transformers==5.17.0 bitsandbytes==0.46.0 \
	torchao==0.18.0 'numpy<2.4' psutil
floor-trainer: TESTED = -m 'not slow and not long'

test-floors: $(FLOOR_NAMES:%=floor-%)

$(FLOOR_NAMES:%=floor-%): floor-%: $(FLOORS)/%/.ready
	@echo "== tests with $$($(FLOORS)/$*/bin/python --version)" \
		$$($(FLOORS)/$*/bin/python -m pip freeze | grep -E '^(torch|triton)==')
	OMP_NUM_THREADS=1 $(FLOORS)/$*/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile $(TESTED)

$(FLOORS)/%/.ready: pyproject.toml setup.py
	@echo "== making $(@D) with $(PYTHON_HERE)"
	@$(PYTHON_HERE) -m venv $(@D)
	@$(@D)/bin/python -m pip install --disable-pip-version-check --quiet $(TOOLS) $(VERSIONS)
	@$(@D)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --editable .
	@touch $@

bench: $(READY)
	$(BIN)/python -m pytest benchmarks/bench_loss.py benchmarks/bench_blocks.py

# Needs no network. The site is in build/site; nothing of it is committed.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "wrote build/site/index.html"

# The kernel for Hugging Face's hub, as a folder that their package `kernels` loads. Nothing of it is committed.
hub: $(READY)
	$(BIN)/python hub/build.py

$(READY): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "the trainer and the tests need Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "== making .venv and installing the pinned versions of constraints.txt (a few minutes, once)"
	@test -d .venv || $(PYTHON) -m venv .venv || { \
		rm -rf .venv; echo "python -m venv failed: on Debian and Ubuntu, apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info
