#!/bin/sh
# What `make demo` runs: prepare pictures, train, show. Each command is printed, to be typed again.
# $1: a folder of pictures of your own; with train/ and val/ in it, val/ is what the net is judged on.
set -eu
cd "$(dirname "$0")/.."
data=${1:-}
if [ -z "$data" ]; then
  root=dataprep/demo_pictures name=demo
  options=
elif [ -d "$data" ]; then
  root=$data name=demo-$(basename "$(cd "$data" && pwd)")
  options="--short-side 96 --limit 20000 --allow-rejects"  # 64-pixel crops need no more
else
  echo "fastrot: DATA=$data is no folder: name a folder of pictures" >&2
  exit 2
fi
mkdir -p prepared

say() {
  printf '\n$ %s\n' "$*"
  "$@"
}

# shellcheck disable=SC2086  # the options are words
if [ -d "$root/train" ] && [ -d "$root/val" ]; then
  for split in train val; do
    say python dataprep/to_ffcv.py --source imagefolder --root "$root" --split $split \
      --out "prepared/$name-$split.beton" $options
  done
  say torchrun fastrot/train.py demo --data "prepared/$name-train.beton" \
    --val "prepared/$name-val.beton" --out "runs/$name"
else
  say python dataprep/to_ffcv.py --source imagefolder --root "$root" --out "prepared/$name.beton" $options
  say torchrun fastrot/train.py demo --data "prepared/$name.beton" --out "runs/$name"
fi
