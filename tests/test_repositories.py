"""What is written into a repository: the code that it carries, and an index that every class can load."""

import ast
import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline
from diffusers.utils.dynamic_modules_utils import check_imports, get_relative_import_files
from networks import pipeline, quiet, tiny_unet
from sharing_support import OURS_ONLY, digits, images

import ddpm_vlb
from ddpm_vlb import DDPMVLBPipeline, DDPMVLBScheduler, SquaredErrors
from ddpm_vlb.repositories import CODE_FILES

# --- a stock pipeline that holds our scheduler


def mixed() -> DDPMPipeline:
    return quiet(DDPMPipeline(tiny_unet(), DDPMVLBScheduler(variance_type="learned_range", levels=17)))


def ways_out(message: str) -> list[str]:
    """The code that the warning proposes."""
    return [code for code in re.findall(r"`([^`]+)`", message) if "(" in code]


def test_saving_a_stock_pipeline_with_our_scheduler_warns(tmp_path, hub, log):
    """Once for each save, in a folder and on the way to the Hub, with two ways out in code."""
    mixed().save_pretrained(tmp_path / "mixed")
    (message,) = log
    assert "ddpm_vlb" in (tmp_path / "mixed" / "model_index.json").read_text() and "model_index.json" in message
    assert len(ways_out(message)) == 2
    log.clear()
    mixed().push_to_hub("tester/mixed")
    assert len([message for message in log if "DDPMVLBScheduler" in message]) == 1


def test_the_warning_obeys_diffusers_verbosity(tmp_path, log):
    """Who silences diffusers does not hear it."""
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        mixed().save_pretrained(tmp_path / "mixed")
    finally:
        diffusers.utils.logging.set_verbosity(before)
    assert log == []


@pytest.mark.parametrize("way", [0, 1])
def test_the_ways_out_of_the_warning_work(tmp_path, log, way):
    """Followed to the letter, each gives a pipeline that is saved without a warning and that stock loads as it was."""
    stock = mixed()
    stock.save_pretrained(tmp_path / "before")
    code = ways_out(log.pop())[way]
    names = {"pipeline": stock, "DDPMScheduler": DDPMScheduler, "DDPMVLBPipeline": DDPMVLBPipeline}
    expected = images(stock)
    followed = eval(code, names)
    log.clear()  # what diffusers says of changing classes
    (followed or stock).save_pretrained(tmp_path / "after")
    assert log == []
    assert "ddpm_vlb" not in (tmp_path / "after" / "model_index.json").read_text()
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path / "after"))
    assert type(loaded) is DDPMPipeline and type(loaded.scheduler) is DDPMScheduler
    assert loaded.scheduler.config.variance_type == "learned_range"
    torch.testing.assert_close(images(loaded), expected, rtol=0, atol=3e-5)
    again = quiet(DDPMVLBPipeline.from_pretrained(tmp_path / "after"))
    assert again.scheduler.config.levels == 17


def test_our_own_saves_do_not_warn(tmp_path, hub, log):
    """Neither a folder nor a push, of either format, with a swapped-in scheduler too; nor the scheduler by itself."""
    swapped = digits()
    swapped.scheduler = DDIMScheduler.from_config(swapped.scheduler.config)
    log.clear()  # DDIM does not know our keys
    others = [pipeline(tiny_unet(**network), **config) for network, config in OURS_ONLY.values()]
    for i, own in enumerate([digits(), swapped, *others]):
        own.save_pretrained(tmp_path / f"{i}", include_code=True)
        own.push_to_hub(f"tester/{i}", include_code=True)
    digits().scheduler.save_pretrained(tmp_path / "alone")
    assert log == []


def test_a_failed_save_leaves_the_warning_on(tmp_path, log):
    """Our own save that fails halfway does not silence a later one of a stock pipeline."""
    (tmp_path / "full").write_text("a file where the folder should be")
    with pytest.raises(OSError):
        digits().save_pretrained(tmp_path / "full" / "inside")
    log.clear()
    mixed().save_pretrained(tmp_path / "mixed")
    assert len(log) == 1


# --- the code that a repository carries


def relative_imports(path: Path) -> set[str]:
    """The siblings that a module imports, by syntax and not by pattern."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.level]
    assert all(node.level == 1 and node.module for node in nodes)
    return {node.module for node in nodes}


def closure(path: Path) -> set[str]:
    """A module's file name and those of all that it imports beside it."""
    found, waiting = set(), {path.stem}
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= relative_imports(path.with_name(f"{name}.py")) - found
    return {f"{name}.py" for name in found}


def test_the_code_is_whole(tmp_path):
    """CODE_FILES is what pipeline_ddpm_vlb.py needs and no more; the files are the package's, but for blanks."""
    package = Path(ddpm_vlb.__file__).parent
    assert set(CODE_FILES) == closure(package / "pipeline_ddpm_vlb.py") | {"pipeline.py"}
    assert max(Counter(CODE_FILES).values()) == 1
    digits().save_pretrained(tmp_path, include_code=True)
    assert {path.name for path in tmp_path.glob("*.py")} == set(CODE_FILES)
    for name in set(CODE_FILES) - {"pipeline.py"}:
        assert ast.dump(ast.parse((tmp_path / name).read_text())) == ast.dump(ast.parse((package / name).read_text()))


def test_diffusers_finds_all_of_the_code(tmp_path, log, monkeypatch):
    """In pipeline.py alone, which names each module once.

    It looks for lines that look like imports, in strings too; none of ours may ask for this package, which is not
    there (a warning, and in older versions the end), and none may name another: of what modules name, the Hub is asked
    again and again.
    """
    digits().save_pretrained(tmp_path, include_code=True)
    siblings = set(CODE_FILES) - {"pipeline.py"}
    assert {Path(path).name for path in get_relative_import_files(tmp_path / "pipeline.py")} == siblings
    assert relative_imports(tmp_path / "pipeline.py") == {Path(name).stem for name in siblings}
    monkeypatch.setitem(sys.modules, "ddpm_vlb", None)
    assert sorted(f"{own}.py" for own in check_imports(tmp_path / "pipeline.py")) == sorted(siblings)
    assert not any(check_imports(tmp_path / name) for name in siblings)
    assert log == []


def test_another_kind_of_pipeline_is_refused(tmp_path):
    """An index with more parts, a VAE say, is no DDPM's: without it the samples would be latents."""
    digits().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"vqvae": ["diffusers", "VQModel"]}))
    with pytest.raises(ValueError, match="vqvae.*another kind"):
        DDPMVLBPipeline.from_pretrained(tmp_path)


# --- repositories of other layouts


def in_the_root(folder: Path, moved: Path) -> Path:
    """A saved pipeline as in repositories of 2022: the files of its parts beside model_index.json."""
    moved.mkdir(parents=True)
    for file in (path for path in folder.rglob("*") if path.is_file()):
        shutil.copyfile(file, moved / file.name)
    return moved


@pytest.mark.parametrize("max_shard_size", [None, "2KB"])
def test_parts_in_the_root(tmp_path, hub, max_shard_size):
    """From a folder, a branch of the Hub and subfolders of both; whole weights and shards."""
    original = pipeline(tiny_unet(), variance_type="learned_range", levels=17, num_train_timesteps=50)
    original.save_pretrained(tmp_path / "usual", max_shard_size=max_shard_size)
    root = in_the_root(tmp_path / "usual", tmp_path / "root")
    huggingface_hub.create_repo("tester/root")
    huggingface_hub.create_branch("tester/root", branch="old")
    huggingface_hub.upload_folder(repo_id="tester/root", folder_path=root, revision="old")
    huggingface_hub.upload_folder(repo_id="tester/root", folder_path=root, path_in_repo="inside")
    places = [
        (root, {}),
        (tmp_path, {"subfolder": "root"}),
        ("tester/root", {"subfolder": "inside"}),
        ("tester/root", {"revision": "old"}),
    ]
    for name, more in places:
        loaded = DDPMVLBPipeline.from_pretrained(name, cache_dir=tmp_path / "cache", **more)
        assert loaded.scheduler.levels == 17 and type(loaded.scheduler) is DDPMVLBScheduler
        for a, b in zip(original.unet.parameters(), loaded.unet.parameters(), strict=True):
            assert torch.equal(a, b)


def test_errors_of_each_pixel_in_the_root(tmp_path):
    """The file with the variances is looked for where the configuration lies."""
    pipe = pipeline(tiny_unet(out=1), variance_type="fixed_small", num_train_timesteps=5)
    errors = SquaredErrors(torch.arange(5), torch.full((5,), 0.1, dtype=torch.float64), torch.full((5, 1, 8, 8), 0.1))
    pipe.scheduler.store_few_steps((), errors, "per_pixel")
    pipe.save_pretrained(tmp_path / "usual")
    loaded = DDPMVLBPipeline.from_pretrained(in_the_root(tmp_path / "usual", tmp_path / "root"))
    assert loaded.scheduler.errors.per_pixel is not None


def test_a_scheduler_that_is_nowhere(tmp_path, hub):
    """Neither in its folder nor in the root: the folder is named."""
    digits().save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "scheduler")
    huggingface_hub.create_repo("tester/none")
    huggingface_hub.upload_folder(repo_id="tester/none", folder_path=tmp_path)
    for name in (tmp_path, "tester/none"):
        with pytest.raises(OSError, match="scheduler_config.json"):
            DDPMVLBPipeline.from_pretrained(name, cache_dir=tmp_path / "cache")


def test_pickles_are_said_to_be_convertible(tmp_path, hub):
    """Weights that are pickles only: refused from folder and Hub, and what the message says to do works."""
    usual = digits()
    usual.save_pretrained(tmp_path / "old", safe_serialization=False)
    huggingface_hub.create_repo("tester/old")
    huggingface_hub.upload_folder(repo_id="tester/old", folder_path=tmp_path / "old")
    for name in (tmp_path / "old", "tester/old"):
        with pytest.raises(OSError, match="in safetensors.*pickles.*trust") as refusal:
            DDPMVLBPipeline.from_pretrained(name)
        (code,) = re.findall(r"`(DDPM[^`]*)`", str(refusal.value))
        new = tmp_path / f"new-{len(str(name))}"
        eval(code, {"DDPMVLBPipeline": DDPMVLBPipeline, "folder": new})
        assert torch.equal(images(quiet(DDPMVLBPipeline.from_pretrained(new))), images(usual))
