# Each target only calls things that you can type yourself; `make -n TARGET` shows them.
#
#   make setup                    .venv with everything, lint tools too
#   make train [RANKS=4]          train the default recipe on real data
#   make test                     the test suite at 1, 2, 3 and 4 ranks
#   make test-cluster             a real Slurm and virtual hosts on this machine (root, Debian)
#   make test-long                what takes long, and coverage
#   make lint                     format, lint, types, layers, spelling, scripts
#
# TORCH_INDEX=https://download.pytorch.org/whl/cpu  takes torch from that index (CPU-only build)
# MPI=system                                        takes the mpirun on PATH, not PyPI's wheel

RANKS ?= 4
PYTHON ?= python3
TORCH_INDEX ?=
MPI ?= wheel
ARGS ?=

ifeq ($(MPI),system)
VENV := .venv-system-mpi
EXTRAS := test,lint
else
VENV := .venv
EXTRAS := mpi,test,lint
endif

BIN := $(CURDIR)/$(VENV)/bin
STAMP := $(VENV)/installed
MODELS := $(VENV)/models
export PATH := $(BIN):$(PATH)

# Root is refused by Open MPI unless told twice. More ranks than cores: start them all the same,
# bind none to a core, and give the core away while waiting.
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
export PRTE_MCA_rmaps_default_mapping_policy := :oversubscribe
export PRTE_MCA_hwloc_default_binding_policy := none
export OMPI_MCA_rmaps_base_oversubscribe := 1
export OMPI_MCA_hwloc_base_binding_policy := none
# On one machine no fabric is wanted; looking for one by libfabric takes a second at each start.
export OMPI_MCA_btl ?= ^ofi
ifeq ($(shell test $$(nproc) -lt $(RANKS) && echo few),few)
export OMPI_MCA_mpi_yield_when_idle := 1
endif

.PHONY: setup check-mpi train test test-cluster test-long lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"hpctrain needs Python >= 3.11, $(PYTHON) is {sys.version.split()[0]}: make PYTHON=python3.12")'
	@test -x $(BIN)/pip || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "python's venv module failed (Debian: apt install python3-venv)"; exit 1; }; }
ifneq ($(TORCH_INDEX),)
	@echo "installing torch from $(TORCH_INDEX)"
	@python -m pip install -q --disable-pip-version-check -c constraints.txt --index-url $(TORCH_INDEX) torch
endif
	@echo "installing hpctrain[$(EXTRAS)] into $(VENV) (minutes the first time)"
	@python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $(STAMP)

check-mpi: $(STAMP)
	@mpirun -n $(RANKS) python -c 'from mpi4py import MPI; n = MPI.COMM_WORLD.size; n == $(RANKS) or exit(f"mpirun -n $(RANKS) gave worlds of {n}: mpirun and the MPI of mpi4py differ; see which mpirun")'

train: check-mpi
	@mpirun -n $(RANKS) python -m hpctrain train --train.run_folder 'runs/climate-#' $(ARGS)

# models from PyPI have an environment of their own, which sees all that is installed for us
$(MODELS)/models $(MODELS)/models-long: $(STAMP)
	@echo "installing third-party models into $(MODELS)"
	@rm -f $@
	@$(PYTHON) -m venv $(MODELS) \
	  && cp tests/models/beside.pth $(MODELS)/lib/python3*/site-packages/ \
	  && $(MODELS)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$(@F)]' \
	  && touch $@ || echo "they could not be installed: the tests with them are left out"

test: $(STAMP) $(MODELS)/models
	@tests/run.sh

test-cluster: $(STAMP)
	@tests/run.sh cluster

test-long: $(STAMP) $(MODELS)/models-long
	@tests/run.sh long

lint: $(STAMP)
	ruff format --check .
	ruff check .
	mypy
	lint-imports
	codespell
	shellcheck tests/*.sh tests/cluster/*.sh slurm/*.sbatch .ci/run

clean:
	rm -rf .venv .venv-system-mpi build ./*.egg-info
