# Every target makes .venv from the pinned requirements.txt when it is missing or older than that file. The tests also
# compile for TPUs that need not be present. That compiler stays out of the environment, since with it JAX would look for
# a TPU in every run. Most of the tests' time is compilation, which keeps one core busy: so two processes share the files.
PYTHON ?= python3
VENV := .venv
LIBTPU := libtpu==0.0.42.1

.PHONY: demo test tpu-compiler lint cuda-compile clean

demo: $(VENV)/installed
	$(VENV)/bin/python run.py --config configs/demo.py

test: $(VENV)/installed tpu-compiler
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another with: make PYTHON=python3.11")'
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	touch $@

tpu-compiler: $(VENV)/tpu-compiler

$(VENV)/tpu-compiler: $(VENV)/installed
	rm -rf $@
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ $(LIBTPU)
	touch $@

# Compiles the CUDA kernels for a GPU that need not be present. The compiler is 5.5 GB.
cuda-compile: $(VENV)-cuda/installed
	$(VENV)-cuda/bin/python -m benchmarks.compile_for_h100

$(VENV)-cuda/installed: requirements-cuda.txt requirements.txt
	$(PYTHON) -m venv --clear $(VENV)-cuda
	$(VENV)-cuda/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements-cuda.txt
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-cuda runs data
