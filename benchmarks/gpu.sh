#!/bin/sh
# What `make gpu` runs on a machine with a GPU, which needs neither a network nor a checkout: tests, then benchmarks,
# each within its own time limit and each result written at once. Under nine minutes in all.
#
#   $1 the interpreter that has torch   $2 folder of results   $3 cuda, or cpu to try the whole path without a GPU
#
# wheels/ holds packages that the machine lacks (make wheels PY=3.12), slice/ pictures (make slice). Without .git,
# COMMIT and DIRTY tell where the rows come from.
set -u
cd "$(dirname "$0")/.."
python=$1 out=$2 device=$3 quick= failed=0
mkdir -p "$out"
if ls wheels/*.whl >/dev/null 2>&1; then
  site=$(mktemp -d)
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" wheels/*.whl || exit 1
  PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
  export PYTHONPATH
fi
[ "$device" = cpu ] && quick=--quick

within() { # seconds, then the command
  limit=$1
  shift
  printf '\n$ %s\n' "$*"
  timeout "$limit" "$@" || { echo "status $? from: $*"; failed=1; }
}

if [ "$device" = cuda ]; then
  within 240 "$python" -m pytest -q -m gpu tests
else
  within 240 "$python" -m pytest -q tests/test_gpu.py tests/test_dist.py  # the door, without a GPU behind it
fi
# shellcheck disable=SC2086  # an empty word is no option
within 90 "$python" -m benchmarks.bench_ops --device "$device" $quick --out "$out"
if [ -d slice/imagenet-sample ]; then
  # shellcheck disable=SC2086
  within 120 "$python" -m benchmarks.bench_loaders --root slice/imagenet-sample $quick --out "$out"
else
  echo "no slice/imagenet-sample: the loaders are not measured (make slice)"
fi
demo="--data dataprep/demo_pictures/train --val dataprep/demo_pictures/val --out $out/demo --no-tensorboard"
[ -n "$quick" ] && demo="$demo --max-steps 3"
# shellcheck disable=SC2086
within 90 "$python" fastrot/train.py demo --device "$device" $demo
exit $failed
