# Everything a contributor types. "make" alone says what there is.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
DEMO := fedavg,fedprox:mu=0.1,fedadam:server_lr=0.01,scaffold
PROTOC := -I shoal/protos=protos --python_out=.types --mypy_out=quiet:.types \
	--grpc_python_out=.types --mypy_grpc_out=quiet:.types shoal/protos/fleet.proto

.PHONY: help demo test check protos docs papers bench bench-peers bench-comparisons bench-flower bench-service \
	bench-strategies chaos chaos-flower flower-deployment fuzz clean

help: ## show this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-17s %s\n", $$1, $$2}'

.venv/.run: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -e .
	@touch $@

.venv/.dev: .venv/.run
	$(BIN)/pip install -q --disable-pip-version-check -e ".[dev]"
	@touch $@

demo: .venv/.run ## compare four strategies on real data, in about a minute
	$(BIN)/shoal compare examples/compare.toml --seeds 3 --strategies $(DEMO)

test: .venv/.dev ## run all tests, one on each core at a time
	$(BIN)/pytest -q -n auto --dist worksteal

check: .venv/.dev ## lint, types, and whether the generated stubs are current
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --explicit-package-bases tests examples benchmarks
	$(MAKE) protos
	git diff --exit-code protos/

protos: .venv/.dev ## generate the stubs of protos/fleet.proto
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc $(PROTOC)

docs: .venv/.dev ## write docs/strategies.md from the strategies' docstrings
	$(BIN)/python -m shoal.catalog < benchmarks/results/strategies.json > docs/strategies.md

papers: .venv/.dev ## run papers' experiments again and write docs/results.md, in about half an hour (without FedProx's)
	for paper in niidbench2022 mcmahan2017; do $(BIN)/python examples/papers/$$paper.py || exit 1; done

bench-strategies: .venv/.dev ## measure what each strategy costs beside FedAvg
	$(BIN)/python -m benchmarks.strategies

bench-comparisons: .venv/.dev ## compare FedAvg with itself 200 times: how often is something found?
	$(BIN)/python -m benchmarks.false_positives

bench-service: .venv/.dev ## measure the gRPC service beside a bare stream of chunks
	$(BIN)/python benchmarks/service.py

bench-flower: .venv/.dev ## measure a Flower app's rounds and its start beside flwr's own simulation of it
	$(BIN)/pip install -q --disable-pip-version-check -e ".[bench]"
	$(BIN)/python -m benchmarks.flower_speed --publish

bench: .venv/.dev ## measure a round beside the plain loop, the bare kernels and flwr's simulation
	$(BIN)/pip install -q --disable-pip-version-check -e ".[bench]"
	$(BIN)/python -m benchmarks.simulation --publish simulation

bench-peers: .venv/.dev ## the same per core beside pfl, BlazeFL and FedJAX, in environments of their own
	$(BIN)/python -m benchmarks.peers.environments
	$(BIN)/python -m benchmarks.simulation --publish peers --only lr-tiny 2nn lenet pfl-cnn --rounds 6 \
		--contenders shoal-lean-1 shoal-fused-1 pfl-1 blazefl-1 'fedjax*-1'

MINUTES ?= 30
SEED ?= 1
chaos: .venv/.dev ## kill and disturb real servers and clients, and write docs/reliability.md; MINUTES=30 SEED=1 ADD=
	$(BIN)/python -m tests.chaos.driver --minutes $(MINUTES) --seed $(SEED) --publish $(if $(ADD),--add)
	$(BIN)/python -m tests.chaos.catalogue --publish

TRIALS ?= 5
chaos-flower: .venv/.dev ## the same kinds of fault to a deployment of Flower, in about an hour; TRIALS=5 of each
	$(BIN)/python -m benchmarks.flower_faults --trials $(TRIALS) --publish

flower-deployment: .venv/.dev ## run SCAFFOLD and FedNova in a real SuperLink with two SuperNodes, and compare
	$(BIN)/python -m benchmarks.flower_deployment

fuzz: .venv/.dev ## try to break every decoder and every call with wrong input; MINUTES=30
	$(BIN)/pip install -q --disable-pip-version-check atheris
	$(BIN)/python -m tests.fuzz.campaign --minutes $(MINUTES) --publish

clean: ## remove the environment and everything generated
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache *.egg-info
