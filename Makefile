# Every target for people has its line in `make help`; what it does is in the script or program that it calls.
# cargo is always asked for the whole workspace: for one package alone it would choose other features of the dependencies,
# and build them all once more.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Which test cluster: several can run side by side. `make test` has one of its own, and ends it.
NAME ?= dev
# CLUSTER=existing, with KUBECONFIG and AGENT_IMAGE set, uses that cluster and installs nothing on this machine.
CLUSTER ?= testbed
# One test only: make e2e TEST=dns_answers_from_a_pod
TEST ?=
# One case of the proof: make e2e CASE=2
CASE ?=
ifneq ($(CASE),)
  override TEST := case_$(CASE)_
endif
# What the end-to-end tests are about: the ground floor, the API, a newcomer's way, the proof that nothing is lost.
E2E ?= ground_floor schema newcomer proof
ifeq ($(strip $(E2E)),)
  $(error E2E is empty, and cargo would run every ignored test of the workspace: leave it out, or name some)
endif
# Releases, and releases that are disturbed.
STORIES := release disturbed
# How many histories `make simulate` lives through, from which on, or which one.
HISTORIES ?= 200000
FIRST ?= 0
SEED ?=
# How the binaries of images are compiled: as the tests are, so that one build does for both, or as for production.
PROFILE ?= dev
# What the parts of `make e2e` are called, and the end of the cluster after it.
PARTS ?= 1/3 2/3 3/3 end
# KEEP=1 keeps the cluster of `make test`.
KEEP ?=
TAG ?= dev

ifeq ($(filter $(CLUSTER),testbed existing),)
  $(error CLUSTER=$(CLUSTER) is unknown: leave it out for the test cluster, or say CLUSTER=existing)
endif
.NOTPARALLEL:

TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
TESTBED := $(TARGET_DIR)/debug/testbed
export BINARIES = $(abspath $(TARGET_DIR)/$(PROFILE:dev=debug))
OPERATOR := $(TARGET_DIR)/debug/exchange-operator
export CLUSTER
export TESTBED_NAME := $(NAME)
# Tests run in other directories than this one.
ifneq ($(KUBECONFIG),)
  empty :=
  override KUBECONFIG := $(subst $(empty) $(empty),:,$(abspath $(subst :, ,$(KUBECONFIG))))
  export KUBECONFIG
endif
ifdef STORES_VALUES
  override STORES_VALUES := $(abspath $(STORES_VALUES))
  export STORES_VALUES
endif
ifneq ($(CLUSTER),existing)
  export AGENT_IMAGE ?= exchange.local/testbed-agent:$(TAG)
endif
# Most of what the integration tests take is waiting, each for stores of its own: more at once than there are cores.
THREADS := 4
# Compiles tests of the workspace, chosen by arguments of cargo's and by arguments of their own. Fails if a misspelt TEST selects
# none, before anything is started for them: with the target that has one of that name, by what its `ignore` says.
find-tests = cargo test --workspace --locked $(1) --no-run; \
	  cargo test --workspace --locked $(1) -- $(2) --list 2>/dev/null | grep ': test$$' >/dev/null || { \
	  there=$$(sed -n '/^ *\#\[ignore/{N;s/.*\(make [a-z0-9-]*\)"\]\n.*fn [a-z0-9_]*$(TEST).*/; \1 has one/p}' tests/tests/*.rs | sort -u); \
	  echo "error: no test is named like $(if $(CASE),CASE=$(CASE),TEST=$(TEST))$$there." \
	    'To list those of this target: cargo test --workspace $(1) -- --list' >&2; exit 1; }
# The same, and runs them; and the second half alone, for who had to start something in between.
run-tests = $(find-tests); $(run-found)
run-found = cargo test --workspace --locked $(1) -- $(2)
# Another target, as a part of one.
sub = $(MAKE) --no-print-directory
# A part of what takes long: its number, its name, its command. Says what begins, and what it took.
part = printf '\n\033[1m▶ [%s] %s\033[0m\n' $(1) "$(2)" >&2; SECONDS=0; $(3); echo "  ✓ [$(1)] took $$SECONDS s" >&2
# Makes a target while no other run uses the cluster NAME. What is made by that in this way is a part of it.
alone = $(TESTBED) --name $(NAME) alone -- $(sub) NAME=$(NAME)

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  \033[1m%-15s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  Variables: NAME=dev (which test cluster), CLUSTER=existing (use the one of KUBECONFIG), TEST=… (one test)"

.PHONY: demo
demo: NAME := $(if $(filter dev,$(NAME)),demo,$(NAME))
demo: deps $(TESTBED) ## Show a release under load, a failed one and a rollback, live; Ctrl-C cleans up
	@$(alone) demo-alone

# Ctrl-C ends the cluster if this has started it, and removes only what the demonstration has brought if it ran before.
.PHONY: demo-alone
demo-alone:
	@clean_up='demo --clean-up'; $(if $(filter existing,$(CLUSTER)),,$(TESTBED) status &>/dev/null || clean_up=down;) \
	  trap "$(TESTBED) $$clean_up; exit 130" INT; \
	  $(call part,1/8,The cluster,$(sub) cluster); $(call part,2/8,The images,$(sub) images); $(TESTBED) demo

.PHONY: test
test: NAME := $(if $(filter dev,$(NAME)),test,$(NAME))
test: all-tests ## Check, integration, a new cluster of its own with a newcomer's release and the proof, and its end
ifeq ($(CLUSTER),existing)
	@$(call part,1/4,Lints and unit tests,$(sub) check)
	@$(sub) $(TESTBED)
	@$(alone) e2e PARTS="2/4 3/4 4/4"
else
	@tests/deps.sh --cluster
	@$(sub) preflight
	@# On a new machine Kubernetes is compiled on what cargo and the exchange's tests leave of the processors; the charts' wait for the rest.
	@nice -n 19 $(TESTBED) tools &>/dev/null & trap "kill $$! 2>/dev/null || true" EXIT; \
	  $(call part,1/6,Lints and unit tests,$(sub) compiled check); \
	  $(call part,2/6,The exchange with real stores,$(sub) integration)
	@$(alone) down e2e down-test PARTS="3/6 4/6 5/6 6/6"
endif

.PHONY: preflight
preflight: $(TESTBED)
	@$(TESTBED) preflight

# All tests at once, so that no core waits for the last program of a level.
.PHONY: compiled
compiled:
	cargo test --workspace --locked --no-run

.PHONY: check
check: all-tests ## Format, lints, unit tests, generated files: minutes, no root, no cluster
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	@$(sub) unit crds-check

.PHONY: unit
unit: ## Unit tests
	@$(call run-tests,--lib --bins --test argo --test api_server --test crd --test decide --test docs --test process --test resources,$(TEST))

.PHONY: simulate
simulate: ## The operator in HISTORIES=200000 simulated histories from FIRST=0 on; SEED=17 replays one
	SIMULATION_SEED=$(SEED) SIMULATION_FIRST=$(FIRST) SIMULATION_HISTORIES=$(HISTORIES) \
	  cargo test --workspace --locked --test decide histories::

.PHONY: mutants
mutants: ## Break each guard of the operator alone, and see what the simulation says of it (about an hour)
	operator/tests/mutants/run.sh

.PHONY: integration
integration: not-existing deps ## The exchange against real PostgreSQL, NATS and Redis on free ports of this machine; the charts as helm renders them
	@$(sub) $(TESTBED)
	@$(call find-tests,--test it --test charts,$(TEST)); \
	  tools=$$($(TESTBED) tools --first); export PATH="$$tools:$$PATH"; \
	  $(call run-found,--test it,--test-threads $(THREADS) $(TEST)); \
	  $(TESTBED) tools >/dev/null; $(call run-found,--test charts,$(TEST))

.PHONY: e2e
e2e: deps $(TESTBED) ## End-to-end tests on the cluster, which stays for the next run; CASE=2 runs one case of the proof
	@$(alone) e2e-alone

.PHONY: e2e-alone
e2e-alone:
	@$(call find-tests,$(E2E:%=--test %),--ignored $(TEST))
	@origin=$$($(TESTBED) results --begin); export "$$origin"; \
	  $(call part,$(word 1,$(PARTS)),The cluster,$(sub) cluster); $(call part,$(word 2,$(PARTS)),The images,$(sub) images); \
	  trap '$(TESTBED) results --end $$?' EXIT; \
	  $(call part,$(word 3,$(PARTS)),The tests on the cluster,$(call run-found,$(E2E:%=--test %) --no-fail-fast,--ignored --test-threads 3 $(TEST)))

.PHONY: stories
stories: ## Releases of every kind and end, and disturbed ones, on the cluster (about 25 minutes)
	@$(sub) e2e E2E="$(STORIES)"

.PHONY: e2e-long
e2e-long: ## Both with the full matrices: 20 releases in a row, every phase disturbed, the operator killed at every write of a release (hours)
	RELEASES=20 EVERY_PHASE=1 EVERY_WRITE=1 $(sub) e2e E2E="$(E2E) $(STORIES)"
	@$(sub) rbac

.PHONY: rbac
rbac: $(TESTBED) ## Compare the operator's rights with what it did on the test cluster; after `make stories`
	@$(call run-tests,--test rbac,--ignored)

.PHONY: cluster-test
cluster-test: not-existing ## Test the test cluster itself: kills, several at once, leavings, wrong use (about 10 minutes)
	@tests/deps.sh --cluster
	@$(sub) $(TESTBED)
	@$(alone) cluster-test-alone

.PHONY: cluster-test-alone
cluster-test-alone:
	@$(call find-tests,--test cluster,--ignored $(TEST))
	$(TESTBED) tools
	@origin=$$($(TESTBED) results --of cluster-test --begin); export "$$origin"; \
	  trap '$(TESTBED) results --of cluster-test --end $$?' EXIT; \
	  $(call run-found,--test cluster,--ignored --test-threads 1 $(TEST))

.PHONY: all-tests
all-tests:
ifneq ($(TEST),)
	@echo "error: TEST and CASE choose tests of one level: make unit, integration, e2e, stories or cluster-test TEST=…" >&2; exit 1
endif

.PHONY: not-existing
not-existing:
ifeq ($(CLUSTER),existing)
	@echo "error: this target is about this machine, not about an existing cluster: leave CLUSTER out" >&2; exit 1
endif

.PHONY: down-test
down-test: not-existing
	@$(call part,$(word 4,$(PARTS)),The end of a cluster,$(sub) down-test-alone)

.PHONY: down-test-alone
down-test-alone:
	@$(if $(KEEP),echo "KEEP=1: cluster $(NAME) goes on",$(TESTBED) down)
	@$(call run-tests,--test cluster,--ignored --exact down_leaves_nothing)

.PHONY: cluster
cluster: deps $(TESTBED) ## Start the test cluster NAME, or find that it runs
ifeq ($(CLUSTER),existing)
	@[ -n "$${KUBECONFIG:-}" ] || { echo "error: CLUSTER=existing needs KUBECONFIG: set it to the cluster's file" >&2; exit 1; }
	@[ -n "$${AGENT_IMAGE:-}" ] || { echo "error: CLUSTER=existing needs AGENT_IMAGE: set it to what you have pushed," \
	  "such as ghcr.io/acme/testbed-agent:1.0.0; the other images have its prefix" >&2; exit 1; }
	@for program in kubectl helm; do command -v $$program >/dev/null || \
	  { echo "error: CLUSTER=existing uses this machine's kubectl and helm, and there is no $$program: install it" >&2; exit 1; }; done
	kubectl version
else
	$(TESTBED) up
endif

.PHONY: down
down: $(TESTBED) ## End the test cluster NAME and remove all it has left
ifeq ($(CLUSTER),existing)
	@echo "error: CLUSTER=existing: that cluster is not ours to end" >&2; exit 1
else
	$(TESTBED) down
endif

.PHONY: images
images: deps $(TESTBED) ## Build the images and load them into the test cluster; RELEASE=2.0.1 makes one more of the exchange
ifeq ($(CLUSTER),existing)
	@echo "CLUSTER=existing: build and push with docker, as the Dockerfile says; see docs/architecture.md, Images"
	cargo build --workspace --locked --bins
else
	@$(TESTBED) status >/dev/null
	cargo build --workspace --profile $(PROFILE) --locked --bins
	archives=$$($(TESTBED) images --binaries $(BINARIES) --tag $(TAG) $(RELEASE:%=--release %)) && $(TESTBED) load $$archives
endif

.PHONY: crds
crds: ## Generate crds/, and the chart's copy, from the code
	@mkdir -p crds
	cargo build --quiet --workspace --locked --bin exchange-operator
	$(OPERATOR) crd >crds/.next && mv crds/.next crds/exchangedeployments.exchange.dev.yaml
	cp crds/exchangedeployments.exchange.dev.yaml charts/exchange-operator/files/

.PHONY: crds-check
crds-check:
	cargo build --workspace --locked --bin exchange-operator
	@$(OPERATOR) crd | diff crds/exchangedeployments.exchange.dev.yaml - \
	  && diff crds/exchangedeployments.exchange.dev.yaml charts/exchange-operator/files/exchangedeployments.exchange.dev.yaml \
	  || { echo "error: crds/ or the chart's copy is out of date: run \`make crds\` and commit" >&2; exit 1; }

.PHONY: bench
bench: $(if $(filter existing,$(CLUSTER)),,bench-exchange) bench-operator ## Benchmarks: ratios from one run, printed and written to target/results/*.json

.PHONY: bench-exchange
bench-exchange: not-existing deps ## Those of the exchange: trading beside pgbench on the same machine
	@$(sub) $(TESTBED)
	tools=$$($(TESTBED) tools) && PATH="$$tools:$$PATH" cargo test --workspace --release --locked --test it -- --ignored --nocapture bench::

.PHONY: bench-operator
bench-operator: deps $(TESTBED) ## Those of the operator: releases on the cluster, medians of RELEASES=10
	@$(alone) bench-operator-alone

.PHONY: bench-operator-alone
bench-operator-alone: PROFILE := release
bench-operator-alone:
	@$(call find-tests,--test bench,--ignored $(TEST))
	@$(sub) cluster images PROFILE=$(PROFILE)
	@$(call run-found,--test bench,--ignored --nocapture --test-threads 1 $(TEST))

.PHONY: deny
deny: ## Licences, sources and advisories of all dependencies (needs cargo-deny)
	cargo deny --locked check

# What is about a cluster says at once what that needs, root first of all.
demo e2e bench-operator cluster: DEPS := --cluster

.PHONY: deps
deps: ## Install the Debian packages that are missing, and say why
ifneq ($(CLUSTER),existing)
	@tests/deps.sh $(DEPS)
endif

.PHONY: clean
clean: ## End all test clusters and remove what was built here (the caches of tools and images stay)
	@if [ -x $(TESTBED) ]; then $(TESTBED) down --all; else echo "test clusters were not looked for: the launcher is not built"; fi
	cargo clean
	rm -rf dist target/images target/results

# cargo decides what is out of date.
.PHONY: $(TESTBED)
$(TESTBED):
	@cargo build --workspace --locked --bin testbed
