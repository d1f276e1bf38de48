#!/usr/bin/env bash
# Checks the CUDA side on a machine with a GPU, without a network:
#
#     tools/gpu_check.sh OUT [STEP...]
#
# Steps, all of them by default: environment, build (the package, into OUT/work), pytest (operators, no skip for want of
# a GPU), resources (registers and spills), cases (the kernels without torch), sanitizers (compute-sanitizer's memcheck,
# racecheck, initcheck and synccheck on those), benchmark.
# Needs python3 with torch >= 2.10, setuptools, pybind11, pytest and hypothesis; nvcc, cmake, ninja, compute-sanitizer.
# PYTHON and CUDA_ARCHITECTURES (default: that of the GPU) may be set. Every step writes OUT/STEP.log; the verdicts,
# with the environment and the results, go to OUT/gpu_check.json. Exits 1 when a step failed.

# The steps are functions called by their names.
# shellcheck disable=SC2329
set -uo pipefail

usage="usage: tools/gpu_check.sh OUT [environment|build|pytest|resources|cases|sanitizers|benchmark ...]"
[ $# -ge 1 ] || { echo "$usage" >&2; exit 2; }
mkdir -p "$1" || exit 1
out="$(cd "$1" && pwd)"
shift
[ $# -gt 0 ] || set -- environment build pytest resources cases sanitizers benchmark
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
root="$PWD"
python="${PYTHON:-python3}"
architectures="${CUDA_ARCHITECTURES:-native}"
work="$out/work"
site="$work/site"
mkdir -p "$work"

# Python files and the compiled library both from the build under test, never from the source folder.
in_package() {
  (cd "$work" && PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 "$@")
}

environment() {
  "$python" - "$out/environment.json" <<'PY'
import json, platform, subprocess, sys

def line(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"none: {error}"

import torch

facts = {
    "commit": line("git", "rev-parse", "HEAD"),
    "changed_files": line("git", "status", "--porcelain", "--untracked-files=no").splitlines(),
    "python": platform.python_version(),
    "machine": platform.platform(),
    "torch": torch.__version__,
    "torch_cuda": torch.version.cuda,
    "nvcc": line("nvcc", "--version").splitlines()[-1:],
    "cmake": line("cmake", "--version").splitlines()[:1],
    "compute_sanitizer": line("compute-sanitizer", "--version").splitlines()[-1:],
    "nvidia_smi": line("nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv"),
    "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
}
with open(sys.argv[1], "w", encoding="utf-8") as file:
    json.dump(facts, file, indent=2)
print(json.dumps(facts, indent=2))
PY
}

build() {
  TIMM_EXT_CUDA=1 "$python" -m pip install --no-build-isolation --no-deps --no-index --upgrade \
    --target "$site" "$root" &&
    in_package "$python" -c 'import json, timm_ext; print(json.dumps(timm_ext.build_info(), indent=2))'
}

pytest() {
  # The tests are copied: beside the sources, "import timm_ext" would find the source folder.
  rm -rf "$work/python_tests" && cp -r "$root/python_tests" "$root/pyproject.toml" "$work" || return 1
  FAIL_WITHOUT_CUDA=1 in_package "$python" -m pytest -q -p no:cacheprovider --junitxml="$out/pytest.xml" \
    python_tests/ops python_tests/fisher/test_fused.py
}

resources() {
  in_package "$python" "$root/benchmarks/cuda_resources.py" "$out/cuda_resources.json"
}

build_cases() {
  cmake --fresh -S "$root/csrc/tests/gpu" -B "$work/cases" -G Ninja -DCMAKE_CUDA_ARCHITECTURES="$architectures" &&
    cmake --build "$work/cases"
}

cases() {
  build_cases && "$work/cases/test_on_gpu"
}

sanitizers() {
  local failed=0 tool
  build_cases || return 1
  for tool in memcheck racecheck initcheck synccheck; do
    echo "== $tool"
    if compute-sanitizer --tool "$tool" --error-exitcode 9 "$work/cases/test_on_gpu" quick; then
      echo "$tool: clean"
    else
      echo "$tool: failed with status $?"
      failed=1
    fi
  done
  return "$failed"
}

benchmark() {
  # Run from the work folder: the package of the checkout, which is not built, must not be found.
  ln -sfn "$root/benchmarks" "$work/benchmarks"
  in_package "$python" -m benchmarks.merge "$out/merge_cuda.json" --device cuda --segments layers kernels unaligned &&
    in_package "$python" -m benchmarks.merge "$out/merge_cuda_bfloat16.json" --device cuda --dtype bfloat16 \
      --elements 64000000 --rounds 10 &&
    in_package "$python" -m benchmarks.conv_square "$out/conv_square_cuda.json" --device cuda &&
    in_package "$python" -m benchmarks.fisher "$out/fisher_cuda.json" --device cuda --network "isensee2017 16" \
      --edge 32 128 --batch 2 --rivals ours "ours one by one" loop
}

summary() {
  "$python" - "$out" <<'PY'
import json, re, sys
from pathlib import Path

out = Path(sys.argv[1])

def read(name):
    path = out / name
    return json.loads(path.read_text()) if path.exists() else None

steps = {}
for row in (out / "steps.tsv").read_text().splitlines():
    name, status, seconds = row.split("\t")
    steps[name] = {"passed": status == "0", "status": int(status), "seconds": int(seconds)}
log = out / "sanitizers.log"
verdicts = dict(re.findall(r"^(\w+): (clean|failed.*)$", log.read_text(), re.MULTILINE)) if log.exists() else {}
cases = out / "cases.log"
counts = re.findall(r"^\d+ checks, \d+ failed$", cases.read_text(), re.MULTILINE) if cases.exists() else []
tests = out / "pytest.xml"
suite = re.search(r"<testsuite [^>]*>", tests.read_text()) if tests.exists() else None
result = {
    "environment": read("environment.json"),
    "steps": steps,
    "pytest": dict(re.findall(r'(tests|failures|errors|skipped)="(\d+)"', suite.group())) if suite else None,
    "resources": read("cuda_resources.json"),
    "cases": counts[-1] if counts else None,
    "sanitizers": verdicts,
    "merge_float32": read("merge_cuda.json"),
    "merge_bfloat16": read("merge_cuda_bfloat16.json"),
    "conv_square": read("conv_square_cuda.json"),
    "fisher": read("fisher_cuda.json"),
}
(out / "gpu_check.json").write_text(json.dumps(result, indent=2) + "\n")
PY
}

: >"$out/steps.tsv"
failed=0
for step in "$@"; do
  case "$step" in
    environment | build | pytest | resources | cases | sanitizers | benchmark) ;;
    *)
      echo "gpu_check: unknown step '$step'; $usage" >&2
      exit 2
      ;;
  esac
  echo "=== $step"
  rm -f "$out/$step.log"
  begin="$SECONDS"
  "$step" </dev/null 2>&1 | tee "$out/$step.log"
  status="${PIPESTATUS[0]}"
  printf '%s\t%s\t%s\n' "$step" "$status" "$((SECONDS - begin))" >>"$out/steps.tsv"
  [ "$status" -eq 0 ] || { echo "=== $step failed with status $status"; failed=1; }
done
summary || failed=1
echo "=== verdicts in $out/gpu_check.json"
exit "$failed"
