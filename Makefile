# From a bare machine with Python 3.11 or newer: `make test`, `make demo`. Everything lands in .venv.
#
# TORCH_INDEX chooses where torch comes from. On a machine without a GPU,
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
# keeps some gigabytes of CUDA libraries away.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
VENV ?= .venv
TORCH_INDEX ?=
TORCH := $(shell grep '^torch==' constraints.txt)
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.modmoe-installed
TREE := build/tree
DEMO_OUT ?= demo-out
PYTEST_ARGS ?=
FAULT_KILLS ?= 240
FAULT_OTHERS ?= 60
FAULT_LAYOUTS ?= 2000
FUZZ_INPUTS ?= 10000
FUZZ_SECONDS ?= 120
# programs that read what modmoe writes, for test-clients
CLIENTS := build/llama_cpp
LLAMA_CPP := $(shell sed -n 's/^llama_cpp_python==//p' constraints.txt)
# transformers' tests of models, of the version that is installed; MODMOE_TRANSFORMERS_TESTS names those of a checkout
TRANSFORMERS := $(shell sed -n 's/^transformers==//p' constraints.txt)
MODEL_TESTS := build/transformers_tests
MODMOE_TRANSFORMERS_TESTS ?= $(abspath $(MODEL_TESTS))/tests

.PHONY: help demo test test-clients test-faults test-fuzz lint format types imports unit docs wheel clean install \
	screenshots links

help:
	@echo 'make demo     the whole main job on the model that ships with modmoe'
	@echo 'make test     format, lint, types, imports and all tests'
	@echo 'make lint     the same without the tests'
	@echo 'make test-clients     the tests with lm-eval and llama.cpp, which it builds: some minutes the first time'
	@echo 'make test-faults      commands killed, interrupted, out of disk; 2,000 layouts of files: an hour'
	@echo 'make test-fuzz        10,000 hostile checkpoints, recipes and task files: half an hour'
	@echo 'make docs     the site in build/site, with warnings as errors'
	@echo 'make screenshots      docs/images again, from a run of the demo: some minutes, needs Chromium'
	@echo 'make links    asks every address outside that the repository names whether it is there'
	@echo 'make wheel    wheel and sdist in dist/'
	@echo 'make clean    remove what make made, .venv included'

install: $(STAMP)

# torch first, and named again with the rest, so that nothing pulls another build of it
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'make: Python 3.11 or newer is needed; name it with PYTHON=...' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt $(TORCH) -e '.[dev,docs]'
	@touch $@

demo: $(STAMP)
	$(BIN)/modmoe demo $(DEMO_OUT) --overwrite

test: lint unit

lint: format types imports

format: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# cli/ and recipes/ where they are installed, for tools that read a package from its folder
.PHONY: tree
tree:
	@rm -rf $(TREE) && mkdir -p $(TREE)
	@cp -R modmoe $(TREE)/modmoe && cp -R cli $(TREE)/modmoe/cli && cp -R recipes $(TREE)/modmoe/recipes

types: $(STAMP) tree
	cd $(TREE) && $(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache --strict -p modmoe

imports: $(STAMP) tree
	cd $(TREE) && $(BIN)/lint-imports --config ../../pyproject.toml --no-cache

# one process a core, one file a process; each computes on one thread, so that they do not wait for each other
unit: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile $(PYTEST_ARGS)

# kills, Ctrl-C, full and failing disks, at random calls and times of every command that writes weights, and of a push;
# then layouts of a user's files, of which no command may lose one
test-faults: $(STAMP)
	$(BIN)/python -m tests.faults --kills $(FAULT_KILLS) --others $(FAULT_OTHERS) --layouts $(FAULT_LAYOUTS)

# at random, other inputs each time; FUZZ_INPUTS of all kinds together, then as many seconds of bytes led by coverage
test-fuzz: $(STAMP)
	-$(BIN)/python -m pip install --quiet --only-binary :all: atheris
	OMP_NUM_THREADS=1 MODMOE_FUZZ_INPUTS=$(FUZZ_INPUTS) $(BIN)/pytest -q tests/fuzz $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python -m tests.fuzz.bytes_level $(FUZZ_SECONDS)

# llama.cpp's converter lies in the source distribution of llama-cpp-python alone, so it is fetched beside the wheel
test-clients: $(CLIENTS)/.installed $(MODEL_TESTS)/.fetched
	OMP_NUM_THREADS=1 MODMOE_TRANSFORMERS_TESTS=$(MODMOE_TRANSFORMERS_TESTS) $(BIN)/pytest -m clients $(PYTEST_ARGS)

$(MODEL_TESTS)/.fetched: $(STAMP)
	mkdir -p $(MODEL_TESTS)
	$(BIN)/python -m pip install --quiet -c constraints.txt $(TORCH) -e '.[dev]' parameterized
	$(BIN)/python -m pip download --quiet --no-deps --no-build-isolation --no-binary transformers --dest $(MODEL_TESTS) \
		transformers==$(TRANSFORMERS)
	tar -xzf $(MODEL_TESTS)/transformers-$(TRANSFORMERS).tar.gz -C $(MODEL_TESTS) --strip-components=1 \
		transformers-$(TRANSFORMERS)/tests
	@touch $@

$(CLIENTS)/.installed: $(STAMP)
	mkdir -p $(CLIENTS)
	test -f $(CLIENTS)/llama_cpp_python-$(LLAMA_CPP).tar.gz || $(BIN)/python -m pip download --quiet --no-deps \
		--no-binary :all: --dest $(CLIENTS) llama_cpp_python==$(LLAMA_CPP)
	tar -xzf $(CLIENTS)/llama_cpp_python-$(LLAMA_CPP).tar.gz -C $(CLIENTS) --strip-components=2 \
		$(addprefix llama_cpp_python-$(LLAMA_CPP)/vendor/llama.cpp/,convert_hf_to_gguf.py conversion gguf-py)
	ls $(CLIENTS)/llama_cpp_python-$(LLAMA_CPP)-*.whl >/dev/null 2>&1 || $(BIN)/python -m pip wheel --quiet --no-deps \
		--wheel-dir $(CLIENTS) $(CLIENTS)/llama_cpp_python-$(LLAMA_CPP).tar.gz
	$(BIN)/python -m pip install --quiet -c constraints.txt $(TORCH) -e '.[dev,eval]' sentencepiece protobuf \
		$(CLIENTS)/llama_cpp_python-$(LLAMA_CPP)-*.whl
	@touch $@

# mkdocs-material announces the end of its line in 2027 with each build
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# in a folder of their own each time; SCREENSHOTS names one where modmoe demo has been
screenshots: $(STAMP)
	PATH="$(BIN):$$PATH" PYTHONPATH=. $(BIN)/python docs/screenshots.py $(SCREENSHOTS)

# what is wrong as it is written is told without a network
links: $(STAMP)
	@mkdir -p build
	$(BIN)/python docs/links.py > build/links.txt
	$(BIN)/python -m pip install --quiet linkchecker
	cut -d' ' -f1 build/links.txt | $(BIN)/linkchecker --stdin --check-extern --no-robots --recursion-level=0 --no-status

wheel: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf $(VENV) build dist modmoe.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
