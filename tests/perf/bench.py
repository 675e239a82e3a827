"""`make bench`: every case of bench_cases.py, one table, one JSON object as the last line, the same under results/bench/,
and a row of history.jsonl (history.py). Each case's samples stay in .benchmarks, for `pytest-benchmark compare`.

    .venv/bin/python tests/perf/bench.py [--quick] [--only step|head|infonce] [--table]

`--quick` runs small cases and writes no record. `--only` runs one kind of case and replaces its rows in the record. `--table` runs nothing: it writes the tables of kernels/README.md from
the records bench_cpu.json and kernels_aot.json.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import history

ROOT = Path(__file__).resolve().parents[2]
RECORD, KERNELS, README = ROOT / "results/bench/bench_cpu.json", ROOT / "results/bench/kernels_aot.json", ROOT / "kernels/README.md"
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy", "pytest-benchmark")


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def run(quick: bool, only: str | None) -> dict:
    """The record of one run: machine, versions, commit, a row a case."""
    import pytest
    import torch
    from check import processor

    from repro.base.identity import commit

    os.environ |= {"BENCH_QUICK": "1" if quick else "0", "TRITON_INTERPRET": "0"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        code = pytest.main([str(Path(__file__).with_name("bench_cases.py")), "-q", "-W", "ignore", "--benchmark-json", str(out), "-p",
                            "no:cacheprovider", *([] if quick else ["--benchmark-autosave"]), "--benchmark-columns=median,rounds", "--override-ini", "python_files=bench_*.py", *(["-k", f"test_{only}"] if only else [])])
        if code:
            sys.exit(int(code))
        cases = json.loads(out.read_text())["benchmarks"]
    return {"benchmark": "bench", "machine": platform.machine(), "processor": processor(),
            "threads": torch.get_num_threads(), "device": "cpu", "quick": quick,
            "versions": {p: installed(p) for p in PACKAGES},
            "rows": [case["extra_info"] | {"commit": commit()} for case in cases]}


def title(row: dict) -> str:
    text = {"step": "step, {lengths} lengths, C=R={C}, {queries} queries a call", "infonce": "symmetric_infonce, C=R={C}",
            "head": "head of {head}: N {N}, D {D}, V {V}, {precision}"}[row["what"]].format(**row)
    return f"{text} ({row['note']})" if "note" in row else text


def table(record: dict) -> list[str]:
    """Markdown: a line an implementation of a case."""
    lines = ["| case | implementation | seconds, n | times ours [min, max] | GFLOP | peak MiB | held MiB | of the floor |",
             "|---|---|---|---|---|---|---|---|"]
    for row in record["rows"]:
        for name, x in row["implementations"].items():
            if "not_run" in x:
                lines.append(f"| {title(row)} | {name} | NOT RUN: {x['not_run']} | | | | | |")
                continue
            counted = [f"{x['flops'] / 1e9:.4g}", f"{x['peak_bytes'] / 2**20:.4g}",
                       f"{x['saved_bytes'] / 2**20:.4g}"] if "flops" in x else ["not counted"] * 3
            low, high = x["times_ours_min_max"]
            floor = f"{x['share_of_floor']:.0%}" if row["floor_flops"] else ""
            lines.append(f"| {title(row)} | {name} | {x['seconds']:.3g}, {x['rounds']} | {x['times_ours']:.2f} [{low:.2f}, "
                         f"{high:.2f}] | " + " | ".join(counted) + f" | {floor} |")
    return lines


def gpu_table(record: dict) -> list[str]:
    """Markdown: a line an implementation of a case, of a record of gpu.py."""
    lines = ["| case | implementation | ms p20, p50, p80 (n) | times ours [min, max] | FLOPs, times ours | of the floor | peak MiB | "
             "predicted MiB |", "|---|---|---|---|---|---|---|---|"]
    for each in record["rows"]:
        for name, x in each["implementations"].items():
            start = f"| {each['what']}: {each['case']} | {name} | "
            if "not_run" in x:
                lines.append(f"{start}NOT RUN: {x['not_run']} | | | | | |")
                continue
            predicted = each.get("predicted_bytes", {}).get(name)
            ratio = "{:.2f} [{:.2f}, {:.2f}]".format(x["times_ours"], *x["times_ours_min_max"]) if "times_ours" in x else "ours NOT RUN"
            lines.append(start + ", ".join(f"{ms:.3g}" for ms in x["ms"]) + f" ({x['rounds']}) | {ratio} | "
                         + (f"{x['flops_times_ours']:.2f}" if "flops_times_ours" in x else "") + " | " +
                         (f"{x['share_of_floor']:.0%}" if "share_of_floor" in x else "") + " | " +
                         ("" if x["peak_bytes"] is None else f"{x['peak_bytes'] / 2**20:.4g}") + " | " +
                         (f"{predicted / 2**20:.4g}" if predicted else "") + " |")
    return lines


def kernel_table(record: dict, triton: str) -> list[str]:
    lines = ["| kernel | registers sm_80, sm_90 | spilled bytes | shared bytes | matrix instructions |", "|---|---|---|---|---|"]
    for key in sorted(k.removeprefix("sm_80 ") for k in record[triton] if k.startswith("sm_80 ")):
        a, b = record[triton]["sm_80 " + key], record[triton]["sm_90 " + key]
        lines.append(f"| `{key}` | " + " | ".join(f"{a[k]}, {b[k]}" for k in ("registers", "spilled", "shared", "matrix")) + " |")
    return lines


def tables() -> dict[str, list[str]]:
    """Name -> the lines between its markers in kernels/README.md."""
    bench, kernels = json.loads(RECORD.read_text()), json.loads(KERNELS.read_text())
    told = (f"{bench['processor']}; torch {bench['versions']['torch']}, transformers {bench['versions']['transformers']}, "
            f"Liger {bench['versions']['liger-kernel']}, cut-cross-entropy {bench['versions']['cut-cross-entropy']}.")
    newest = bench["versions"]["triton"]
    return {"bench": [told, "", *table(bench)], "aot": [f"Triton {newest}.", "", *kernel_table(kernels, newest)],
            "gpu": gpu_records()}


def gpu_records() -> list[str]:
    """The tables of all records of gpu.py."""
    lines = []
    for path in sorted(RECORD.parent.glob("gpu_*.json")):
        record = json.loads(path.read_text())
        right = sum(row["right"] for row in record["errors"])
        versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items() if v)
        lines += [f"{record['device']}: {versions}; commit {record['commit']}; {right} of {len(record['errors'])} cases right; "
                  + (f"bf16 products at {record['tflops']:.0f} TFLOP/s, copies at {record['tbytes']:.2f} TB/s."
                     if "tflops" in record else "nothing timed."), "", *gpu_table(record), ""]
    return lines[:-1] or ["No record yet: not measured on a GPU."]


def with_tables(text: str) -> str:
    for name, lines in tables().items():
        start, end = f"<!-- {name}: tests/perf/bench.py --table -->", f"<!-- end of {name} -->"
        head, rest = text.split(start)
        text = head + "\n".join([start, *lines, end]) + rest.split(end)[1]
    return text


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=("step", "head", "infonce"))
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        README.write_text(with_tables(README.read_text()))
        return
    record = run(args.quick, args.only)
    if args.only and not args.quick and RECORD.exists():
        old = json.loads(RECORD.read_text())
        same = ("processor", "threads", "versions")
        if any(old[k] != record[k] for k in same):
            sys.exit("bench: --only needs a record of the same processor and versions; run all of it")
        rows = record["rows"] + [row for row in old["rows"] if row["what"] != args.only]
        record["rows"] = sorted(rows, key=lambda row: ("step", "head", "infonce").index(row["what"]))
    print(*table(record), sep="\n")
    if not args.quick:
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        history.update()
    print(json.dumps(record))


if __name__ == "__main__":
    main()
