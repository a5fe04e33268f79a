# Every target makes .venv from the pinned requirements.txt if it is missing or older than that file. The tests also
# compile for TPUs that need not be present. That compiler stays out of the environment's packages, since JAX would look
# for a TPU in every run if it found it there. Most of the tests' time is compilation, which keeps one core busy: two
# processes share the test files.
PYTHON ?= python3
NEWEST_PYTHON ?= python3.13
VENV := .venv
PIP := -m pip --quiet --disable-pip-version-check
SUDO := $(shell test "$$(id -u)" = 0 || echo sudo)
PYTEST := -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo weights check lint types test test-newest core-check docs tpu-compiler browser cuda-compile gpu-check tpu-check clean

demo: $(VENV)/installed
	$(VENV)/bin/python run.py --config configs/demo.py

# Trains the weights in the package again, and measures them. If it is interrupted, the same command resumes.
weights: $(VENV)/installed
	$(VENV)/bin/python run.py --config configs/demo_weights.py --workdir runs/demo_flow train \
	    --flow.objective=flow_matching --flow.adaptive_weights --train.num_steps=2000 --optim.decay_steps=5000
	$(VENV)/bin/python run.py --workdir runs/demo_flow export --out runs/demo_flow.safetensors --overwrite
	$(VENV)/bin/python run.py --config configs/demo_weights.py --train.init_from=runs/demo_flow.safetensors
	$(VENV)/bin/python run.py --workdir runs/demo_weights export --out sisma_jax/weights/demo.safetensors --overwrite
	rm -rf runs/demo_card
	$(VENV)/bin/python run.py evaluate --weights demo --out runs/demo_card
	sed 's/^# Add the licence of the weights.*/license: apache-2.0/' runs/demo_card/model_card.md > sisma_jax/weights/README.md

# What a change must pass before the whole suite is worth its time: under three minutes on two cores.
check: lint types
	$(VENV)/bin/python $(PYTEST) -m fast

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/installed
	$(VENV)/bin/basedpyright

test: $(VENV)/installed tpu-compiler
	$(VENV)/bin/python $(PYTEST)

# The whole suite with the newest Python and the newest versions that pyproject.toml allows.
test-newest:
	$(NEWEST_PYTHON) -m venv --clear $(VENV)-newest
	$(VENV)-newest/bin/python $(PIP) install --upgrade --editable '.[dev]'
	touch $(VENV)-newest/installed
	$(MAKE) VENV=$(VENV)-newest $(VENV)-newest/tpu-compiler
	$(VENV)-newest/bin/python $(PIP) list
	$(VENV)-newest/bin/python $(PYTEST)

# Samples from an exported file in an environment with nothing but the core, outside the repository.
core-check: $(VENV)/installed
	$(PYTHON) -m venv --clear $(VENV)-core
	$(VENV)-core/bin/python $(PIP) install .
	$(VENV)/bin/python -m tests.export_tiny $(VENV)-core/tiny.safetensors
	$(VENV)-core/bin/python -I tests/sample_with_core.py $(VENV)-core/tiny.safetensors

# The documentation as a site in site/. Needs no network, and fails if a link leads nowhere.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	@echo "Documentation: site/index.html"

$(VENV)/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another with: make PYTHON=python3.11")'
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python $(PIP) install --requirement requirements.txt
	touch $@

tpu-compiler: $(VENV)/tpu-compiler

# The version that this JAX is made for, by JAX's own metadata.
$(VENV)/tpu-compiler: | $(VENV)/installed
	rm -rf $@
	libtpu=$$($(VENV)/bin/python -c 'import importlib.metadata as m; print(*(r.split(";")[0] for r in m.requires("jax") if r.startswith("libtpu")))') && \
	$(VENV)/bin/python $(PIP) install --no-deps --target $@ "$$libtpu"
	touch $@

# The browser for the tests of HTML pages, which are skipped without it; from Debian's packages.
browser:
	command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	{ $(SUDO) apt-get update && $(SUDO) apt-get install -y --no-install-recommends chromium chromium-driver; }

# Compiles the CUDA kernels for a GPU that need not be present. The compiler is 5.5 GB.
cuda-compile: $(VENV)-cuda/installed
	$(VENV)-cuda/bin/python -m benchmarks.compile_for_h100

$(VENV)-cuda/installed: requirements-cuda.txt requirements.txt
	$(PYTHON) -m venv --clear $(VENV)-cuda
	$(VENV)-cuda/bin/python $(PIP) install --requirement requirements-cuda.txt
	touch $@

# Correctness and speed on this machine's accelerator; no check starts after ten minutes. They run with the machine's own
# Python, whose JAX knows the device, and need no package but jax, flax, optax and jaxtyping.
gpu-check tpu-check:
	$(PYTHON) benchmarks/device_check.py --platform $(@:-check=)

clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-core $(VENV)-cuda runs data site
