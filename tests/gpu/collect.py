"""Turns what job.sh brought back into the committed results, results/STEP.json, and their table.

Usage: python tests/gpu/collect.py RUN [--into plugins/README.md]

RUN holds the unpacked archives of one run (or several folders of them); what it lacks stays as it is. With --into, the
summary table is put between the file's marks. Runs anywhere, on the standard library. --commit, --gpu and --date
name what an archive does not say itself.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tests" / "bench"))

from bench_plugin import put_between  # noqa: E402

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- gpu checks: begin -->", "<!-- gpu checks: end -->"
#: Result by the file that its step leaves.
SOURCES = {
    "conformance": "conformance.jsonl",
    "kernels": "kernels.json",
    "tensorrt85": "tensorrt85.json",
    "tensorrt85-accuracy": "tensorrt85-accuracy.json",
    "rtx": "rtx.json",
    "fused": "fused.json",
    "ranking": "ranking.json",
    "ranking-soak": "ranking-soak.json",
    "cpp_loader": "cpp_loader.json",
    "cpp_loader_fused": "cpp_loader_fused.json",
    "triton": "triton.json",
    "quantised-rtx": "quantised-tensorrt-rtx.json",
    "quantised-trt85": "quantised-tensorrt.json",
}
TIMINGS = {"tensorrt85": "tensorrt85-timing.json", "rtx": "rtx-timing.json"}
#: Results whose engines were compared with float64.
COMPARED = (*TIMINGS, "ranking", "quantised-rtx", "quantised-trt85")
SANITIZERS = ("memcheck", "racecheck", "initcheck")
_CLEAN = re.compile(r"ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards")
#: Folders of the machine that ran it say nothing.
_FOLDER = re.compile(r"(?<![\w.])/(?:[\w.+-]+/)+")
_LONG = 400

Json = dict[str, Any]


def without_bulk(value: Any) -> Any:
    """The same facts with shortened texts, and files without the folders they lay in."""
    if isinstance(value, dict):
        return {key: without_bulk(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_bulk(each) for each in value]
    if isinstance(value, str):
        return _FOLDER.sub("", value)[-_LONG:]
    return value


def of_checks(path: Path) -> Json:
    """What checks.py wrote; the output of commands stays only where a check failed."""
    content: Json = json.loads(path.read_text(encoding="utf-8"))
    for check in content["checks"]:
        if check["passed"]:
            for bulky in ("output", "stderr", "where"):
                check["facts"].pop(bulky, None)
    trimmed: Json = without_bulk(content)
    return trimmed


def of_conformance(path: Path) -> Json:
    """Counts and the worst error of each case, and the verdicts of compute-sanitizer's tools."""
    cases: dict[str, Json] = {}
    device, passed, failed = "", 0, []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("{"):
            continue
        entry = json.loads(line)
        if "device" in entry:
            device = entry["device"]
            continue
        case = cases.setdefault(f"{entry['case']} {entry.get('dtype', '')}".strip(), {"passed": 0})
        if entry["status"] == "pass":
            passed += 1
            case["passed"] += 1
        else:
            failed.append(without_bulk(entry))
        if "componentwise" in entry:
            case["worst"] = max(case.get("worst", 0.0), entry["componentwise"])
            case["bound"] = entry["bound"]
    sanitizers = {}
    for tool in SANITIZERS:
        log = path.with_name(f"{tool}.txt")
        if log.exists():
            text = log.read_text(encoding="utf-8", errors="replace")
            sanitizers[tool] = {"runs": text.count("== " + tool), "clean": len(_CLEAN.findall(text))}
    content: Json = {"name": "conformance", "summary": f"{passed} passed, {len(failed)} failed"}
    second = path.with_name("conformance_v2.jsonl")
    if second.exists():
        content["tensorrt8_library"] = second.read_text(encoding="utf-8").splitlines()[-1]
    return {**content, "failed": failed, "device": device, "sanitizers": sanitizers, "cases": cases}


def gpu_of(path: Path) -> str:
    """As conformance wrote it into its summary."""
    summary = path.with_name("summary.txt")
    found = re.search(r"^gpu: (.+?), ([\d.]+)", summary.read_text("utf-8"), re.M) if summary.exists() else None
    return f"{found[1]}, driver {found[2]}" if found else "unknown"


def provenance(path: Path, content: Json, given: argparse.Namespace) -> Json:
    """GPU, commit and date: of the step itself, else as given, else what the job folder was made from."""
    record = path.with_name("run.json")
    if record.exists():
        run = json.loads(record.read_text(encoding="utf-8"))
        return {name: run[name] for name in ("gpu", "commit", "date")} | {"commit_is": "recorded by the run"}
    job = content.get("facts", {}).get("job", {}).get("commit", "")
    return {
        "gpu": given.gpu or gpu_of(path),
        "commit": given.commit or job or "unknown",
        "date": given.date or "unknown",
        "commit_is": "named when the results were collected"
        if given.commit
        else "what the job folder was made from; the run recorded none",
    }


def collect(run: Path, given: argparse.Namespace) -> int:
    """Write every result that the run has; returns how many."""
    RESULTS.mkdir(exist_ok=True)
    written = 0
    for name, file in SOURCES.items():
        found = sorted(run.rglob(file), key=lambda path: path.stat().st_mtime)
        if not found:
            continue
        path = found[-1]
        content = of_conformance(path) if name == "conformance" else of_checks(path)
        content = {"run": provenance(path, content, given), **content}
        timing = sorted(run.rglob(TIMINGS[name])) if name in TIMINGS else []
        if timing:
            content["timing"] = of_checks(timing[-1])["checks"]
        target = RESULTS / f"{name}.json"
        target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"{target.name}: {content['summary']}, {target.stat().st_size / 1024:.0f} KB")
        written += 1
    return written


def comparisons(content: Json) -> Iterator[tuple[str, float, float]]:
    """(check, worst error, bound) of every engine that was compared with float64."""
    for check in content["checks"]:
        tensors = check["facts"].get("result", {}).get("tensors", [])
        if tensors:
            worst = max(tensors, key=lambda tensor: float(tensor["error"]) / float(tensor["bound"]))
            yield check["name"].split(":")[0], float(worst["error"]), float(worst["bound"])


def table_text() -> str:
    """Markdown of all committed results."""
    stored = {name: RESULTS / f"{name}.json" for name in SOURCES}
    results = {name: json.loads(path.read_text("utf-8")) for name, path in stored.items() if path.exists()}
    lines = ["| checks | result | GPU | commit | date |", "|---|---|---|---|---|"]
    notes, engines, times = [], [], []
    for name, content in results.items():
        run = content["run"]
        lines.append(f"| {name} | {content['summary']} | {run['gpu']} | {run['commit'][:12]} | {run['date']} |")
        notes += [f"- {name} failed: {failed}" for failed in content["failed"]]
        if name in COMPARED:
            engines += [
                f"| {name} | {label} | {error:.2g} | {bound:.2g} | {'pass' if error <= bound else '**FAIL**'} |"
                for label, error, bound in comparisons(content)
            ]
        if name in TIMINGS:
            times += [
                f"| {name} | {each['name'].split(':')[0]} | {each['facts']['median_ms']:.3f} | "
                f"{each['facts']['p90_ms']:.3f} |"
                for each in content.get("timing", [])
                if each["passed"]
            ]
        if name == "conformance":
            tools = ", ".join(
                f"{tool} {v['clean']} of {v['runs']} runs clean" for tool, v in content["sanitizers"].items()
            )
            notes.append(f"- compute-sanitizer: {tools or 'not run at this commit'}")
    missing = [name for name in SOURCES if name not in results]
    notes += [f"- {name}: no results yet" for name in missing]
    lines += ["", *notes, "", "| runtime | engine | worst error | allowed | |", "|---|---|---|---|---|", *engines]
    if times:
        lines += ["", "Device time of a batch of 8 sequences, 737 events:", ""]
        lines += ["| runtime | engine | median ms | p90 ms |", "|---|---|---|---|", *times]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of unpacked archives")
    parser.add_argument("--commit", default="", help="for archives without run.json")
    parser.add_argument("--gpu", default="")
    parser.add_argument("--date", default="")
    parser.add_argument("--into", type=Path, metavar="FILE", help="put the table between this file's marks")
    arguments = parser.parse_args(argv)
    if not collect(arguments.run, arguments):
        print(f"error: {arguments.run} holds none of {', '.join(SOURCES.values())}", file=sys.stderr)
        return 1
    if arguments.into is not None:
        put_between(arguments.into, BEGIN, END, table_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
