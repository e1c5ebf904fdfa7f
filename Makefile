# Sets up a private environment, step by step: each leaves a stamp when it is done, so a second run
# skips it and a run after a failure goes on where the last one stopped.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
DEMO ?= output/demo
DEMO_OPTS ?=

# The official v0.6 sources of Detectron2 as PyPI has them.
REQUIREMENT := pb1-detectron2==0.6 \
  --hash=sha256:5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29

fail = { echo "make: $(1)" >&2; exit 1; }

# PyTorch takes the folder above that of nvcc for CUDA's, which is wrong where nvcc is a wrapper.
ifneq ($(shell command -v nvcc),)
export CUDA_HOME ?= $(realpath $(shell nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$$ TOP=//p'))
endif

.PHONY: help setup demo test lint cuda emulator-asan
help:
	@echo "make setup   a private environment in $(VENV), with PyTorch and Detectron2"
	@echo "make demo    train on the embedded data set, evaluate, draw the detections"
	@echo "make test    run the tests; with DETECTRON2=FOLDER, on a checkout of Detectron2"
	@echo "make emulator-asan  the CUDA kernels on an emulated GPU that checks every access"
	@echo "make cuda    compile the CUDA kernels, also where there is no GPU"
	@echo "make lint    check style and types"

setup: $(VENV)/.package

$(VENV)/.python:
	@command -v $(PYTHON) > /dev/null || $(call fail,found no $(PYTHON): install Python 3.10 or \
	newer$(comma) or name one with PYTHON=...)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || $(call fail,$(PYTHON) is \
	too old: Python 3.10 or newer is needed$(comma) name one with PYTHON=...)
	@$(PYTHON) -c 'import ensurepip' 2> /dev/null || $(call fail,$(PYTHON) cannot make virtual \
	environments: install its venv module (Debian: apt install python3-venv))
	@command -v c++ > /dev/null || $(call fail,found no C++ compiler: install one (Debian: apt \
	install g++))
	@$(PYTHON) -m venv --clear $(VENV) || $(call fail,could not make the environment $(VENV))
	@touch $@

$(VENV)/.requirements: requirements.txt | $(VENV)/.python
	@{ $(PIP) install $$(grep -E '^(pip|setuptools)==' requirements.txt) && $(PIP) install -r \
	requirements.txt; } || $(call fail,could not install requirements.txt: check \
	the network connection and run make again)
	@touch $@

# A Detectron2 that was installed there before is used as it is.
IS_THERE := import importlib.metadata as m, sys; \
  sys.exit(not {"detectron2", "pb1-detectron2"} & {d.name for d in m.distributions()})

$(VENV)/.detectron2: $(VENV)/.requirements
	@$(PY) -c '$(IS_THERE)' || $(MAKE) --no-print-directory detectron2
	@touch $@

# Without its compiled ops, whose sources PyPI does not have: a wheel of the Python sources.
.PHONY: detectron2
detectron2: SRC := $(VENV)/detectron2
detectron2:
	@rm -rf $(SRC) && mkdir -p $(SRC)
	@echo '$(REQUIREMENT)' > $(SRC)/requirement.txt
	@$(PIP) download --no-deps --no-build-isolation --no-binary :all: --dest $(SRC) \
	-r $(SRC)/requirement.txt || $(call fail,could not download Detectron2: check the network \
	connection and run make again)
	@python=$$(cd $(VENV)/bin && pwd)/python; cd $(SRC) && { tar xzf *.tar.gz --strip-components 1 \
	&& mv detectron2/model_zoo/configs . && "$$python" setup.py build_py bdist_wheel --skip-build; \
	} > build.log 2>&1 || $(call fail,could not build Detectron2: see $(SRC)/build.log)
	@$(PIP) install --force-reinstall --no-deps $(SRC)/dist/*.whl \
	|| $(call fail,could not install Detectron2: run make again)

# With the C++ operators, and those for CUDA where there are nvcc and a GPU or FORCE_CUDA=1.
CSRC := $(wildcard projects/FreeAnchor/freeanchor/layers/csrc/*.* projects/FreeAnchor/freeanchor/layers/csrc/*/*)
$(VENV)/.package: $(VENV)/.detectron2 setup.cfg setup.py pyproject.toml $(CSRC)
	@$(PIP) install --no-deps --no-build-isolation -e . || $(call fail,could not install freeanchor)
	@touch $@

# Elsewhere than where the package is, which keeps what setup has built.
cuda: setup
	@FORCE_CUDA=1 $(PY) setup.py -q build_ext --build-temp build/cuda/temp --build-lib build/cuda \
	|| $(call fail,could not compile the CUDA kernels)
	@$(PY) -c 'import glob, torch; torch.ops.load_library(*glob.glob("build/cuda/freeanchor/layers/_C*"))'

demo: setup
	@$(PY) -m freeanchor shapes $(DEMO)/data
	@rm -f $(addprefix $(DEMO)/,last_checkpoint metrics.json model_*.pth inference/results.json)
	@$(PY) train_net.py --config-file configs/quick/free_anchor_R_18_FPN.yaml \
	--dataset shapes_train $(DEMO)/data/train.json $(DEMO)/data/images \
	--dataset shapes_val $(DEMO)/data/val.json $(DEMO)/data/images \
	DATASETS.TRAIN "('shapes_train',)" DATASETS.TEST "('shapes_val',)" \
	INPUT.MIN_SIZE_TRAIN "(256,)" INPUT.MIN_SIZE_TEST 256 \
	SOLVER.MAX_ITER 400 SOLVER.AMP.ENABLED True OUTPUT_DIR $(DEMO) $(DEMO_OPTS)
	@$(PY) -m freeanchor visualize $(DEMO) \
	--dataset shapes_val $(DEMO)/data/val.json $(DEMO)/data/images

# DETECTRON2=FOLDER tests with the Python sources of a checkout, and its configs where its setup.py
# has them. Its anchors warn in torch.meshgrid.
ifdef DETECTRON2
CHECKOUT := $(abspath build/detectron2)
export PYTHONPATH := $(CHECKOUT)
export PYTEST_ADDOPTS := -W ignore:torch.meshgrid:UserWarning
endif

.PHONY: checkout
checkout:
ifdef DETECTRON2
	@rm -rf $(CHECKOUT) && mkdir -p $(CHECKOUT) && cp -R $(DETECTRON2)/detectron2 $(CHECKOUT) \
	&& rm -rf $(CHECKOUT)/detectron2/model_zoo/configs \
	&& cp -R $(DETECTRON2)/configs $(CHECKOUT)/detectron2/model_zoo/configs \
	|| $(call fail,$(DETECTRON2) is no checkout of Detectron2)
endif

test: setup checkout
	@$(PY) -m pytest
	@PYTHONPATH=tests$${PYTHONPATH:+:$$PYTHONPATH} $(PY) -m pytest -p reference tests/layers tests/modeling/test_meta_arch.py
	@PYTHONPATH=tests$${PYTHONPATH:+:$$PYTHONPATH} $(PY) -m pytest -p emulated tests/layers tests/emulator

# The kernels of CUDA on the emulated GPU, with every access of memory checked.
emulator-asan: setup
	@PYTHONPATH=tests$${PYTHONPATH:+:$$PYTHONPATH} EMULATOR_MODE=address ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so.6)" \
	$(PY) -m pytest -p emulated tests/layers/test_kernels.py tests/layers/test_refusals.py

lint: setup
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@$(PY) -m mypy

comma := ,
