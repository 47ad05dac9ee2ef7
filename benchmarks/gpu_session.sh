#!/usr/bin/env bash
# Everything that waits for a GPU, the most telling first, in about six minutes.
#
#   benchmarks/gpu_session.sh               on a machine with a GPU; again: goes on where it stopped
#   benchmarks/gpu_session.sh --rehearse    the same parts over tiny shapes of a CPU
#   OUT=FOLDER benchmarks/gpu_session.sh    also copies each new JSON to FOLDER as soon as a part has ended
#
# Each part has a limit of its own in seconds, and writes its rows into benchmarks/results as it goes: one that fails or
# runs out of time takes nothing from the others. Nothing has to be installed: the library is taken from this checkout.
set -uo pipefail
cd "$(dirname "$0")"
export PYTHONPATH="$PWD/..:${PYTHONPATH:-}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
rehearse=() patience=1
if [ "${1:-}" = --rehearse ]; then rehearse=(--rehearse) patience=10; fi  # CPUs are slow
begun=$(mktemp)
failed=0

part() { # NAME LIMIT COMMAND...
    local name=$1 limit=$(($2 * patience)) start=$SECONDS code=0
    shift 2
    echo "== $name (at most $limit s)"
    timeout --kill-after=5 "$limit" "$python" "$@" "${rehearse[@]}" || code=$?
    echo "== $name: $((SECONDS - start)) s, exit code $code"
    [ "$code" = 0 ] || failed=$((failed + 1))
    if [ -n "${OUT:-}" ]; then
        find results -name '*.json' -newer "$begun" -exec cp {} "$OUT" \;
    fi
}

part "correctness in three dtypes" 90 gpu_kernels.py --checks
part "six kernels" 120 gpu_kernels.py --seconds 100 --only "gqa 32/8 b16 32768" --only "mla 32 512+64 b16 32768" \
    --only "mqa 32 b16 32768" --only "int4 32/8 b16 32768" --only "ragged 32/8 b16 32768" --only "append 32/8 b16"
part "whole decode steps" 150 gpu_decode.py --seconds 130 --session
part "conversion and uptraining" 90 gpu_conversion.py
rm -f "$begun"
echo "$failed parts failed"
exit "$failed"
