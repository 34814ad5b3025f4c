# The two commands of the README are `make demo` and `make test`; the rest is for those who change the code.
CACHE  ?= $(HOME)/.cache/latchgate
# Properties are tried with the same values on every run; `make test SEED=$$RANDOM` tries others.
SEED   ?= 20261121
PYTHON  = $(CACHE)/venv/bin/python
TARGET ?= $(shell rustc -vV | sed -n 's/^host: //p')
GATE    = target/$(TARGET)/debug/latchgate
# Tests load the kernel program for real: they want root, and a mount namespace so that a bpffs of theirs is nobody else's.
AS_ROOT = $(if $(filter 0,$(shell id -u)),,sudo --preserve-env=PATH,HOME,CARGO_HOME,RUSTUP_HOME,CI)
PRIVATE = $(AS_ROOT) unshare --mount --propagation private

.PHONY: help setup setup-test build demo test bench soak test-kernel-6.1 lint ebpf ebpf-check fmt

help: ## what there is
	@grep -E '^[a-z0-9.-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

setup: ## install what the demo needs and this machine lacks
	@scripts/setup.sh demo

setup-test:
	@scripts/setup.sh test

build: setup ## the gate, unoptimised
	cargo build --package latchgate

demo: build ## an agent's call allowed, others refused, and the receipt verified
	$(PRIVATE) demo/run.sh $(abspath $(GATE)) $(PYTHON)

test: setup-test ## every test, against the real kernel
	@scripts/privileges.sh
	cargo build --workspace
	cargo build --package latchgate --features test-guards --bin latchgate-unguarded
	cargo test --workspace --no-run
	$(PRIVATE) env LATCHGATE_TEST_PYTHON=$(PYTHON) PROPTEST_RNG_SEED=$(SEED) cargo test --workspace

bench: setup-test ## what holding costs, as ratios of one run; on a machine that does nothing else
	@scripts/privileges.sh
	cargo build --release --package latchgate
	cargo bench --package latchgate-tests --bench ratios --no-run
	$(PRIVATE) cargo bench --quiet --package latchgate-tests --bench ratios

soak: setup-test ## 5,000 executions: what is held after them is what was held before; 1,000 upgrades under attack
	cargo build --package latchgate
	$(PRIVATE) env LATCHGATE_SOAK=$(or $(EXECUTIONS),5000) cargo test --package latchgate-tests --test soak -- --nocapture
	$(PRIVATE) env LATCHGATE_UPGRADES=$(or $(UPGRADES),1000) cargo test --package latchgate-tests --test kernel -- --nocapture no_upgrade

test-kernel-6.1: ## the suites that meet the kernel, on Debian's 6.1 under an emulated processor (slow)
	CACHE=$(CACHE) scripts/kernel-6.1.sh $(SUITES)

lint: ## formatting, clippy, licences, Python
	@scripts/setup.sh lint
	cargo fmt --all --check
	cargo fmt --manifest-path egress-ebpf/Cargo.toml --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo clippy --package latchgate --features test-guards -- -D warnings
	cargo xtask seccomp --check
	$(CACHE)/tools/bin/cargo-deny --log-level error check bans licenses sources
	$(CACHE)/lint/bin/ruff check --quiet demo tests
	$(CACHE)/lint/bin/ruff format --quiet --check demo tests
	$(CACHE)/lint/bin/mypy --no-error-summary --python-executable $(PYTHON) demo

fmt:
	cargo fmt --all

ebpf: ## rebuild the kernel program from source, and the one of the tests that take a guard away
	cargo xtask ebpf

ebpf-check: ## rebuild both in a clean directory and compare with those that are checked in
	cargo xtask ebpf --check
