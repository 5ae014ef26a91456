# Two commands for everybody: `make demo` and `make test`. The rest is for those who change Trimtab.
SHELL := /bin/bash
PY := .venv/bin/python

.PHONY: help demo down test setup lint stubs bench soak

help:
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup: ## install what is missing: Debian packages and .venv
	@ops/bootstrap.sh

demo: ## three real libvirt hosts, the control plane and the main job, before your eyes
	@ops/bootstrap.sh --plan
	@ops/bootstrap.sh
	@.venv/bin/trimtab-lab demo

down: ## stop the demo, remove what it made, and say which packages remain
	@if [ -x .venv/bin/trimtab-lab ]; then .venv/bin/trimtab-lab down; fi
	@ops/bootstrap.sh --made

test: ## the tests (sets itself up): every fault at every step of every saga, and real libvirt hosts and guests
	@ops/bootstrap.sh
	@$(PY) -m tests.run

lint: ## the rules alone
	@$(PY) -m pytest -q tests/architecture

# image-first.binpb is left alone: it is what a break that this command would hide is found by (tests/architecture).
stubs: ## regenerate gRPC stubs and the image of the last protos; breaking changes are checked against that and against the first
	@ops/generate_stubs.sh
	@cd protos && ../.venv/bin/buf build -o image.binpb

bench: ## ratios against baselines measured in the same run; installs the peers that it compares with
	@ops/bootstrap.sh --bench
	@$(PY) -m tests.bench.run

soak: ## the long fault campaigns and the long tests on real hosts; their dated reports go to tests/evidence/
	@ops/bootstrap.sh
	@$(PY) -m tests.soak.real_hosts
	@$(PY) -m tests.soak.chaos --operations 500 --database sqlite
	@$(PY) -m tests.soak.chaos --operations 500 --database postgres
	@$(PY) -m tests.soak.host_loss --losses 22
	@$(PY) -m tests.soak.host_loss --replicated --labs 2
	@$(PY) -m tests.soak.without_lease_wait
	@$(PY) -m tests.soak.backups --kills 300
	@$(PY) -m tests.soak.backup_kills --kills 300
	@$(PY) -m tests.soak.fuzz --examples 100
