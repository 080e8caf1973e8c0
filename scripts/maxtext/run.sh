#!/bin/sh
# run.sh BUILD TORCH_PYTHON MAXTEXT_PYTHON: models and logits, a `shardconv run` for every case, and the check. See README.md.
set -eu
build=$1 torch=$2 maxtext=$3
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$here/../.."

"$torch" "$here/make_models.py" "$build"
rm -rf "$build/out"
for config in "$build"/configs/*.toml; do
    "$torch" -m shardconv run --quiet --executor local "$config"
done
status=0
"$maxtext" "$here/check_loads.py" "$build" --table "$build/table.md" 2> "$build/maxtext.log" || status=1
sharded="llama3.1 mixtral gemma2 qwen3-tied"
"$maxtext" "$here/check_loads.py" "$build" --devices 4 --only $sharded --table "$build/table4.md" 2> "$build/maxtext4.log" || status=1
exit $status
