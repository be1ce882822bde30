#!/usr/bin/env bash
# Times two ONNX models with TensorRT's trtexec and prints them side by side. Needs a GPU.
#
#     tools/bench/trtexec.sh original.onnx pruned.onnx [-- FLAG...]
#
# Each file gets the flags that `onnxprune check` recommends for it (shapes of dynamic inputs,
# --stronglyTyped, --sparsity=enable) if onnxprune is on the PATH; what follows -- goes to both.
# TRTEXEC names another trtexec. What trtexec said is kept in the folder that is printed last.
set -euo pipefail

trtexec="${TRTEXEC:-trtexec}"
complain() {
    echo "trtexec.sh: $1" >&2
    exit "$2"
}

files=()
while (($#)) && [[ "$1" != "--" ]]; do
    files+=("$1")
    shift
done
(($# == 0)) || shift
((${#files[@]} == 2)) || complain "give two models: trtexec.sh A.onnx B.onnx [-- FLAG...]" 2
for file in "${files[@]}"; do
    [[ -f "$file" ]] || complain "'$file' is not a file" 2
done
command -v "$trtexec" > /dev/null ||
    complain "there is no '$trtexec' (it comes with TensorRT; TRTEXEC=/path/to/trtexec names it)" 5

# Flags that a file asks for, a line each: all but the program and --onnx.
flags_of() {
    command -v onnxprune > /dev/null || return 0
    { onnxprune check "$1" --no-build --json 2> /dev/null || true; } | python3 -c '
import json, shlex, sys
text = sys.stdin.read()
print("\n".join(shlex.split(json.loads(text)["next"]["command"])[2:]) if text else "")'
}

folder="$(mktemp -d)"
number=0
for file in "${files[@]}"; do
    number=$((number + 1))
    mapfile -t own < <(flags_of "$file" | sed '/^$/d')
    log="$folder/$number.log"
    "$trtexec" --onnx="$file" --saveEngine="$folder/$number.engine" \
        ${own[@]+"${own[@]}"} "$@" > "$log" 2>&1 ||
        complain "trtexec failed on '$file': $(grep -F '[E]' "$log" | tail -n 1) (all of it: $log)" 4
    # "[I] Latency: min = 0.5 ms, max = 0.6 ms, mean = 0.55 ms, median = 0.54 ms, ..."
    median[number]="$(sed -n 's/.*\] Latency: .*median = \([0-9.]*\) ms.*/\1/p' "$log" | tail -n 1)"
    rate[number]="$(sed -n 's/.*\] Throughput: \([0-9.]*\) qps.*/\1/p' "$log" | tail -n 1)"
    [[ -n "${median[number]}" && -n "${rate[number]}" ]] ||
        complain "no latency in what trtexec said of '$file' (all of it: $log)" 4
    size[number]="$(wc -c < "$folder/$number.engine" | tr -d ' ')"
    rm "$folder/$number.engine"
done

row() {
    awk -v name="$1" -v a="$2" -v b="$3" \
        'BEGIN { printf "%-22s %14s %14s %8.3f\n", name, a, b, (a > 0 ? b / a : 0) }'
}
printf '%-22s %14s %14s %8s\n' "" "A" "B" "B / A"
row "median latency, ms" "${median[1]}" "${median[2]}"
row "throughput, qps" "${rate[1]}" "${rate[2]}"
row "engine, bytes" "${size[1]}" "${size[2]}"
echo "A: ${files[0]}"
echo "B: ${files[1]}"
echo "log: $folder"
