# make run    find the bigram subnetwork of the reference model, evaluate it, save the run
# make test   lint of code and imports, and the tests
# make quick  some of the tests, in less than a minute
# make lint   ruff, pyright, and the layers of the imports
# make docs   the documentation site, in docs/_build/html
# make notebooks   execute the notebooks and write them with their outputs (needs Chrome or Chromium for the pictures)
# Each makes .venv first and installs what it needs; when that is there already, this takes no time.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# an empty PYTHONDONTWRITEBYTECODE: what is compiled is kept, since each worker and each process that a test starts imports it
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
QUICK := $(addprefix tests/,storage text measures targets masking/test_apply.py models/test_models.py models/test_weights.py \
	$(addsuffix .py,test_contents test_evaluation test_names test_package test_runs test_subnetwork test_subnetwork_edits))
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run test quick lint docs notebooks

run: $(INSTALLED)
	$(BIN)/bigram-circuits find

test: $(INSTALLED)
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/lint-imports
	$(PYTEST)

quick: $(INSTALLED)
	$(PYTEST) $(QUICK)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: $(INSTALLED)
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --nitpicky docs docs/_build/html
	@echo "docs/_build/html/index.html"

notebooks: $(INSTALLED)
	$(BIN)/python notebooks/build.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	@echo "installing (about a minute; PyTorch is large)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --report .venv/installed.json \
		--editable '.[dev,docs]'
	@touch $@
