# `make demo` and `make test` are all that a newcomer needs; both make .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := $(VENV)/oldest
LEROBOT := $(VENV)/lerobot
# LeRobot 0.6 needs Python 3.12.
PYTHON312 ?= python3.12
# pip asks nobody and prints its errors only.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo demo-loop policy simulator test test-simulator test-slow test-lerobot test-ray lint docs commands package oldest conformance test-gpu bench-gpu clean

# Predictions of the small policy over a recorded episode, as a picture.
demo: $(VENV)/demo-installed
	$(BIN)/vla-adapter demo --output outputs/demo.png

# An episode in the LIBERO simulator: 2 GB, and two system libraries, which the command names if they are missing.
demo-loop: $(VENV)/demo-installed $(VENV)/simulator-installed
	$(BIN)/vla-adapter demo --loop --output outputs/demo.png

# The policy that ships with this package, from nothing, in some hours: see examples/libero_object. `make policy ARGS=--embed`
# puts it and its scores where those that ship are.
policy: $(VENV)/demo-installed $(VENV)/simulator-installed
	$(BIN)/python examples/libero_object/make_policy.py --output outputs/libero_object $(ARGS)

# The simulator in .venv.
simulator: $(VENV)/simulator-installed

# Two workers, each with one thread of torch (tests/conftest.py).
test: $(VENV)/test-installed lint
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# Episodes, recordings and placements in the LIBERO simulator.
test-simulator: $(VENV)/test-installed $(VENV)/simulator-installed
	$(BIN)/python -m pytest -m "simulator and not slow" --numprocesses 2 --dist worksteal

# What takes too long for `make test`, such as the findings of `vla-adapter check` on many simulated recordings. Tests that need
# a simulator run where `make simulator` has been called.
test-slow: $(VENV)/test-installed
	$(BIN)/python -m pytest -m slow --numprocesses 2 --dist worksteal

# The plugin with LeRobot itself, in an environment of its own with Python 3.12 and a PyTorch with CUDA libraries, which runs on
# the CPU: 8 GB on disk. Installing takes 3.4 minutes of processor time, the tests 2.3 minutes.
test-lerobot: $(LEROBOT)/installed
	$(LEROBOT)/bin/python -m pytest lerobot_policy_vla_adapter

# Evaluations and recordings on a Ray cluster of two nodes on this machine.
test-ray: $(VENV)/ray-installed
	RAY_raylet_start_wait_time_s=200 $(BIN)/python -m pytest tests/test_simulation_ray.py

# What needs a GPU, on as many as there are.
test-gpu: $(VENV)/test-installed
	$(BIN)/python -m pytest -m gpu

# A GPU's predictions at the published size, in outputs/bench_gpu.json and .md: under ten minutes, see docs/speed.md.
bench-gpu: $(VENV)/test-installed
	$(BIN)/vla-adapter bench --gpu --output outputs/bench_gpu.json

lint: $(VENV)/test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The documentation as a site in docs/_build/html. A warning, such as a link that leads nowhere, is an error. The reference
# imports every module, so the tests' requirements are needed too.
docs: $(VENV)/docs-installed
	$(BIN)/python -m sphinx --builder html --fail-on-warning --keep-going --quiet docs docs/_build/html

# The notebooks, and the commands of README and documentation that need no network and no simulator.
commands: $(VENV)/test-installed
	$(BIN)/python -m pytest -m slow tests/test_documentation.py tests/test_examples.py

# sdist and wheel in dist/. The tests install the wheel into an empty environment, run its demo and check its types.
package: $(VENV)/test-installed
	rm -rf build dist
	$(BIN)/python -m build --no-isolation . >/dev/null
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m pytest -m slow tests/test_packaging.py

# The oldest transformers that is supported, in an environment of its own: the same numbers, and files move in both directions.
oldest: $(VENV)/oldest-installed
	$(OLDEST)/bin/python -m pytest tests/test_goldens.py tests/test_hub.py tests/test_own_layout.py tests/test_published_layout.py \
		tests/test_versions.py
	VLA_ADAPTER_OTHER_PYTHON=$(CURDIR)/$(OLDEST)/bin/python $(BIN)/python -m pytest -m slow tests/test_versions.py

# transformers' own common tests for models, configurations and processors, against ours.
conformance: $(VENV)/test-installed
	$(BIN)/python -m pytest tests/conformance

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo-installed: setup.cfg constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable '.[plot,fast-jpeg]'
	touch $@

$(VENV)/test-installed: setup.cfg constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable '.[test]'
	touch $@

$(VENV)/ray-installed: setup.cfg constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable '.[test,ray]'
	touch $@

$(VENV)/docs-installed: setup.cfg constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable '.[docs,plot,serve]'
	touch $@

# Only transformers and what it needs is installed; a .pth file shares the rest of .venv.
$(VENV)/oldest-installed: $(VENV)/test-installed
	$(BIN)/python -m venv $(OLDEST)
	grep -vE '^(transformers|huggingface_hub|tokenizers)=' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(OLDEST)/constraints.txt \
		'transformers==5.4.0' 'setuptools>=77'
	$(BIN)/python -c "import sys; print(*[path for path in sys.path if path.endswith('-packages')], sep='\n')" \
		> $$($(OLDEST)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# Without constraints.txt: LeRobot wants older releases. With two editable folders pip sees that one needs the other.
$(LEROBOT)/installed: setup.cfg lerobot_policy_vla_adapter/setup.cfg
	$(PYTHON312) -m venv $(LEROBOT)
	$(LEROBOT)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[fast-jpeg,serve]' \
		--editable './lerobot_policy_vla_adapter[test]'
	touch $@

$(VENV)/simulator-installed: setup.cfg constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable '.[libero]'
	touch $@

clean:
	rm -rf $(VENV) build dist docs/_build outputs .cache
