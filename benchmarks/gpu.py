"""What a GPU makes of this library, as a report to paste: is it right there, does it wait, and how fast is it?

python benchmarks/gpu.py --mnist PATH     at most 8 minutes on one H100; PATH: a folder as the Hub's ylecun/mnist
python benchmarks/gpu.py --smoke          all of it tiny, on the CPU, in seconds: that it runs, not how fast

The report goes to standard output and, with all numbers as JSON, to benchmarks/results/. Each section is a process of
its own with a limit of time: one that fails is reported, and the others go on. The exit code is 1 where a section
failed, a value was farther from the CPU's than its limit, or the host waited where it must not.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

# Else a question whether there is a GPU would keep the sections, which are forked, from using it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch
from environment import describe
from gpu_checks import correctness, waits
from gpu_speed import VARIANTS, Settings, describe_device, mnist, scoring, training

SECONDS = 170  # for all sections but MNIST's training
MNIST_MORE = 90  # at most, to load, score and sample it
SCORING_MNIST = 60  # for that, where the time is short
RESULTS = Path(__file__).parent / "results"
ABOUT = {
    "Device": "Where it ran.",
    "Correctness": "The largest error against the CPU on the same numbers, in parts of an image's largest value, for "
    "a network whose output is of the precision that is named.",
    "Waits": "Where the host waits for the device, of `torch.cuda.set_sync_debug_mode`.",
    "Training": "`ddpm-vlb train`, hybrid loss, beside diffusers' unconditional loop (mean squared error), with the "
    "same network, data, workers and precision, in blocks of steps that take turns; medians. Compiled, ours runs "
    "alone. A device is busy while a kernel or a copy runs. The peak is of tensors.",
    "Scoring": "Pairs (image, t) a second of `estimate_vlb` in bf16, 20 for each image, beside the network alone in "
    "calls of as many pairs.",
    "MNIST": "Trained in float32 with TF32, and scored.",
}


class Section(NamedTuple):
    """A heading of the report, which of its parts this is, what measures it, and its limit in seconds."""

    heading: str
    part: str
    function: Callable[[Settings], dict[str, Any]]
    seconds: float


def sections(settings: Settings) -> list[Section]:
    """In their order; the compiled network, whose compilation may take all that is left, is the last."""
    variants = [Section("Training", own.name, functools.partial(training, variant=own), 45) for own in VARIANTS]
    *plain, compiled = variants
    found = [Section("Device", "", describe_device, 60), Section("Correctness", "", correctness, 60)]
    found += [Section("Waits", "", waits, 45), *plain, Section("Scoring", "", scoring, 45)]
    found += [Section("MNIST", "", mnist, settings.mnist_seconds + MNIST_MORE)]
    return [*found, compiled._replace(seconds=120)]


def child(section: Section, settings: Settings, sender: Connection, log: Path) -> None:
    """What a section's process does: its output goes to a file, its result or what it failed of to the parent."""
    with contextlib.suppress(AttributeError, OSError):
        os.setsid()  # with its workers, so that they end together
    with log.open("w", buffering=1, encoding="utf-8") as file:  # whatever ends it, what it said is there
        sys.stdout = sys.stderr = file
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            result = section.function(settings)
        except BaseException as error:
            traceback.print_exc()
            said = " ".join(str(error).split())[:300]
            result = {"failed": f"{type(error).__name__}: {said}"}
    sender.send(result)


def run_section(section: Section, settings: Settings, limit: float, method: str) -> dict[str, Any]:
    """A section's result: its rows, or why there are none."""
    context: Any = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    log = settings.folder / "log.txt"
    process = context.Process(target=child, args=(section, settings, sender, log))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(limit) else {"failed": f"it took more than its {limit:.3g} s."}
    except EOFError:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
        return {"failed": f"its process ended without a result. {' '.join(lines[-4:])[-300:]}"}
    finally:
        with contextlib.suppress(AttributeError, OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def measure(settings: Settings) -> list[dict[str, Any]]:
    """The results of all sections."""
    until = time.monotonic() + SECONDS + (0 if settings.mnist is None else settings.mnist_seconds)
    methods, results = list(multiprocessing.get_all_start_methods()), []
    method = "fork" if "fork" in methods else "spawn"  # which imports all anew
    queue = sections(settings)
    while queue:
        section, left = queue[0], until - time.monotonic()
        started = time.monotonic()
        if left < 1:
            result: dict[str, Any] = {"skipped": "the time for all sections was used up."}
        else:
            own = settings
            if section.heading == "MNIST" and not settings.smoke:  # it is scored, even if the others took long
                own = replace(settings, mnist_seconds=min(settings.mnist_seconds, max(0.0, left - SCORING_MNIST)))
            result = run_section(section, own, min(section.seconds, left), method)
        if section.heading == "Device" and "failed" in result and method == "fork":
            method = "spawn"  # some driver that does not outlive a fork
            continue
        seconds = time.monotonic() - started
        results.append({"heading": section.heading, "part": section.part, "seconds": seconds, **result})
        print(f"{section.heading} {section.part}: {seconds:.0f} s {result.get('failed', '')}", file=sys.stderr)
        queue.pop(0)
    return results


def text_of(value: Any) -> str:
    """A cell."""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, list):
        return " to ".join(map(text_of, value))
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "-" if value is None or value == "" else str(value)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown; the columns are those of any row, in the order in which they come."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([text_of(row.get(name)) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def report(machine: str, results: list[dict[str, Any]]) -> str:
    """The Markdown of all sections."""
    parts = ["# On a GPU", f"`python benchmarks/gpu.py`: {machine}."]
    for heading in dict.fromkeys(result["heading"] for result in results):
        own = [result for result in results if result["heading"] == heading]
        rows = [row for result in own for row in result.get("rows", [])]
        parts += [f"## {heading}", ABOUT[heading], *([table(rows)] if rows else [])]
        for result in own:
            named = f"{result['part']}: " if result["part"] else ""
            parts += [f"{named}{word}: {result[word]}" for word in ("failed", "skipped") if word in result]
    return "\n\n".join(parts) + "\n"


def all_well(results: list[dict[str, Any]]) -> bool:
    """Whether no section failed and no row is beyond its limit."""
    rows = [row for result in results for row in result.get("rows", [])]
    return not any("failed" in result for result in results) and all(row.get("ok", True) for row in rows)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", metavar="PATH", help="Folder of MNIST; without it that section is left out.")
    parser.add_argument("--mnist_seconds", type=float, default=300.0, help="Seconds to train on it.")
    parser.add_argument("--smoke", action="store_true", help="All of it tiny, on the CPU; nothing is written.")
    args = parser.parse_args(argv)
    if not args.smoke and not torch.cuda.is_available():
        parser.error("no CUDA device is there: run it where one is, or with --smoke on the CPU")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit code."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Settings(args.smoke, Path(folder), args.mnist, args.mnist_seconds))
    machine, well = describe(), all_well(results)
    text = report(machine, results)
    print(text)
    if not args.smoke:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "gpu.md").write_text(text, encoding="utf-8")
        whole = {"machine": machine, "well": well, "sections": results}
        (RESULTS / "gpu.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
