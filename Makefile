# Every target sets .venv up first; where nothing has changed that takes a moment.
PYTHON ?= $(shell for python in .venv/bin/python python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && break; \
	done; echo $$python)
# A module system's Python packages must not shadow the pinned ones.
unexport PYTHONPATH PYTHONHOME
# Importing TensorFlow takes three times as long where no bytecode may be kept, and each rank imports it.
unexport PYTHONDONTWRITEBYTECODE

# Tests wait a lot: two processes of them, each with ranks of its own; the tests of a file share one.
TWO := --numprocesses=2 --dist=loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup run lint check test lab site notebooks figures fidelity bench lock clean

help:
	@echo "make run    execute every notebook into build/executed and render build/site"
	@echo "make check  in a minute: style, the plan of the house, and all tests that need no ranks"
	@echo "make test   run all tests; make test ONLY='-m ranks' or ONLY=tests/staging runs some"
	@echo "make lab    open the notebooks in JupyterLab"
	@echo "make site   render the executed notebooks as build/site/index.html"
	@echo "make fidelity  predict what others measured, and fail if that has become worse"
	@echo "make bench  measure this project against its peers"
	@echo "make notebooks  write the notebooks from their sources; make figures  renew the README's figures after make run"
	@echo "make setup  only set .venv up, which all of the above do first"
	@echo "make lock   pin the newest packages that pyproject.toml allows in requirements.lock and environment.yml"
	@echo "make clean  remove .venv and build (the compiled Horovod stays in ~/.cache/nurion)"

setup:
	@$(PYTHON) tools/setup.py

run: setup
	@.venv/bin/python tools/notebooks.py run

lint: setup
	@.venv/bin/ruff check --quiet
	@.venv/bin/ruff format --check --quiet

check: lint
	@.venv/bin/python -m pytest --quiet $(TWO) -m "not (ranks or lab or tensorflow or notebook or install or slow)"

test: lint
	@.venv/bin/python -m pytest --durations=25 $(TWO) $(ONLY)

lab: setup
	@# Jupyter refuses root unless told otherwise. It listens on this machine only and asks for a token, so root may.
	@if [ "$$(id -u)" = 0 ]; then echo "You are root: so is all that the notebooks run. Jupyter listens on localhost only."; fi
	@.venv/bin/jupyter lab $$([ "$$(id -u)" = 0 ] && echo --allow-root) --ServerApp.ip=localhost notebooks

site: setup
	@.venv/bin/python tools/notebooks.py site

notebooks: setup
	@.venv/bin/python tools/notebooks.py build

figures: setup
	@.venv/bin/python tools/readme_figures.py

fidelity: setup
	@.venv/bin/python -m nurion_utils.scaling $(EXTRA)

bench:
	@$(PYTHON) tools/setup.py bench
	@.venv/bin/python tools/bench/run.py

lock: setup
	@UV_SYSTEM_CERTS=1 .venv/bin/uv pip compile --quiet --upgrade --custom-compile-command "make lock" \
		--extra build --extra test --output-file requirements.lock pyproject.toml
	@sed -nE 's/^([[:alnum:]_.-]+)==(.+)/s|- \1==.*|- \1==\2|/p' requirements.lock | sed -i -f /dev/stdin environment.yml

clean:
	@rm -rf .venv build
