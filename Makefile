# Two commands do everything on a fresh machine: `make demo` and `make test`.
# What they need beyond Python 3.10+, g++ and make is installed into .venv from PyPI.

VENV  := .venv
PY    := $(VENV)/bin/python
BUILD := build/release
JOBS  ?= $(shell nproc 2>/dev/null || echo 2)
STAMP := $(VENV)/.ready
export PATH := $(abspath $(VENV)/bin):$(PATH)
export PYTHONPATH := $(abspath python)

.PHONY: all demo test test-cpp test-python test-gpu bench info format lint sanitize clean

all: build

$(STAMP): tools/setup_venv.py tools/requirements.txt
	python3 tools/setup_venv.py $(VENV) tools/requirements.txt
	@touch $@

setup: $(STAMP)

.PHONY: build setup
build: $(STAMP)
	cmake -S . -B $(BUILD) -G Ninja -DCMAKE_BUILD_TYPE=Release -DFSATTN_BUILD_TESTS=ON \
	  -DFSATTN_BUILD_TORCH=ON -DPython_EXECUTABLE=$(abspath $(PY)) $(CMAKE_ARGS)
	cmake --build $(BUILD) -j $(JOBS)

demo: build
	$(PY) -m fsattn demo

test: build test-cpp test-python

test-cpp: build
	ctest --test-dir $(BUILD) --output-on-failure

test-python: build
	$(PY) -m pytest tests/python -q -rsfE

# Everything that needs a GPU; without one it builds and says what it skipped.
test-gpu: $(STAMP)
	tools/check_gpu.sh

info: build
	$(PY) -m fsattn info

bench: build
	$(PY) -m fsattn bench

format: $(STAMP)
	$(PY) tools/check_format.py --fix

lint: $(STAMP)
	$(PY) tools/check_format.py
	$(PY) tools/check_layers.py src
	$(PY) tools/check_doc_paths.py

sanitize: $(STAMP)
	tools/run_sanitizers.sh

clean:
	rm -rf build
