# Every target makes .venv from the pinned requirements.txt when it is missing or older than that file.
PYTHON ?= python3
VENV := .venv

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(VENV)/bin/python run.py --config configs/demo.py

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another with: make PYTHON=python3.11")'
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	touch $@

clean:
	rm -rf $(VENV) runs data
