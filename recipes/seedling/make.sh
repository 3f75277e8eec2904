#!/usr/bin/env bash
# Makes the embedded model from nothing: text, tokenizer, pre-training. Further flags go to `espalier pretrain`.
#   cargo build --release && bash recipes/seedling/make.sh            (CPU: hours)
#   bash recipes/seedling/make.sh --device cuda:0 --dtype f32         (one GPU: minutes)
set -euo pipefail
cd "$(dirname "$0")/../.."
espalier="${ESPALIER_BIN:-target/release/espalier}"
rows="${SEEDLING_ROWS:-700000}"
mkdir -p build/seedling
"$espalier" synth --samples "$rows" --seed 1 --out build/seedling/train.jsonl
"$espalier" synth --samples 2000 --seed 1 --test --out build/seedling/test.jsonl
"$espalier" tokenizer --data build/seedling/train.jsonl --limit-rows 60000 --vocab-size 2048 --out build/seedling/tokenizer
"$espalier" pretrain recipes/seedling/recipe.toml --overwrite "$@"
