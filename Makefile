# Every target sets up .venv by itself. Python 3.11 or newer is all that is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
.PHONY: demo test lint test-oldest test-slow test-gpu test-deepspeed test-sanitizers bench docs dist clean
.PHONY: gpu-ready bench-gpu test-launch test-hosts test-kills test-postgres test-browser test-kernels test-notebooks

demo: $(VENV)/installed
	$(BIN)/agr-hf demo

# Two workers, of which one that is done takes over tests of the other.
TEST := python -m pytest -n 2 --dist worksteal -m "not (slow or gpu or deepspeed or launch or hosts or kills or postgres or docs or browser or notebooks)"

test: $(VENV)/installed lint
	$(BIN)/$(TEST)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# In an environment of its own, .venv-oldest.
test-oldest:
	$(MAKE) VENV=.venv-oldest CONSTRAINTS=tests/oldest.txt .venv-oldest/installed
	.venv-oldest/bin/$(TEST)

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow

# The native step under AddressSanitizer, ThreadSanitizer and valgrind; needs gcc, its runtimes and valgrind.
test-sanitizers: $(VENV)/installed
	$(BIN)/python tests/sanitizers.py address
	$(BIN)/python tests/sanitizers.py thread
	$(BIN)/python tests/sanitizers.py memcheck

# DeepSpeed stays out of .venv: the other tests are of an environment without it. Nothing of it is compiled.
test-deepspeed: $(VENV)/installed
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(VENV)/deepspeed \
		"deepspeed>=0.19" hjson ninja py-cpuinfo msgpack einops
	PYTHONPATH=$(VENV)/deepspeed $(BIN)/python -m pytest -m deepspeed

# On a machine with a GPU, with the Python that has its torch; each writes one JSON below benchmarks/results. The extension is
# built where a compiler is there: it looks at tensors faster.
GPU_PYTHON ?= python3
GPU_NAME = $(shell $(GPU_PYTHON) -c "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '-'))")
gpu-ready:
	$(GPU_PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable . || echo "The extension was not built."

test-gpu: gpu-ready
	$(GPU_PYTHON) -m pytest tests/optim/test_cuda.py -m gpu --summary benchmarks/results/tests-$(GPU_NAME).json

bench-gpu: gpu-ready
	$(GPU_PYTHON) benchmarks/step.py --device cuda --seconds 1 --out benchmarks/results/step-$(GPU_NAME).json

# Every configuration file, each command of docs/scaling.md, deaths of ranks: some fifteen minutes on 2 cores.
test-launch: $(VENV)/installed
	$(BIN)/python -m pytest -m launch

# Two network namespaces as two hosts; as root, on Linux.
test-hosts: $(VENV)/installed
	$(BIN)/python -m pytest -m hosts

# Fifty kills at random moments.
test-kills: $(VENV)/installed
	$(BIN)/python -m pytest -m kills -s

# Comparisons that several machines share, on a PostgreSQL server of their own (Debian's package postgresql).
test-postgres: $(VENV)/installed
	$(BIN)/python -m pip install --quiet psycopg2-binary
	$(BIN)/python -m pytest -m postgres

# The app in Chromium (Debian's package chromium); screenshots go to build/screenshots.
test-browser: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[app]" playwright
	$(BIN)/python -m pytest tests/test_app.py
	$(BIN)/python -m pytest -m browser

# The folder for the Kernel Hub, loaded by the library that loads it from there.
test-kernels: $(VENV)/installed
	$(BIN)/python -m pip install --quiet kernels
	$(BIN)/python -m pytest tests/optim/test_kernel_hub.py

# Runs the notebooks in a copy; AGR_HF_KEEP_OUTPUT=1 writes their output into the files.
test-notebooks: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[notebooks]"
	$(BIN)/python -m pytest -m notebooks

# What a step costs, beside the optimizers of the other packages that the extra lists.
bench: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	$(BIN)/python benchmarks/step.py

# The site, from docs/ and the docstrings, into site/; every warning is an error. Then the pages that were written are checked.
docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	rm -rf site
	$(BIN)/python -m sphinx --builder html --nitpicky --fail-on-warning --keep-going --quiet --fresh-env \
		--doctree-dir build/doctrees docs site
	$(BIN)/python -m pytest tests/test_docs.py -m docs
	@echo "The site is in site/: open site/index.html."

# What a release uploads, as far as this machine builds it.
dist: $(VENV)/installed
	$(BIN)/python -m pip install --quiet build twine
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

# Installed again whenever the requirements change. The stamp is written last: an interrupted installation is resumed.
$(VENV)/installed: pyproject.toml $(wildcard agr_hf/optim/backends/*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "agr_hf needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
		"name another one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing agr_hf with torch and what its tests need: about 6 GB, some minutes"
	$(BIN)/python -m pip install --quiet --editable ".[test]" $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest build dist site *.egg-info demo-output
