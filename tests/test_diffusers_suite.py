"""diffusers' own tests of DDPMScheduler and DDPMPipeline, run on our classes, from a checkout of diffusers.

Opt-in: they run where the environment variable DIFFUSERS_CHECKOUT names a checkout, best one of the installed version,
in an environment that has what its tests import (torchsde, and for some versions transformers and parameterized).
tests/test_stock_scheduler.py asks the same of the scheduler without it.

Run on a CPU with diffusers 0.42.1, and tests put together from public copies of 2025 and 2026, since no checkout of
the release was at hand: of DDPMSchedulerTest's 29 tests (27 before `set_timesteps` was given its two) 26 pass and the
three below are refused; of the DDPM pipeline's 24, most of them PipelineTesterMixin's, 14 pass, two are refused and
eight are skipped: five need an accelerator, and three an argument or component that a DDPM has not
(`num_images_per_prompt`, optional components, `encode_prompt`). Those of memory are not counted, they all need an
accelerator.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = os.environ.get("DIFFUSERS_CHECKOUT", "")
SCHEDULER, PIPELINE = "tests/schedulers/test_scheduler_ddpm.py", "tests/pipelines/ddpm/test_ddpm.py"
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="DIFFUSERS_CHECKOUT names no checkout of diffusers")

# What we rightly do otherwise: the test, and what it must fail with.
REFUSED_OF_THE_SCHEDULER = {
    "test_variance_type": "`variance_type` must be one of .* but got 'other'",
    "test_betas": "`beta_end` must .* 2",
    # It expects 387.9466, float32 rounding of the first steps' coefficients; float64 gives 387.9673 (see
    # test_end_of_the_loop_is_float64_s), and 0.01 is allowed.
    "test_full_loop_with_noise": r"expected result sum 387\.9466, but get 387\.967",
}
REFUSED_OF_THE_PIPELINE = {
    # Stock's DDPMPipeline takes no `guidance_scale`, and skips them; their network has no classes to guide to.
    "test_cfg": "`guidance_scale` needs `class_labels`",
    "test_callback_cfg": "`guidance_scale` needs `class_labels`",
}
# Three of the pipeline's tests save pickles, which our loader reads only where it is asked to.
SAVE_PICKLES = {"test_save_load_local", "test_loading_with_variants", "test_torch_dtype_dict"}

PLUGIN = """
import json, os, sys

CLASSES = os.environ["SUITE_CLASSES"]
outcomes = {}


def pytest_collection_modifyitems(items):
    # The base classes come along by import; without a class to test, theirs would pass for nothing.
    items[:] = [item for item in items if item.cls is not None and item.cls.__module__ == item.module.__name__]
    if CLASSES == "stock":
        return
    from ddpm_vlb import DDPMVLBPipeline, DDPMVLBScheduler

    class ReadsPickles(DDPMVLBPipeline):
        @classmethod
        def from_pretrained(cls, path, **kwargs):
            return super().from_pretrained(path, **{"use_safetensors": False} | kwargs)

    pipeline = DDPMVLBPipeline if CLASSES == "ours" else ReadsPickles
    for module in {item.module for item in items}:
        theirs = {getattr(module, "DDPMScheduler"): DDPMVLBScheduler, getattr(module, "DDPMPipeline", None): pipeline}
        for holder in [module, *(value for value in vars(module).values() if isinstance(value, type))]:
            for name, value in list(vars(holder).items()):
                if isinstance(value, type) and value in theirs:
                    setattr(holder, name, theirs[value])
                elif name == "scheduler_classes":
                    holder.scheduler_classes = tuple(theirs.get(c, c) for c in value)


def pytest_runtest_logreport(report):
    name = report.nodeid.split("::", 1)[1]
    if report.when == "call" or not report.passed:
        outcomes[name] = (report.outcome, report.longreprtext)


def pytest_sessionfinish():
    with open(os.environ["SUITE_OUTCOMES"], "w") as file:
        json.dump(outcomes, file)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(suite, classes): what each of the suite's tests comes to, {name: (outcome, text)}; computed once."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "classes_under_test.py").write_text(PLUGIN)
    known: dict[tuple[str, str], dict[str, tuple[str, str]]] = {}

    def outcomes(suite: str, classes: str) -> dict[str, tuple[str, str]]:
        if (suite, classes) not in known:
            file = folder / f"{len(known)}.json"
            environment = {key: value for key, value in os.environ.items() if not key.startswith("RUN_")}
            environment |= {"SUITE_CLASSES": classes, "SUITE_OUTCOMES": str(file), "DIFFUSERS_TEST_DEVICE": "cpu"}
            environment |= {"PYTHONPATH": os.pathsep.join([str(folder), environment.get("PYTHONPATH", "")])}
            options = ["-p", "classes_under_test", "-p", "no:cacheprovider", "-q", "-W", "ignore"]
            command = [sys.executable, "-m", "pytest", *options, suite]
            finished = subprocess.run(
                command, cwd=Path(CHECKOUT), env=environment, capture_output=True, text=True, check=False
            )
            assert file.exists() and finished.returncode in (0, 1), finished.stdout[-3000:] + finished.stderr[-3000:]
            # The class is left out of a name: versions differ in it, and no two tests of a suite share a method.
            results = json.loads(file.read_text()).items()
            known[suite, classes] = {name.split("::")[-1]: tuple(outcome) for name, outcome in results}
        return known[suite, classes]

    return outcomes


def failed(outcomes) -> dict[str, str]:
    return {name: text for name, (outcome, text) in outcomes.items() if outcome == "failed"}


@pytest.mark.parametrize("suite", [SCHEDULER, PIPELINE])
def test_stock_passes_its_own_suite(run, suite):
    """Stock's classes pass in this environment, so that what ours fail is ours."""
    outcomes = run(suite, "stock")
    assert "passed" in {outcome for outcome, _ in outcomes.values()}
    assert not failed(outcomes), "the environment lacks something that the checkout's tests need"


@pytest.mark.parametrize(
    ("suite", "classes", "refused"),
    [
        (SCHEDULER, "ours", REFUSED_OF_THE_SCHEDULER),
        (PIPELINE, "ours reading pickles", REFUSED_OF_THE_PIPELINE),
    ],
)
def test_ours_passes_but_for_what_it_refuses(run, suite, classes, refused):
    """Ours run every test that stock's run, and pass all but the named ones, which fail for the stated reason."""
    stock, ours = run(suite, "stock"), run(suite, classes)
    assert set(ours) == set(stock)
    assert set(failed(ours)) == set(refused) & set(stock)
    for name, text in failed(ours).items():
        assert re.search(refused[name], text), text
    skipped = {name for name, (outcome, _) in ours.items() if outcome == "skipped"}
    assert skipped <= {name for name, (outcome, _) in stock.items() if outcome == "skipped"}


def test_pickles_are_read_only_when_asked(run):
    """Without `use_safetensors=False` just the tests that save pickles fail besides, for want of safetensors."""
    plain, reading = failed(run(PIPELINE, "ours")), failed(run(PIPELINE, "ours reading pickles"))
    assert set(plain) - set(reading) == SAVE_PICKLES & set(run(PIPELINE, "stock"))
    assert all(re.search(r"no file named .*\.safetensors", plain[name]) for name in set(plain) - set(reading))
