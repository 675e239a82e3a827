"""Every Triton kernel, compiled for GPUs that are not here, against a committed baseline.

    .venv/bin/python tests/perf/aot.py [--rebaseline] [--quiet] [--plant]

The operations run on meta tensors at the shapes in use and their launches are recorded, so what is compiled is what would
be launched: the same constants, and the same knowledge of which sizes and addresses divide by 16. From the binaries:
registers a thread, stack (spilled) bytes, shared memory, and matrix instructions. Exits with 1 on a spill, on registers
or shared memory more than 10 % above the baseline of this Triton version, on a dot without matrix instructions, or where
the baseline lacks a kernel. `--rebaseline` writes results/bench/kernels_aot.json anew for this version; `--quiet` prints
faults alone; `--plant` gives the tiles half their threads, and so twice the registers, to see it fail.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import infonce_triton, linear_nll_triton
from kernels.infonce import symmetric_infonce
from kernels.linear_nll import linear_nll

BASELINE = Path(__file__).resolve().parents[2] / "results" / "bench" / "kernels_aot.json"
GROWTH = 1.10
TUNING = {"BM", "BN", "BK", "BLOCK", "TP"}  # not part of a kernel's name: a change of these is compared too
DOTS = ("lse_kernel", "u_kernel")
HEADS = {"smollm2": (576, 49152), "mistral-7b": (4096, 32000), "llama3-70b": (8192, 128256)}  # D, V


class Recorder:
    """Stands in for a kernel and notes what it is launched with."""

    def __init__(self, kernel, seen: dict):
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid):
        def launch(*args, **options):
            signature, constants, attributes, names = {}, {}, {}, self.kernel.arg_names
            values = dict(zip(names, args)) | {k: v for k, v in options.items() if k in names}
            for place, name in enumerate(names):
                value, fixed = values[name], self.kernel.params[place].do_not_specialize
                if isinstance(value, torch.Tensor):
                    kind = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64"}
                    signature[name], divisible = "*" + kind[value.dtype], True
                elif self.kernel.params[place].is_constexpr or (value == 1 and not fixed):
                    signature[name], constants[(place,)], divisible = "constexpr", value, False
                else:
                    signature[name], divisible = "i32" if abs(value) < 2**31 else "i64", value % 16 == 0 and not fixed
                if divisible:
                    attributes[(place,)] = [["tt.divisibility", 16]]
            options = {k: v for k, v in options.items() if k not in names}
            flags = [f"{names[k[0]]}={v}" for k, v in constants.items() if names[k[0]] not in TUNING]
            types = [f"{s}{'/16' if (k,) in attributes else ''}" for k, s in enumerate(signature.values()) if s != "constexpr"]
            key = " ".join([self.kernel.__name__, *flags, ",".join(types)])
            self.seen[key] = (self.kernel, signature, constants, attributes, options)
        return launch


def launches(heads=tuple(HEADS), dtypes=(torch.bfloat16, torch.float16)) -> dict:
    """Every different launch of the operations at the shapes in use, forward and backward."""
    seen, replaced = {}, []
    for module in (infonce_triton, linear_nll_triton):
        for name, kernel in list(vars(module).items()):
            if isinstance(kernel, triton.runtime.JITFunction) and name.endswith("_kernel"):
                replaced.append((module, name, kernel))
                setattr(module, name, Recorder(kernel, seen))
    try:
        for C, R in ((2, 2), (4, 4), (64, 64)):
            for x, *rest in ((torch.empty(1, C, R), None, None),
                             (torch.empty(80 * C * R), torch.empty(C * R + 1, dtype=torch.int64), (1, C, R))):
                rest = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in rest]
                symmetric_infonce(x.to("meta").requires_grad_(), *rest, impl="triton").backward()
        for dtype in dtypes:
            for head in heads:
                D, V = HEADS[head]
                x, w = torch.empty(1280, D, dtype=dtype, device="meta"), torch.empty(V, D, dtype=dtype, device="meta")
                target = torch.empty(1280, dtype=torch.int64, device="meta")
                for mode in ("store", "recompute", "frozen_head", "loss_only"):
                    leaf = [t.detach().requires_grad_(mode != "loss_only" and (t is x or mode != "frozen_head")) for t in (x, w)]
                    nll = linear_nll(*leaf, target, mode=mode, impl="triton")
                    if nll.requires_grad:
                        nll.backward(torch.empty_like(nll))
        bias = torch.empty(256_000, dtype=torch.bfloat16, device="meta")  # Gemma's vocabulary and soft-cap
        for mode in ("store", "recompute"):
            leaf = [torch.empty(n, 2304, dtype=torch.bfloat16, device="meta").requires_grad_() for n in (320, 256_000)]
            linear_nll(*leaf, torch.empty(320, dtype=torch.int64, device="meta"), bias=bias, softcap=30.0, mode=mode,
                       impl="triton").backward(torch.empty(320, device="meta"))
    finally:
        for module, name, kernel in replaced:
            setattr(module, name, kernel)
    return seen


def compile_for(arch: int, kernel, signature, constants, attributes, options) -> dict:
    """Registers, stack bytes, shared bytes and matrix instructions of one launch on sm_<arch>."""
    binary = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
                            target=GPUTarget("cuda", arch, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    count = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {"registers": count["REG"], "spilled": count["STACK"] + count["LOCAL"], "shared": binary.metadata.shared,
            "matrix": len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)", binary.asm["ptx"]))}


def measure(seen: dict, archs=(80, 90)) -> dict:
    return {f"sm_{arch} {key}": compile_for(arch, *launch) for key, launch in seen.items() for arch in archs}


def compare(found: dict, baseline: dict) -> list[str]:
    """What is worse than the baseline, a line each."""
    faults = []
    for key, row in found.items():
        if row["spilled"]:
            faults.append(f"{key}: spills {row['spilled']} bytes")
        if key.split()[1] in DOTS and not row["matrix"]:
            faults.append(f"{key}: a dot without matrix instructions")
        before = baseline.get(key)
        if before is None:
            faults.append(f"{key}: not in the baseline (a new kernel or new constants: --rebaseline)")
            continue
        faults += [f"{key}: {k} {before[k]} -> {row[k]}" for k in ("registers", "shared") if row[k] > GROWTH * before[k]]
    return faults


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rebaseline", action="store_true")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--plant", action="store_true")
    args = parser.parse_args()
    if args.plant:
        linear_nll_triton.TILE["num_warps"] //= 2
    found = measure(launches())
    for key, row in () if args.quiet else found.items():
        print(f"{row['registers']:4d} registers {row['spilled']:4d} B spilled {row['shared']:7d} B shared "
              f"{row['matrix']:4d} matrix  {key}")
    record = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    if args.rebaseline:
        record[triton.__version__] = found
        BASELINE.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    if triton.__version__ not in record:
        print(f"no baseline for triton {triton.__version__}: known are {', '.join(record)}; make one with --rebaseline")
        return 1
    faults = compare(found, record[triton.__version__])
    if faults:
        print(*faults, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
