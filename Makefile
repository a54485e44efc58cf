# Two commands for newcomers: `make demo` and `make test`. Both install into .venv first.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test test-slow lint types

demo: $(INSTALLED)
	@$(BIN)/gossamer rl demo --overwrite

test: $(INSTALLED)
	@$(BIN)/python -m pytest

test-slow: $(INSTALLED)
	@$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

# an import hook hides the mapped packages from mypy; links show it the same tree
types: $(INSTALLED)
	@mkdir -p build/links/gossamer
	@for room in comm launch parallel trainer; do ln -sfn ../../../$$room build/links/gossamer/$$room; done
	@MYPYPATH=build/links $(BIN)/mypy --namespace-packages --explicit-package-bases -p gossamer

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "gossamer needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	@echo "installing into .venv (2 GB, a few minutes the first time)"
	@$(PYTHON) -m venv .venv || \
		{ echo "python3 cannot make a virtual environment; on Debian: apt-get install python3-venv"; exit 1; }
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
