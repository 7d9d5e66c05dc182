#!/bin/sh
# What `make gpu` runs on a machine with a GPU, which needs neither a network nor a checkout: tests, then benchmarks,
# each within its own time limit and each result written at once. Under nine and a half minutes in all.
#
#   $1 the interpreter that has torch   $2 folder of results   $3 cuda, or cpu to try the whole path without a GPU
#
# wheels/ holds packages that the machine lacks (make wheels PY=3.12), slice/ pictures (make slice). Without .git,
# COMMIT and DIRTY tell where the rows come from.
set -u
cd "$(dirname "$0")/.."
python=$1 out=$2 device=$3 quick= some= pictures= patience=1 failed=0
[ "$device" = cuda ] || patience=4 # two busy cores are slower than what the limits are made for
if [ -z "${COMMIT:-}" ] && [ ! -e .git ]; then
  echo "fastrot: a row needs its commit, and there is no .git here: say make gpu COMMIT=... DIRTY=0 or 1" >&2
  exit 2
fi
export PYTHONUNBUFFERED=1
mkdir -p "$out"

within() { # seconds, then the command; five more seconds to clean up in
  limit=$(($1 * patience))
  shift
  printf '\n$ %s\n' "$*"
  timeout -k 5 "$limit" "$@" || { echo "status $? from: $*"; failed=1; }
}

if ls wheels/*.whl >/dev/null 2>&1; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
  export PYTHONPATH
  within 25 "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" wheels/*.whl
fi
"$python" -c '
import importlib.util, sys
needs = "torch torchvision numpy PIL cv2 simplejpeg tyro rich tensorboard matplotlib yaml jaxtyping beartype pytest"
lacks = [name for name in needs.split() if not importlib.util.find_spec(name)]
sys.exit(f"fastrot: {sys.executable} lacks {lacks}: put wheels of them into wheels/ (make wheels)" if lacks else 0)
' || exit 1

if [ "$device" = cuda ]; then
  within 170 "$python" -m pytest -q -m gpu tests
else
  quick=--quick
  some="--only beton --only pack"
  within 170 "$python" -m pytest -q tests/test_gpu.py # skipped one by one: the door, without a GPU behind it
fi
# shellcheck disable=SC2086  # an empty word is no option
within 90 "$python" -m benchmarks.bench_ops --device "$device" $quick --out "$out"
train=synthetic:2000
if [ -d slice/imagenet-sample ]; then
  pictures="--root slice/imagenet-sample"
  train=prepared/imagenet-sample-256-q90.beton # as the next two commands make it
  # shellcheck disable=SC2086
  within 70 "$python" -m benchmarks.bench_loaders $pictures --device "$device" --quick $some --out "$out"
else
  echo "no slice/imagenet-sample: the loaders are not measured, and decoupling learns from noise (make slice)"
fi
# shellcheck disable=SC2086
within 110 "$python" -m benchmarks.bench_train --preset decoupling-alexnet --device "$device" $pictures $quick --out "$out"
run="decoupling-alexnet --data $train --batch 64 --epochs 30 --validate-every 10 --no-tensorboard"
demo="demo --data dataprep/demo_pictures/train --val dataprep/demo_pictures/val --no-tensorboard"
if [ -n "$quick" ]; then
  run="$run --max-steps 3 --batch 8 --image-size 64 --backbone.width 0.25 --backbone.kernel 5 --backbone.stride 2"
  demo="$demo --max-steps 3"
fi
# shellcheck disable=SC2086
within 30 "$python" -m benchmarks.bench_train --device "$device" --out "$out" --run -- $run
# shellcheck disable=SC2086
within 30 "$python" -m benchmarks.bench_train --device "$device" --out "$out" --run -- $demo
exit $failed
