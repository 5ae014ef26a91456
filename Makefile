# Two commands for everybody: `make demo` and `make test`. The rest is for those who change Trimtab.
SHELL := /bin/bash
PY := .venv/bin/python

.PHONY: help demo down test testall setup lint stubs bench

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

# What has been seen green as a whole on two cores; `make testall` adds the long fault matrices and the libvirt contract suite.
TESTS := tests/architecture tests/unit tests/store tests/properties tests/api tests/operations/test_journal.py \
	tests/lab/test_bootstrap.py tests/lab/test_lab_guest.py tests/lab/test_lab_hosts.py \
	tests/lab/test_lab_controlplane.py tests/lab/test_fleet.py tests/lab/test_prometheus.py

test: ## the tests (sets itself up)
	@ops/bootstrap.sh
	@$(PY) -m pytest $(TESTS)

testall: ## the tests, every fault at every step of every saga, and the contract suite on real libvirt
	@ops/bootstrap.sh
	@$(PY) -m pytest tests

lint: ## the rules alone
	@$(PY) -m pytest -q tests/architecture

stubs: ## regenerate gRPC stubs and the image that breaking changes are checked against
	@ops/generate_stubs.sh
	@cd protos && ../.venv/bin/buf build -o image.binpb

bench: ## ratios against baselines measured in the same run
	@ops/bootstrap.sh
	@$(PY) tests/bench/bench_placement.py
