#!/usr/bin/env bash
# Triton 3.6's interpreter runs no loop to an argument of the kernel where NumPy is 2.4 or newer
#
# One would expect the kernel tests of a project to run in Triton's interpreter (TRITON_INTERPRET=1) wherever pip installs torch: it
# takes the Triton that torch pins, and any NumPy. torch 2.10 and 2.11 pin Triton 3.6.0, which makes an array of one entry of every
# number that a kernel is given, and hands it to Python's range() as it is; NumPy 2.4 turns no such array into a number any more. So
# each loop up to an argument ends with InterpreterError. Bounds known when the kernel is compiled (tl.constexpr), branches, loads
# and stores work, which is why a small kernel still passes. With NumPy 2.3, or with Triton 3.7.1, the same kernel runs. Compiled for
# a GPU it is right either way: the interpreter alone is concerned.
#
# Seen with torch 2.11.0, Triton 3.6.0, Python 3.11 and 3.12; the sum of ten ones:
# NumPy 2.4.6, bound known: 10.0; NumPy 2.4.6, bound an argument: InterpreterError; NumPy 2.3.5, bound an argument: 10.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.11.0 numpy==2.4.6  # which takes triton==3.6.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --target "$folder/older" numpy==2.3.5
cat > "$folder/sum.py" <<'PYTHON'
import sys

sys.path[:0] = sys.argv[2:]  # another NumPy

import torch
import triton
import triton.language as tl


@triton.jit
def to_an_argument(x, out, n, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(x + at, mask=at < n, other=0.0)
    tl.store(out, tl.sum(total))


@triton.jit
def to_a_constant(x, out, n: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(x + at, mask=at < n, other=0.0)
    tl.store(out, tl.sum(total))


kernel, out = {"argument": to_an_argument, "constant": to_a_constant}[sys.argv[1]], torch.zeros(1)
assert triton.__version__ == "3.6.0", triton.__version__
try:
    kernel[(1,)](torch.ones(10), out, 10, BLOCK=4)
    print(out.item())
except Exception as error:
    print(type(error).__name__)
PYTHON
run() { TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/sum.py" "$@" 2> /dev/null; }
constant=$(run constant)
argument=$(run argument)
older=$(run argument "$folder/older")
echo "NumPy 2.4.6, bound known: $constant; NumPy 2.4.6, bound an argument: $argument; NumPy 2.3.5, bound an argument: $older"
[[ "$constant $argument $older" == "10.0 InterpreterError 10.0" ]]
