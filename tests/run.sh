#!/usr/bin/env bash
# Run the tests: without an argument the suite at 1, 2, 3 and 4 ranks and what starts mpirun itself.
# Usage: tests/run.sh [cluster | long]
# Each run has a time limit of its own. `long` runs 1 and 2 ranks and some of what starts mpirun once more, watched:
# they must reach 90% of the lines and branches. Being watched takes two thirds longer. It runs all at 3 ranks, too.
# Exit: 0 all passed; else the first failure's status.
set -euo pipefail
cd "$(dirname "$0")/.."

unset PYTHONDONTWRITEBYTECODE # hundreds of ranks would compile the package, each again
export HYPOTHESIS_STORAGE_DIRECTORY=.cache/hypothesis MPLCONFIGDIR="$PWD/.cache/matplotlib"
models=$(dirname "$(dirname "$(command -v python)")")/models # made by make
export COVERAGE_FILE="$PWD/.coverage"
mkdir -p "$MPLCONFIGDIR"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export TMPDIR=$scratch

limited() { # SECONDS COMMAND...: ends the command and what it started, and says so
  local limit=$1 status=0
  shift
  timeout --kill-after=20 "$limit" "$@" || status=$?
  if ((status == 124 || status == 137)); then echo "tests/run.sh: over the limit of $limit s: $*" >&2; fi
  return "$status"
}

third_party() { # NAME RANKS ARGUMENTS...: with the models that `make` has installed under this name
  local name=$1 ranks=$2
  shift 2
  echo "== models of others in $ranks stages"
  if [[ ! -e $models/$name ]]; then echo "left out: $models/$name is not installed"; return; fi
  limited 1200 mpirun -n "$ranks" "$models/bin/python" -m pytest --color=no tests/models "$@"
}

suite() { # RANKS COMMAND...: the tests that start no mpirun, in one
  local ranks=$1 only=(-m mpi) # what looks at no rank runs at one
  shift
  echo "== the suite at $ranks ranks"
  if ((ranks == 1)); then only=(--doctest-modules hpctrain); fi
  if ((ranks == 4)); then only+=(--ignore=tests/test_{blocks,weigh}.py); fi # 2 ranks do
  if ((ranks == 3)) && [[ -z $whole ]]; then only+=("${at_two_and_four[@]/#/--ignore=}"); fi
  limited 900 mpirun -n "$ranks" "$@" pytest --color=no tests "${only[@]}" \
    --ignore=tests/launch --ignore=tests/cluster --ignore=tests/long --ignore=tests/models
}

plain=(-m "not long" --override-ini "addopts=--strict-markers -p no:cacheprovider")
at_two_and_four=(tests/test_{blocks,calls,climate,dense,language,own_train,pipeline,reaching,trial,weigh}.py) # at 3 ranks by `long`
whole=
others=(tests/launch/test_{bench,docs,resume,stages,train}.py) # they run what the others run

case ${1:-} in
  cluster) limited 1200 python -m pytest --color=no tests/cluster -m cluster --override-ini "addopts=--strict-markers -p no:cacheprovider" ;;
  long)
    for ranks in 2 3 4; do third_party models-long "$ranks" -m "long or not long"; done
    whole=yes suite 3 python -m
    coverage erase
    for ranks in 1 2; do suite "$ranks" coverage run -m; done
    limited 1500 coverage run -m pytest --color=no tests/launch "${others[@]/#/--ignore=}" "${plain[@]}"
    coverage combine -q
    coverage report --skip-covered --fail-under=90
    limited 7200 python -m pytest --color=no tests/long tests/launch -m long --override-ini "addopts=--strict-markers -p no:cacheprovider"
    ;;
  '')
    for ranks in 1 2 3 4; do suite "$ranks" python -m; done
    for ranks in 2 4; do third_party models "$ranks" -m "not long"; done
    echo "== what starts mpirun itself"
    limited 2400 python -m pytest --color=no tests/launch "${plain[@]}"
    ;;
  *) echo "usage: tests/run.sh [cluster | long]" >&2; exit 2 ;;
esac
