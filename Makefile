PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BESIDE_TESTS := tests/ray tests/scenarios tests/kubernetes tests/reference tests/cluster
BESIDE_LOG := $(VENV)/tests-beside.log

.PHONY: setup serve test chaos check format proto dashboards bench fuzz compat audit image clean

# Everything the project needs, in .venv; repeated only when what decides it changes.
setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Shoal needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable '.[test]'
	-@$(BIN)/python -m experts.kernels.cpu_build >/dev/null
	@touch $@

# The demo checkpoint on http://127.0.0.1:8000 with 4 expert groups.
serve: setup
	exec $(BIN)/shoal serve

# Tests that start a Ray cluster or an API server wait most of their time, so they run beside everything else, and after
# them what makes the two parts equally long.
test: setup
	@{ $(BIN)/python -m pytest -q $(BESIDE_TESTS) && $(MAKE) --no-print-directory check; } >$(BESIDE_LOG) 2>&1 & \
	beside=$$!; trap 'kill $$beside' INT TERM; \
	$(BIN)/python -m pytest -q $(addprefix --ignore=,$(BESIDE_TESTS)); others=$$?; \
	wait $$beside; beside=$$?; cat $(BESIDE_LOG); \
	test $$others -eq 0 && test $$beside -eq 0

# Every fault of replicas, routers, control plane, nodes and Kubernetes, for as long as it may last and under as much
# load as was asked for, which takes longer than a test should.
chaos: setup
	$(BIN)/python tests/benchmarks/failover.py --full
	$(BIN)/python tests/benchmarks/chaos.py --full
	$(BIN)/python -m pytest -q tests/scenarios tests/router/test_transport_stress.py tests/integration
	KUBE_CHAOS=1 KUBE_OUTAGE_S=20 $(BIN)/python -m pytest -q tests/kubernetes/test_outage.py \
	  tests/kubernetes/test_leadership.py tests/kubernetes/test_end_to_end.py

# Format, lint, types, import contracts, and committed stubs that equal what the protos generate.
check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_proto_stubs.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The Grafana dashboard and the alert rules of the Helm chart.
dashboards: setup
	$(BIN)/python -m deploy.dashboards.generate

proto: setup
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=. --pyi_out=. --grpc_python_out=. \
	  proto/experts/v1/experts.proto proto/router/v1/router.proto

# Each script prints one JSON object; see the head of each for what it measures.
bench: setup
	@set -e; for script in $(filter-out %/__init__.py %/report.py %/worker_processes.py \
	  %/generated_checkpoint.py %/transformers_loop.py,$(wildcard tests/benchmarks/*.py)); do \
	  $(BIN)/python $$script --json; done

# The container image (deploy/Dockerfile). VARIANT=cpu or cuda; BASE_IMAGE and TORCH_INDEX are the Dockerfile's own defaults
# unless given; CONTAINER_ENGINE=podman builds without a daemon.
CONTAINER_ENGINE ?= docker
VARIANT ?= cuda
IMAGE ?= shoal:$(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)$(if $(filter cuda,$(VARIANT)),-cuda)

image:
	$(CONTAINER_ENGINE) build --file deploy/Dockerfile --tag $(IMAGE) --build-arg VARIANT=$(VARIANT) \
	  $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) $(if $(TORCH_INDEX),--build-arg TORCH_INDEX=$(TORCH_INDEX)) .

# 20,000 broken requests against the demo on real processes; a failure names the seed that repeats it. See the head of
# tests/fuzz/__main__.py for the form with the demo's whole context.
fuzz: setup
	$(BIN)/python -m tests.fuzz

# Real clients against the demo; writes the table of docs/compatibility.md.
compat: setup
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable '.[test,compat]'
	$(BIN)/python -m tests.compat

# Digests of the locked packages, and known vulnerabilities in them; fails where either cannot be looked up.
audit: setup
	$(BIN)/python -m pip install --quiet --constraint requirements.lock 'pip-audit>=2.10'
	$(BIN)/python -m deploy.locked_hashes audit

clean:
	rm -rf .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
