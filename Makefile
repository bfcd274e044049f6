# Everything sets itself up: a virtual environment in .venv with the pinned packages of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := $(or $(MOTET_HOME),$(CURDIR)/.motet)/peers/venv

MODELS := MOTET_HOME=$(or $(MOTET_HOME),$(CURDIR)/.motet)
PACKAGE := build/lint/motet
CPP := $(addprefix kernels/native/cpp/*.,cpp h inl) tests/kernels/*.cpp
MYPY := ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../mypy --python-executable ../../$(BIN)/python

.PHONY: demo check test fuzz soak fuzz-wire memory structures jobs lm-eval llama-cpp onnx-runtimes aiperf lint docs bench peers proto clean

# The whole chain on a real model; a second run skips what is done.
demo: $(READY)
	$(BIN)/python -m motet.bench.demo

# The fast loop, below a minute: what needs no model, no compiler and no patience.
check: lint
	$(BIN)/python -m pytest -m "not slow and not network and not native"

# All there is: what CI runs. First what starts servers, clusters or clocks, one after the other; then the others, on all CPUs.
test: lint
	$(MODELS) $(BIN)/python -m pytest -m alone
	$(MODELS) OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m "not alone" -n auto --dist loadfile --no-loadscope-reorder

# The whole fuzz of the native backend, under sanitisers: see tests/fuzz. CASES, SEED: how many requests, and which.
CASES ?= 20000
SEED ?= 0
fuzz: $(READY)
	cd tests && ../$(BIN)/python -m fuzz --sanitised --cases $(CASES) --seed $(SEED)

# Chaos against a running server, and messages that are none: see tests/fuzz/soak.py and wire.py.
SECONDS ?= 600
COUNT ?= 100000
soak: $(READY)
	cd tests && ../$(BIN)/python -m fuzz.soak --seconds $(SECONDS) --seed $(SEED)

fuzz-wire: $(READY)
	cd tests && ../$(BIN)/python -m fuzz.wire --count $(COUNT) --seed $(SEED)

# 10,000 calls, 10,000 refused, 2,000 cancelled: memory does not grow, and a planted leak is found: see tests/fuzz/memory.py.
ROUNDS ?= 10000
memory: $(READY)
	cd tests && ../$(BIN)/python -m fuzz.memory --rounds $(ROUNDS)

# EleutherAI's evaluation harness, in an environment of its own, against the HTTP door.
HARNESS := $(or $(MOTET_HOME),$(CURDIR)/.motet)/lm-eval/venv
lm-eval: $(READY) $(HARNESS)/.ready
	$(BIN)/python -m pytest tests/serve/test_lm_eval.py

$(HARNESS)/.ready:
	$(PYTHON) -m venv $(HARNESS)
	$(HARNESS)/bin/python -m pip install --quiet 'lm-eval[api]==0.4.13' transformers
	touch $@

# llama.cpp beside Motet on GGUF files of every family and type, and the vocabularies that its source has: minutes to build, minutes
# to run. It is the version that `make peers` has.
LLAMA := $(or $(MOTET_HOME),$(CURDIR)/.motet)/llama-cpp
llama-cpp: $(READY) $(LLAMA)/.ready
	$(MODELS) MOTET_LLAMA_CPP=whole $(BIN)/python -m pytest tests/checkpoints/test_gguf_llama_cpp.py

$(LLAMA)/.ready: bench/peers/requirements.txt
	$(PYTHON) -m venv $(LLAMA)/venv
	$(LLAMA)/venv/bin/python -m pip download --quiet --no-deps --no-binary llama-cpp-python -c $< -d $(LLAMA) llama-cpp-python
	tar xzf $(LLAMA)/llama_cpp_python-*.tar.gz -C $(LLAMA) --strip-components=3 --wildcards '*/models/ggml-vocab-*'
	CMAKE_ARGS='-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF' $(LLAMA)/venv/bin/python -m pip install --quiet --no-binary llama-cpp-python -c $< llama-cpp-python
	touch $@

# Optimum and OpenVINO, in an environment of their own, on ONNX decoders that `motet export-onnx` writes.
ONNX_RUNTIMES := $(or $(MOTET_HOME),$(CURDIR)/.motet)/onnx-runtimes/venv
onnx-runtimes: $(READY) $(ONNX_RUNTIMES)/.ready
	$(MODELS) $(BIN)/python -m pytest tests/export/test_onnx_runtimes.py

$(ONNX_RUNTIMES)/.ready:
	$(PYTHON) -m venv $(ONNX_RUNTIMES)
	$(ONNX_RUNTIMES)/bin/python -m pip install --quiet -c constraints.txt torch
	$(ONNX_RUNTIMES)/bin/python -m pip install --quiet 'optimum-onnx[onnxruntime]==0.1.0' openvino==2026.4.1
	touch $@

# `motet bench serve` with NVIDIA's AIPerf beside it, which runs in an environment of its own.
AIPERF := $(or $(MOTET_HOME),$(CURDIR)/.motet)/aiperf/venv
aiperf: $(READY) $(AIPERF)/.ready
	$(BIN)/motet bench serve .motet/bundles/base --doors grpc,http --aiperf $(AIPERF)/bin/aiperf

$(AIPERF)/.ready:
	$(PYTHON) -m venv $(AIPERF)
	$(AIPERF)/bin/python -m pip install --quiet aiperf==0.13.0
	touch $@

# JSON of 200 schemas of the public test suite, which pip fetches: see tests/fuzz/structures.py.
structures: $(READY)
	cd tests && ../$(BIN)/python -m fuzz.structures

# A server that is killed ten times in a job of 500 records, and a job of 100,000.
jobs: $(READY)
	cd tests && ../$(BIN)/python -m fuzz.jobs

# Types and imports are checked on the package with the folders that an installed one has. They need no native kernels.
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	rm -rf build/lint && mkdir -p $(PACKAGE)
	ln -s $(addprefix $(CURDIR)/,$(wildcard src/motet/*) runtime kernels export finetune proto bench) $(PACKAGE)
	cd build/lint && $(MYPY) -p motet
	cd build/lint && MYPYPATH=. $(MYPY) ../../examples
	cd build/lint && PYTHONPATH=. ../../$(BIN)/lint-imports ../../pyproject.toml --no-cache

# The API reference, from the docstrings: open build/docs/index.html.
docs: $(READY)
	$(BIN)/pdoc --output-directory build/docs motet motet.runtime '!motet.runtime.backends.torch' motet.kernels.oracle.reference motet.export motet.finetune

bench: $(READY)
	MOTET_HOME=.motet $(BIN)/motet bench decode .motet/bundles/demo --out .motet/results
	MOTET_HOME=.motet $(BIN)/motet bench serve .motet/bundles/demo --out .motet/results

# The runtimes that `motet bench peers` compares with, in an environment of their own; llama.cpp is compiled for this machine.
peers: $(PEERS)/.ready

$(PEERS)/.ready: bench/peers/requirements.txt
	$(PYTHON) -m venv $(PEERS)
	CMAKE_ARGS=-DGGML_NATIVE=ON $(PEERS)/bin/python -m pip install --quiet --no-binary llama-cpp-python -r bench/peers/requirements.txt
	touch $@

# The stubs of Python, in proto/, from the root that every language loads, proto/motet/v1. They are committed, and a test
# compares them.
proto: $(READY)
	$(BIN)/python -m motet.proto.generate proto

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Motet needs Python 3.11 or newer; run make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps tritonclient==2.73.0 python-rapidjson==1.25  # a test's: it pins protobuf below ours
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info
