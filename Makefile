# make demo    prepare the embedded photographs, train on them, show what was learnt (DATA=folder: your own)
# make test    every check, and each test that is no soak, on JOBS=2 cores
# make soak    the long ones: soak tests, a hundred kills, damaged records under sanitizers, the path of make gpu
# make processors  tests of data and ops as a processor without SSE4, AVX and their like runs them
# make matrix  the tests on the oldest and newest Python and torch, and a GPU machine's (of pyenv too; 6 GB each)
# make native  the C++ extension, with the system packages that it is built on
# make fuzz    6,000 damaged records through the C++ extension, under sanitizers
# make ffcv    FFCV, for --loader ffcv, with the system packages that it is built on
# make dali    DALI, for --loader dali: 200 MB, 600 MB installed
# PYTHON=python3.12 chooses the interpreter of .venv, which all targets share.

PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
DATA ?=
OUT ?= benchmarks/results
DEVICE ?= cuda
PART ?=
JOBS ?= 2
KILLS ?= 40
CORE ?=
PY ?= 3.12
PICTURES ?= $(if $(FASTROT_DATA),$(FASTROT_DATA),../shared/data)
# what one of the tests' hundreds of processes has compiled, the others read
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test soak processors kills matrix native fuzz ffcv dali kernels bench report gpu gpu-dry wheels slice clean
.DEFAULT_GOAL := demo

$(VENV)/made:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "fastrot: $(PYTHON) is not Python 3.10 to 3.13: say make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  package=python$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv; \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; \
	  then apt-get update -qq && apt-get install -y -qq $$package; \
	  else echo "fastrot: $(PYTHON) lacks venv: type  sudo apt-get install $$package"; exit 1; fi; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# One pip run for either, since each builds the extension; Python compiles what it imports (40 s that pip would take).
$(VENV)/installed $(VENV)/installed-dev: $(VENV)/made pyproject.toml setup.py $(wildcard fastrot/native/*.?pp)
	@echo "installing fastrot into $(VENV) (torch is large: this can take a few minutes)"
	@$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -e '.$(if $(filter %-dev,$@),[dev])'
	@touch $(VENV)/installed $@

demo: $(VENV)/installed
	@PATH="$(BIN):$$PATH" sh dataprep/demo.sh "$(DATA)"

test: $(VENV)/installed-dev
	@export PATH="$(BIN):$$PATH" OMP_NUM_THREADS=1; ruff format --check . && ruff check . && { pyright & types=$$!; \
	python -m pytest -q -m "not gpu and not soak" -n $(JOBS) --dist worksteal; tests=$$?; wait $$types && exit $$tests; }

soak: $(VENV)/installed-dev
	@$(MAKE) --no-print-directory matrix CORE=1
	@PATH="$(BIN):$$PATH" OMP_NUM_THREADS=1 python -m pytest -q -m "soak and not gpu" -n $(JOBS) --dist worksteal
	@$(MAKE) --no-print-directory processors kills fuzz

processors: $(VENV)/installed-dev
	@PATH="$(BIN):$$PATH" JOBS=$(JOBS) sh .ci/processors

kills: $(VENV)/installed-dev
	@PATH="$(BIN):$$PATH" OMP_NUM_THREADS=1 python tests/chaos.py --kills $(KILLS) --out build

matrix: $(VENV)/installed-dev
	@JOBS=$(JOBS) CORE=$(CORE) sh .ci/matrix

fuzz: $(VENV)/installed-dev
	@$(BIN)/python tests/native_fuzz.py --times 6000
	@$(BIN)/python tests/native_fuzz.py --times 2000 --sanitizer thread

native: $(VENV)/made
	@sh .ci/native
	@$(BIN)/python -c 'from fastrot import native; assert native.load()' 2>/dev/null || rm -f $(VENV)/installed
	@$(MAKE) --no-print-directory $(VENV)/installed
	@$(BIN)/python -c 'from fastrot import native; print("the C++ extension:", native.why()); assert native.load()'

ffcv: $(VENV)/installed
	@sh .ci/ffcv "$(BIN)/python"

dali: $(VENV)/installed
	@$(BIN)/python -c 'import nvidia.dali' 2>/dev/null || { echo "installing DALI (over 200 MB)" && \
	  $(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dali]' && \
	  $(BIN)/python -c 'import nvidia.dali'; } || { \
	  echo "fastrot: DALI cannot be installed here: see the lines above, or do without --loader dali"; exit 1; }

kernels: $(VENV)/installed
	@PATH="$(BIN):$$PATH" python tests/ops/kernels.py

bench: $(VENV)/installed
	@PATH="$(BIN):$$PATH" python -m benchmarks.bench_loaders
	@PATH="$(BIN):$$PATH" python -m benchmarks.bench_loaders --cold
	@PATH="$(BIN):$$PATH" python -m benchmarks.bench_conversion
	@PATH="$(BIN):$$PATH" python -m benchmarks.bench_ops
	@PATH="$(BIN):$$PATH" python -m benchmarks.bench_train --preset decoupling-alexnet
	@PATH="$(BIN):$$PATH" python -m benchmarks.bench_checkpoint
	@PATH="$(BIN):$$PATH" python -m benchmarks.bench_cifar
	@PATH="$(BIN):$$PATH" python -m benchmarks.bench_demo
	@PATH="$(BIN):$$PATH" python -m benchmarks.bench_decoupling

report: $(VENV)/installed
	@PATH="$(BIN):$$PATH" python -m benchmarks.report

# On a GPU machine, with the interpreter that has torch, in a quarter of an hour: make gpu PYTHON=python3 OUT=folder
# Where a call may take no more than ten minutes, two calls: PART=first, then PART=rest.
gpu:
	@$(PYTHON) benchmarks/gpu.py $(PART) --out "$(OUT)"

# The same plan in small on a CPU, in under three minutes.
gpu-dry: $(VENV)/installed-dev
	@PATH="$(BIN):$$PATH" python benchmarks/gpu.py $(PART) --device cpu --root dataprep/demo_pictures/val --out build/gpu-dry

# For a machine without network: packages that it may lack, for its Python, and pictures to measure with.
wheels: $(VENV)/made
	@rm -rf wheels && $(BIN)/python -m pip download -q --disable-pip-version-check --no-deps -d wheels \
	  --only-binary=:all: --python-version $(PY) --implementation cp --platform manylinux_2_28_x86_64 \
	  --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
	  simplejpeg tyro docstring-parser typeguard beartype jaxtyping wadler-lindig
	@du -sh wheels

slice:
	@rm -rf slice && mkdir -p slice/imagenet-sample && while read -r file; do \
	  mkdir -p "slice/imagenet-sample/$$(dirname "$$file")" && \
	  cp "$(PICTURES)/imagenet-sample/$$file" "slice/imagenet-sample/$$file"; \
	done < "$(PICTURES)/imagenet-sample/core.txt"
	@for part in train/250 val/60; do for class in "$(PICTURES)/imagenette128/$${part%/*}"/*; do \
	  to="slice/imagenette128/$${part%/*}/$${class##*/}" && mkdir -p "$$to" && \
	  ls "$$class" | head -n "$${part#*/}" | while read -r file; do cp "$$class/$$file" "$$to/$$file"; done; \
	done; done
	@du -sh slice

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache prepared
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	@echo "kept: $(VENV) and runs (remove them by hand)"
