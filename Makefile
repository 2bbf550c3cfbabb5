# make demo: set up, compile flux2-nano, generate four images.   make test: set up, run the tests.

PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.done
SETUP_TESTS := .venv/.done-tests
# PIP_CONSTRAINT also reaches the build environments of packages, which -c does not.
# Modules are compiled when they are first imported (--no-compile): compiling all of them takes more time than most save.
PIP_INSTALL := PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: setup setup-tests demo test campaign lint check clean

setup: $(SETUP)

$(SETUP): pyproject.toml runtime/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("fluxc needs Python 3.11 or later, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@echo "Installing fluxc, fluxrt and what they need into .venv; torch is the largest download."
	@$(PYTHON) -m venv .venv
	@$(PIP_INSTALL) -e ./runtime -e .
	@touch $(SETUP)

# The witnesses of the tests stay out of the way of `make demo`: diffusers imports torchao wherever it is, with warnings.
setup-tests: $(SETUP_TESTS)

$(SETUP_TESTS): $(SETUP)
	@$(PIP_INSTALL) -e ./runtime -e ".[test,lint]"
	@touch $(SETUP_TESTS)

demo: setup
	$(BIN)/fluxc build recipes/flux2-nano.yaml
	$(BIN)/fluxrt generate artifacts/flux2-nano-nvfp4 --seed 7 --out artifacts/demo.png \
	  --prompt "a large red circle at the left on a white background" \
	  --prompt "a small yellow triangle at the top right on a blue background" \
	  --prompt "a large green cross at the center on a black background" \
	  --prompt "a small white ring at the bottom left on a purple background"
	@echo
	@echo "Look at"
	@echo "  artifacts/demo-0.png to demo-3.png                  the four images"
	@echo "  artifacts/flux2-nano-nvfp4/report/index.html        how close the compiled model is to the original"
	@echo "  artifacts/flux2-nano-nvfp4/README.md                what the bundle is and how to run it"
	@echo
	@echo "Go on"
	@echo "  . .venv/bin/activate                                puts fluxc and fluxrt on the PATH of this shell"
	@echo "  fluxc plan recipes/flux2-nano.yaml                  what a build does, layer by layer"
	@echo "  fluxc doctor                                        what this machine can build and run"
	@echo "  docs/quickstart-gpu.md                              a real model on a GPU machine"

test: setup-tests
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=25

campaign: setup-tests
	PYTHONPATH=tests $(BIN)/python -m campaign --out artifacts/campaign

lint: setup-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --strict --allow-subclassing-any runtime/fluxrt
	$(BIN)/lint-imports

check: lint test

clean:
	rm -rf artifacts/flux2-nano-nvfp4 artifacts/.fluxc artifacts/demo-*.png
