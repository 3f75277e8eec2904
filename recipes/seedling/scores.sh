#!/usr/bin/env bash
# Scores of a model on every generated skill, as a Markdown table: loss on unseen text, exact match where there is an answer.
#   bash recipes/seedling/scores.sh [MODEL]        (the embedded model if none is named)
set -euo pipefail
cd "$(dirname "$0")/../.."
espalier="${ESPALIER_BIN:-target/release/espalier}"
model="${1:-}"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
field() { grep -o "\"$1\":[-0-9.e]*" | head -1 | cut -d: -f2; }
echo "| skill | in the training text | loss per token | exact match |"
echo "|---|---|---|---|"
for skill in story sentence passage arithmetic copy reverse sort recall question instruct chat \
  slots labels tally swap units rotate_left rotate_right; do
  "$espalier" synth --skill "$skill" --test --samples 200 --seed 3 --out "$folder/$skill.jsonl" > /dev/null
  loss="$("$espalier" eval --model "$model" --data "$folder/$skill.jsonl" --whole-rows --json | field loss)"
  match="-"
  case "$skill" in
    story | sentence | passage) ;;
    *) match="$("$espalier" eval --model "$model" --data "$folder/$skill.jsonl" --metric exact-match --max-new-tokens 160 --json 2> /dev/null | field accuracy || true)" ;;
  esac
  case "$skill" in slots | labels | tally | swap | units | rotate_*) seen="no" ;; *) seen="yes" ;; esac
  [ "$match" = - ] || match="$(printf '%.0f %%' "$(echo "$match * 100" | bc)")"
  printf '| %s | %s | %.3f | %s |\n' "$skill" "$seen" "$loss" "$match"
done
