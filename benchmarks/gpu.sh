#!/bin/sh
# What `make gpu` runs on a machine with a GPU, which needs neither a network nor a checkout: tests, then benchmarks,
# each within its own time limit and each result written at once, the most important first.
#
#   $1 the interpreter that has torch   $2 folder of results   $3 cuda, or cpu to try the whole path without a GPU
#   $4 which part: tests train ops learn epoch, each under nine and a half minutes; or several, in quotes
#
# wheels/ holds packages that the machine lacks (make wheels PY=3.12), slice/ pictures (make slice). Without .git,
# COMMIT and DIRTY tell where the rows come from.
set -u
cd "$(dirname "$0")/.."
python=$1 out=$2 device=$3 parts=$4 quick= pictures= patience=1 failed=0
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

look="--seconds 20" # of the doctor
some= # loaders
turns="--seconds 2 --reps 2" # of the baseline
[ "$device" = cuda ] || quick=--quick look="--seconds 5 --batch 16" some="--only beton --only pack" turns="--seconds 0.3 --reps 1"
if [ -d slice/imagenet-sample ]; then
  pictures="--root slice/imagenet-sample"
else
  echo "no slice/imagenet-sample: what reads pictures is not measured (make slice)"
fi
best="compiled + folded + fused + graph" # what is expected of the forms; benchmarks/forms.py names all of them

# Each part is a function, and its limits add up by themselves. An empty word is no option.
# shellcheck disable=SC2086,SC2317,SC2329
part_tests() {
  if [ -z "$quick" ]; then
    within 520 "$python" -m pytest -q -m gpu tests
  else
    within 170 "$python" -m pytest -q tests/test_gpu.py # skipped one by one: the door, without a GPU behind it
  fi
}

# shellcheck disable=SC2086,SC2317,SC2329
part_train() {
  within 30 "$python" -m benchmarks.roofline --device "$device" $quick --out "$out"
  if [ -n "$pictures" ]; then
    within 190 "$python" -m benchmarks.bench_train --device "$device" $pictures $quick --out "$out" \
      --loaders pack held --seconds 80
    if [ -z "$quick" ]; then
      within 75 "$python" -m benchmarks.bench_train --device "$device" $pictures --out "$out" \
        --forms compiled --loaders synthetic beton shards
    fi
    within 120 "$python" -m benchmarks.baseline --device "$device" $pictures $quick --out "$out" $turns
    within 45 "$python" -m fastrot.doctor slice/imagenet-sample --preset decoupling-alexnet --device "$device" \
      $look
  else
    within 190 "$python" -m benchmarks.bench_train --device "$device" $quick --out "$out" --seconds 80
  fi
  within 45 "$python" -m benchmarks.scaling $quick --out "$out"
}

# shellcheck disable=SC2086,SC2317,SC2329
part_ops() {
  within 150 "$python" -m benchmarks.bench_ops --device "$device" $quick --out "$out"
  if [ -n "$pictures" ]; then
    within 120 "$python" -m benchmarks.bench_loaders $pictures --device "$device" --quick $some --out "$out"
  fi
  train=synthetic:2000
  [ -z "$pictures" ] || train=prepared/imagenet-sample-256-q90.beton # as bench_loaders made it
  run="decoupling-alexnet --data $train --batch 64 --epochs 30 --validate-every 10 --no-tensorboard"
  demo="demo --data dataprep/demo_pictures/train --val dataprep/demo_pictures/val --no-tensorboard"
  if [ -n "$quick" ]; then
    run="$run --max-steps 3 --batch 8 --image-size 64 --backbone.width 0.25 --backbone.kernel 5 --backbone.stride 2"
    demo="$demo --max-steps 3"
  fi
  within 60 "$python" -m benchmarks.bench_train --device "$device" --out "$out" --run -- $run
  within 60 "$python" -m benchmarks.bench_train --device "$device" --out "$out" --run -- $demo
}

# shellcheck disable=SC2086,SC2317,SC2329
part_learn() {
  if [ ! -d slice/imagenette128 ]; then
    echo "no slice/imagenette128: nothing is learnt (make slice)"
    return
  fi
  learn="-m benchmarks.bench_learning --root slice/imagenette128 --device $device $quick --out $out"
  if [ -n "$quick" ]; then
    within 110 "$python" $learn --tasks rotnet --forms "bf16 eager"
  else
    within 255 "$python" $learn --tasks rotnet --forms "bf16 $best"
    within 255 "$python" $learn --tasks decoupling --forms "bf16 $best"
  fi
}

# shellcheck disable=SC2086,SC2317,SC2329
part_epoch() {
  if [ -z "$pictures" ]; then
    failed=1
    return
  fi
  epoch="-m benchmarks.bench_train --epoch --device $device $pictures $quick --out $out"
  if [ -n "$quick" ]; then
    within 110 "$python" $epoch
  else
    within 270 "$python" $epoch --form "$best"
    within 245 "$python" $epoch --form compiled
  fi
}

for part in $parts; do
  "part_$part"
done
exit $failed
