#!/usr/bin/env bash
# The long part of the native tests: soak.sh FOLDER [SECONDS], for each fuzzer so long (600), in all some 20 minutes on two cores.
# Everything is built in FOLDER, which keeps the fuzzers' corpora. Needs what the library needs, and clang.
set -euo pipefail
native=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=$1 seconds=${2:-600}
mkdir -p "$folder"

built() { # FOLDER OPTION...
  cmake -S "$native" -B "$folder/$1" -DCMAKE_BUILD_TYPE=RelWithDebInfo "${@:2}" > "$folder/$1.log"
  cmake --build "$folder/$1" --parallel "$(nproc)" >> "$folder/$1.log"
}

tested() { # FOLDER OPTION...
  built "$@"
  ctest --test-dir "$folder/$1" --output-on-failure >> "$folder/$1.log" || { tail -n 40 "$folder/$1.log"; exit 1; }
}

echo '10,000 images or more under AddressSanitizer and UndefinedBehaviorSanitizer'
tested address -DGLANCE_SANITIZE=address,undefined
export ASAN_OPTIONS=quarantine_size_mb=4:thread_local_quarantine_size_kb=64 # or what was freed looks like growth
"$folder/address/tests/glance_soak" 180 8 10000

echo '8 threads for 60 seconds under ThreadSanitizer'
tested thread -DGLANCE_SANITIZE=thread
"$folder/thread/tests/glance_soak" 60 8

echo "$seconds seconds of each fuzzer, side by side"
built fuzz -DGLANCE_FUZZ=ON -DGLANCE_TESTS=OFF -DCMAKE_CXX_COMPILER=clang++
mkdir -p "$folder/corpus"/{manifest,model,tokenizer}
for bundle in "$native"/../out/*.bundle; do
  [[ -d $bundle ]] || continue # without one, they begin with nothing
  cp "$bundle/bundle.json" "$folder/corpus/manifest/"
  cp "$bundle/decoder.float32.onnx" "$folder/corpus/model/"
done
{ printf 'a red star\0'; cat "$native/../examples/shapes/model/tokenizer/tokenizer.json"; } > "$folder/corpus/tokenizer/clip"
running=()
for name in manifest model tokenizer; do
  "$folder/fuzz/fuzz/glance_fuzz_$name" -max_total_time="$seconds" -max_len=100000 -timeout=60 -verbosity=0 \
    -print_final_stats=1 -artifact_prefix="$folder/$name-" "$folder/corpus/$name" > "$folder/$name.log" 2>&1 &
  running+=($!)
done
for process in "${running[@]}"; do
  wait "$process" || { tail -n 30 "$folder"/{manifest,model,tokenizer}.log; exit 1; }
done
for name in manifest model tokenizer; do
  tried=$(sed -n 's/^stat::number_of_executed_units: *//p' "$folder/$name.log")
  echo "$name: $tried inputs, $(find "$folder/corpus/$name" -type f | wc -l) that reach something new, none that crashes"
done
