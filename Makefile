# Two commands do everything on a machine with Python 3.11: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
export OMP_NUM_THREADS ?= 1
export MPLBACKEND ?= agg

.DEFAULT_GOAL := help
.PHONY: help demo up fleet test check notebooks lint types export readme text lab hooks lock bench clean screenshots

help:  ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is older; run: make PYTHON=/path/to/python3.11 demo")'
	$(PYTHON) -m venv $(VENV)

# The locks carry hashes. PyTorch differs by machine: its own CPU index where that can be reached, else the plain name.
define install
	$(PIP) install -q --no-deps --require-hashes -r requirements/$(1).txt
	@$(BIN)/python -c 'import torch' 2>/dev/null \
	  || $(PIP) install -q --no-deps --retries 0 --timeout 10 --index-url $(TORCH_INDEX) -r requirements/torch.txt 2>/dev/null \
	  || $(PIP) install -q -r requirements/torch.txt
	$(PIP) install -q --no-deps --no-build-isolation -e .
	@touch $@
endef

$(VENV)/.train: requirements/train.txt requirements/torch.txt setup.py settings.ini | $(BIN)/python
	@echo "Setting up $(VENV): about a minute and 2 GB, once"
	$(call install,train)

$(VENV)/.dev: requirements/dev.txt requirements/torch.txt setup.py settings.ini | $(BIN)/python
	@echo "Setting up $(VENV) with the tools of developers: about two minutes, once"
	$(call install,dev)
	@touch $(VENV)/.train

demo: $(VENV)/.train  ## Train and forecast one pair on the embedded sample, offline, and show the result
	$(BIN)/mkrich demo

up: $(VENV)/.dev  ## Everything in the browser, offline: replay exchange, schedule, API and dashboard, until Ctrl-C
	$(BIN)/mkrich up --demo

FLEET := .venv-prefect
$(FLEET)/.ready: requirements/prefect.txt requirements/s3.txt
	@echo "Setting up $(FLEET), the environment of Prefect and of the tests' S3 server: about a minute and 400 MB, once"
	$(PYTHON) -m venv $(FLEET)
	$(FLEET)/bin/python -m pip --disable-pip-version-check install -q --no-deps --require-hashes -r requirements/prefect.txt
	$(FLEET)/bin/python -m pip --disable-pip-version-check install -q --no-deps --require-hashes -r requirements/s3.txt
	@touch $@

fleet: $(FLEET)/.ready  ## The environment of Prefect, for runs on many machines (docs/fleet.md)

test: check $(FLEET)/.ready  ## Everything that CI checks: the quick gates, notebooks run, tests
	@tools/system
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(VENV)/.dev  ## The quick gates: ruff, mypy, notebooks clean, library in step, walls, readable cells, README and house in step
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/check.py

notebooks: $(VENV)/.dev  ## Run every notebook top to bottom
	$(BIN)/python -m pytest tests/test_notebooks.py --durations=10

export: $(VENV)/.dev  ## Clean the notebooks, export the library, renew README.md
	$(BIN)/ruff format -q . && $(BIN)/nbdev_clean && $(BIN)/nbdev_export && $(BIN)/python tools/readme.py && $(BIN)/python tools/house.py

text: $(VENV)/.dev  ## Notebooks as editable text in nbtxt/; tools/nb ROOM/NAME takes one back
	@for f in $$(cd nbs && find . -name '*.ipynb' -not -path '*/.*' | sed 's#^./##'); do $(BIN)/jupytext --quiet --to py:percent -o nbtxt/$${f%.ipynb}.py nbs/$$f; done

lab: $(VENV)/.dev  ## Open JupyterLab
	$(BIN)/jupyter lab nbs

bench: $(VENV)/.dev  ## The measurements: accuracy and cost beside the peers (minutes)
	$(BIN)/python bench/accuracy.py && $(BIN)/python bench/fit_cost.py

screenshots: $(VENV)/.dev  ## Pictures of the dashboard's views into docs/images (needs Chromium)
	$(BIN)/python tools/screenshots.py

hooks: $(VENV)/.dev  ## Check notebooks before each commit, merge them cell by cell (opt in)
	git config core.hooksPath .githooks
	git config merge.nbdev-merge.name "resolve notebook conflicts" && git config merge.nbdev-merge.driver "$(BIN)/nbdev_merge %O %A %B %P"

lock: $(VENV)/.dev  ## Renew requirements/*.txt from settings.ini
	$(PIP) install -q uv && tools/lock

clean:  ## Remove what the program and the tests made
	rm -rf store runs/*/ build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
