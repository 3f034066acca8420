# foldserve on a machine that has Python (3.11, or another that pyproject.toml names) and make. `make help` says what there is.

MODEL ?=
PORT ?= 8000
ARGS ?=
TESTS ?=
DEVICE ?= auto

VENV := .venv
BIN := $(VENV)/bin
# The one that CI tests comes first.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$p tools/setup.py --check-python >/dev/null 2>&1 && echo $$p && break; done)

.DEFAULT_GOAL := help
.PHONY: help setup serve gpu-check test test-runners test-next test-clients test-deploy test-pages soak check pin-images reference docs check-docs clean

help: ## show this
	@echo "make COMMAND, where COMMAND is"
	@sed -n 's/^\([a-z-]*\):[^#]*## /  \1\t/p' Makefile

setup: ## install into .venv (DEVICE=auto|cpu|gpu); quick when nothing changed
	@test -n "$(PYTHON)" || { echo "No Python that foldserve runs on was found. Install one (Debian 12: apt-get install python3.11" \
		"python3.11-venv) or say where it is: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) tools/setup.py --venv $(VENV) --device $(DEVICE)

serve: setup ## start the server (MODEL=name or directory, PORT=8000, ARGS="any option of foldserve serve")
	@echo "foldserve: starting on port $(PORT), which takes about half a minute; an example to try comes when it is ready"
	@exec $(BIN)/foldserve serve $(MODEL) --port $(PORT) $(ARGS)

# Workers and servers of the tests import the same modules: they keep byte code, whatever the environment says.
test: setup ## run all tests, without a GPU (TESTS="paths or pytest options" for some)
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(TESTS)

test-runners: setup ## model runner V2 with interpreted kernels, compile mode, two ranks, gpu-check, on a CPU (10 minutes)
	@$(BIN)/python -m pytest -n 2 tests/engine/runners $(TESTS)

test-next: setup ## engine, API and server on the Python of the next vLLM (downloads it; 25 minutes; TESTS as for test)
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m tools.next_vllm $(BIN)/python -m pytest -n 3 --dist loadfile \
		--no-loadscope-reorder $(or $(TESTS),tests/engine tests/api tests/server)

test-clients: setup ## docs/guides/clients.md with the real clients (installs them; needs a JDK)
	@tests/clients/tools.sh $(BIN)/python $(VENV)-clients
	@$(BIN)/python -m pytest tests/clients $(TESTS)

test-pages: setup ## the playground in a browser (installs Playwright; needs Chromium)
	@command -v chromium chromium-browser google-chrome > /dev/null || { echo "test-pages: Chromium is needed in PATH and was not" \
		"found. Debian: apt-get install chromium" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target $(VENV)-pages -r tests/pages/requirements.txt
	@PYTHONPATH=$(CURDIR)/$(VENV)-pages $(BIN)/python -m pytest tests/pages $(TESTS)

test-deploy: setup ## routing, data parallel, Ray, Prometheus and image steps on real programs (fetches Prometheus, vllm-router, Ray)
	@tests/deploy/live/tools.sh $(VENV)
	@$(BIN)/python -m pytest tests/deploy/live $(TESTS)

gpu-check: setup ## whether this machine's GPU computes what it should (ARGS="options of foldserve gpu-check")
	@$(BIN)/foldserve gpu-check $(ARGS)

soak: setup ## 10,000 requests, many broken off, against a server: nothing may be left over (ARGS="options of the soak")
	@$(BIN)/python -m foldserve.loadtest.soak $(ARGS)

check: setup ## lint, formatting, types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy src/foldserve tests tools

pin-images: setup ## write the digests of the images that deploy/ names by tag (ARGS=--check: say what is not pinned or has moved)
	@$(BIN)/python -m tools.pin_images $(ARGS)

reference: setup ## docs/reference from the code: API, command line, metrics, methods and the models that take them (a minute)
	@$(BIN)/python -m tools.reference
	@$(BIN)/python -m tests.engine.method_table

docs: setup ## the documentation as a site, in build/site (installs mkdocs-material)
	@tools/docs/tools.sh $(BIN)/python $(VENV)-docs
	@NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --quiet

check-docs: setup ## the same, strictly: broken links, unknown anchors, pages without a place, other hosts
	@tools/docs/tools.sh $(BIN)/python $(VENV)-docs
	@NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict
	@! grep --recursive --include '*.html' --extended-regexp '<(script|link|img)[^>]+(src|href)="?(https?:)?//' build/site || \
		{ echo "check-docs: these pages have readers ask another host" >&2; exit 1; }

clean: ## remove what was built, .venv included
	@rm -rf $(VENV) $(VENV)-clients $(VENV)-pages $(VENV)-docs .next-vllm build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
