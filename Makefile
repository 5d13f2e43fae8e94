# Every target makes .venv and installs what it needs. `make demo` and `make test` are the two to know.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PORT ?= 8000
DATA_DIR ?= $(HOME)/.firebox

# Real data sets for tests that can use them; those tests skip without.
FIREBOX_TEST_DATA ?= $(abspath $(dir $(firstword $(wildcard ../*/data/text2sql_sft.jsonl))))
export FIREBOX_TEST_DATA
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false

STRICT := firebox/wire firebox/control firebox/gateway training

.PHONY: demo test check prove up bench endpoints compat docs mutations clean help

help:  ## show the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Firebox needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": run make PYTHON=python3.11")'
	@echo "Installing into .venv (once; a minute or two)..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(READY)  ## train, reward, promote and question a tiny model; about three minutes on two cores once installed
	@$(BIN)/python -m training.examples.demo

test: $(READY)  ## all tests at everyday counts, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(READY)  ## lint, format, types, import rules, sizes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(STRICT)
	$(BIN)/python -m pytest tests/policy

prove: $(READY)  ## the full counts; figures go to docs/proofs/, finished proofs are not repeated at one commit
	FIREBOX_PROVE=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m prove tests

up: $(READY)  ## start the server
	$(BIN)/firebox up --port $(PORT) --data-dir $(DATA_DIR)

bench: $(READY)  ## ratios against peers, side by side
	$(BIN)/python -m benchmarks

endpoints: $(READY)  ## every endpoint through both SDKs, plain and over a bad network, as a table
	FIREBOX_PROVE=1 $(BIN)/python -m pytest -s tests/contract/test_every_endpoint.py

compat: $(READY)  ## genuine clients of several generations; writes docs/reference/compat.md
	$(BIN)/python tests/compat

docs: $(READY)  ## write the reference pages that are made from the code
	$(BIN)/python docs/generate.py

mutations: $(READY)  ## plant twelve bugs in a copy of the sources; the tests must see each
	$(BIN)/python tests/mutations/plant_bugs.py

clean:  ## remove the environment and caches, not your data
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .import_linter_cache *.egg-info
