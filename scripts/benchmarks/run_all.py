"""Run every benchmark and write docs/benchmarks.md. Under 30 minutes on two cores.

    python scripts/benchmarks/run_all.py [--quick] [--only NAME ...] [--both-cpus] [--records FILE] [--page docs/benchmarks.md]

With --both-cpus what trains is measured a second time, in some 12 minutes more, on a lesser CPU that ONEDNN_MAX_CPU_ISA makes of this one.
Each benchmark is a process of its own, one after the other. Its rows are appended to the file of records as they come; the page is written
from the last record of each row. A benchmark that fails or exceeds its time is reported on the page and in the exit status.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from common import CAP, ROOT, machine, versions

HERE = Path(__file__).resolve().parent
# Benchmark -> minutes it is expected to take on two quiet cores. Three times as many are allowed, and ten in any case.
MINUTES = {
    "train_step": 5.5, "combined_step": 5.2, "busy": 1.1, "loader": 4, "augment": 0.4, "contrastive_loss": 2, "accumulate": 1.8,
    "scaling": 2.7, "order": 0.6, "startup": 2, "towers": 0.4, "gpu_train_step": 0.2, "build": 2, "index": 0.5, "validate": 1.5,
    "decode": 0.09,
}  # fmt: skip
ON_LESSER_CPU = ("train_step", "combined_step")
LESSER_CPU = {CAP: "AVX512_CORE"}  # fp32 with AVX-512, no bf16


def known() -> list[str]:
    """Every benchmark here, in the table's order; those it does not know at the end."""
    there = {path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py")}
    return [name for name in MINUTES if name in there] + sorted(there - set(MINUTES))


def run(name: str, records: Path, quick: bool, env: dict[str, str]) -> str | None:
    """None, or what went wrong."""
    command = [sys.executable, str(HERE / f"bench_{name}.py"), "--out", str(records), *(["--quick"] if quick else [])]
    print(f"\n== {name} {' '.join(f'{k}={v}' for k, v in env.items())}", flush=True)
    started = time.perf_counter()
    limit = max(600.0, 180 * MINUTES.get(name, 2))
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, env=os.environ | env)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    finally:
        if process.poll() is None:  # out of time, or interrupted: what it started goes with it
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    print(f"   {time.perf_counter() - started:.0f} s", flush=True)
    return None if code == 0 else f"exit status {code}: see its output"


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def page(lines: list[dict], failures: dict[str, str]) -> str:
    """The last record of each row as a Markdown page."""
    last = {(line["benchmark"], line["row"]): line for line in lines}
    order = known()
    rows = sorted(last.values(), key=lambda line: order.index(line["benchmark"]) if line["benchmark"] in order else len(order))
    places = sorted({(line["date"], line["machine"], ", ".join(f"{k} {v}" for k, v in line["versions"].items())) for line in rows})
    judged = [line for line in rows if line["met"] is not None]
    text = [
        "# Benchmarks", "",
        "Written by `python scripts/benchmarks/run_all.py` (`make bench`). Ours and the peer run alternately; a ratio is the median over",
        "rounds, with the smallest and the largest, and above 1 ours is better. What each script does, and how it sees to it that both do",
        "the same work, stands at its top.", "",
        *[f"- {date}: {where}; {what}" for date, where, what in places],
        f"- targets met: {sum(line['met'] for line in judged)} of {len(judged)}", "",
        "| row | ours | peer | ratio | target | met |", "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for line in rows:
        spread = line["ratio"]
        times = "" if spread is None else f"{spread['median']:.2f} ({spread['low']:.2f} to {spread['high']:.2f})"
        verdict = {True: "yes", False: "**no**", None: ""}[line["met"]]
        title = line["row"] + (" (quick)" if line["quick"] else "")
        text.append("| " + " | ".join(cell(part) for part in (title, line["ours"], line["peer"], times, line["target"], verdict)) + " |")
    text += ["", "## Commands", ""]
    text += [f"- {line}" for line in dict.fromkeys(f"`{line['command']}`" for line in rows)]
    if failures:
        text += ["", "## Failed", "", *[f"- {name}: {why}" for name, why in failures.items()]]
    return "\n".join(text) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every benchmark in its quick form: shows that they run")
    parser.add_argument("--only", nargs="+", default=None, choices=known(), help="these alone")
    parser.add_argument("--both-cpus", action="store_true", help=f"what trains also with {CAP}={LESSER_CPU[CAP]}")
    parser.add_argument("--records", type=Path, default=ROOT / "runs" / "benchmarks.jsonl", help="where rows are appended")
    parser.add_argument("--page", type=Path, default=None, help="the page to write (default: docs/benchmarks.md; quick: none)")
    parsed = parser.parse_args()
    if parsed.page is None and not parsed.quick:
        parsed.page = ROOT / "docs" / "benchmarks.md"
    print(f"{machine()}; {versions()}")
    parsed.records.parent.mkdir(parents=True, exist_ok=True)
    failures = {}
    for name in parsed.only or known():
        lesser = parsed.both_cpus and name in ON_LESSER_CPU
        for env in ({}, LESSER_CPU) if lesser else ({},):
            why = run(name, parsed.records, parsed.quick, env)
            if why:
                failures[" ".join([name, *env.values()])] = why
                print(f"   FAILED: {why}", flush=True)
    found = [json.loads(line) for line in parsed.records.read_text().splitlines()] if parsed.records.exists() else []
    lines = [line for line in found if parsed.quick or not line["quick"]]  # a quick run's figures never pass for measurements
    if parsed.page and (lines or failures):
        parsed.page.write_text(page(lines, failures))
        print(f"\n{parsed.page} written from {len(lines)} records")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
