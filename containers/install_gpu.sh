#!/bin/bash
# %post of the GPU images: packages of gpu.txt into the vendor's PyTorch, CUDA ones compiled for one architecture.
# Usage: install_gpu.sh MACHINE CUDA_ARCH TORCH      for instance: install_gpu.sh aarch64 9.0 2.13
# Nothing replaces the vendor's torch: it is built for the machine, and a torch from a package index is another one.
set -euo pipefail
machine=$1 cuda_arch=$2 torch=$3
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
list=$here/gpu.txt
fail() { echo "install_gpu.sh: $*" >&2; exit 1; }

[ "$(uname -m)" = "$machine" ] || fail "this definition is for $machine, and this machine is $(uname -m): build it there"
command -v nvcc > /dev/null || fail "the base image has no CUDA compiler (nvcc), which causal-conv1d and mamba-ssm need"
found=$(python3 -c 'import torch; print(torch.__version__)')
case $found in
  "$torch" | "$torch".*) ;;
  *) fail "the base image has torch $found, and hpc-gen is tested with $torch: take the release of the base that has it" ;;
esac

# the base constrains packages to versions of its own; ours are those of pyproject.toml, and only its builds are kept
unset PIP_CONSTRAINT
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
python3 - > "$constraints" << 'PYTHON'
import importlib.metadata

for name in ("torch", "torchvision", "triton", "pytorch-triton", "transformer-engine", "flash-attn"):
    try:
        print(f"{name}=={importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
        pass
PYTHON
pip=(python3 -m pip install --no-cache-dir --constraint "$constraints")

compiled='^(causal-conv1d|mamba-ssm)=='
grep -vE "$compiled" "$list" > "$constraints.plain"
"${pip[@]}" --requirement "$constraints.plain"
rm -f "$constraints.plain"

# compiled against the vendor's torch (no build isolation) and never taken as a ready wheel, which is for another torch
export TORCH_CUDA_ARCH_LIST=$cuda_arch MAX_JOBS=${MAX_JOBS:-4}
export CAUSAL_CONV1D_FORCE_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE
grep -E "$compiled" "$list" | while read -r package; do
  "${pip[@]}" --no-build-isolation --no-binary "${package%%==*}" "$package" < /dev/null
done

after=$(python3 -c 'import torch; print(torch.__version__)')
[ "$after" = "$found" ] || fail "a package has replaced torch $found by $after"
python3 -m compileall -q "$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || true  # bytecode
