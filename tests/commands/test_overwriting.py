"""What a folder holds is replaced when told, whole or not at all; a start that fails writes nothing."""

import json
import shutil

import pytest
from scoring_support import FEW, run_evaluate
from training_support import only_train, until_training

from ddpm_vlb.commands import optimize_timesteps, train
from ddpm_vlb.runtime.files import write_json


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, few):
    """A folder with a pipeline and the checkpoint of its run."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    only_train(folder, "--max_train_steps 1 --logger none", *few)
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of it, with what other commands measured."""
    folder = shutil.copytree(trained, tmp_path / "run")
    for name in ("few_steps.json", "evaluation/metrics.json", "evaluation-01234567/metrics.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        write_json({}, folder / name)
    (folder / "sample_quality").mkdir()
    (folder / "thesis.tex").write_text("mine")
    return folder


@pytest.mark.parametrize("options", ["", "--resume_from_checkpoint latest"])
def test_a_finished_pipeline_is_not_replaced_unasked(folder, few, options):
    """Nor by a resumption that finds no checkpoint; nothing is written."""
    if options:
        shutil.rmtree(folder / "checkpoint-1")
    before = content(folder)
    with pytest.raises(SystemExit, match="--output_dir .*finished pipeline.*--overwrite_output_dir") as stop:
        until_training(folder, f"--max_train_steps 1 {options}", *few)
    assert "\n" not in stop.value.code and content(folder) == before


def test_optimizing_into_a_finished_pipeline_is_refused(models, sets, folder):
    """As training is."""
    where = ("--model", models["small"], *sets["grey"].options, "--output_dir", folder)
    (folder / "thesis.tex").unlink()
    shutil.rmtree(folder / "checkpoint-1")
    (folder / ".run.json").unlink()
    before = content(folder)
    with pytest.raises(SystemExit, match="--output_dir .*finished pipeline.*--overwrite_output_dir"):
        optimize_timesteps.main([*map(str, where), "--cpu", "--steps", "2"])
    assert content(folder) == before


def test_a_replaced_pipeline_leaves_nothing_of_itself(folder, few):
    """All that was measured of it, and its run's checkpoint, stay until the new one is there, and go with it."""
    seen = []

    def watched(run, validate):
        seen.extend(path.name for path in folder.iterdir())
        return original(run, validate)

    original = train.recipe.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.recipe, "train", watched)
        only_train(folder, "--max_train_steps 2 --seed 1 --logger none --overwrite_output_dir", *few)
    old = {"few_steps.json", "evaluation", "evaluation-01234567", "sample_quality", "checkpoint-1"}
    assert old <= set(seen)
    left = {path.name for path in folder.iterdir()}
    assert not old & left and {"model_index.json", "checkpoint-2", "thesis.tex"} <= left


def test_a_resumed_run_keeps_its_checkpoints(folder, few):
    """It needs no flag; what was measured of the shorter one goes."""
    only_train(folder, "--max_train_steps 2 --logger none --resume_from_checkpoint latest", *few)
    left = {path.name for path in folder.iterdir()}
    assert {"checkpoint-1", "checkpoint-2", "thesis.tex"} <= left and "evaluation" not in left


@pytest.mark.parametrize("options", ["--train_split nothing", "--attention_levels 7"])
def test_a_start_that_fails_leaves_no_folder(tmp_path, few, options):
    """Neither the output folder nor those above it."""
    with pytest.raises(SystemExit):
        until_training(tmp_path / "new" / "run", options, *few)
    assert not (tmp_path / "new").exists()


def test_optimizing_that_fails_leaves_no_folder(tmp_path, models, sets):
    """Alike."""
    where = ("--model", models["small"], *sets["grey"].options, "--output_dir", tmp_path / "new" / "few")
    with pytest.raises(SystemExit):
        optimize_timesteps.main([*map(str, where), "--cpu", "--steps", "99"])
    assert not (tmp_path / "new").exists()


def test_another_evaluation_goes_beside_the_first(models, sets, tmp_path, capsys):
    """To a folder that its options name, again and again; the first one stays."""
    model = shutil.copytree(models["small"], tmp_path / "model")
    where = ("--model", model, *sets["grey"].options, *FEW, "--num_images", 2)
    first, second, again = (run_evaluate(*where, "--seed", seed) for seed in (0, 1, 1))
    own = f"evaluation-{second['key'][:8]}"
    assert again["per_image"] == second["per_image"]
    assert f"evaluation holds another evaluation: this one goes to {model / own}." in capsys.readouterr().out
    for name, metrics in (("evaluation", first), (own, second)):
        assert json.loads((model / name / "metrics.json").read_text())["key"] == metrics["key"]
    assert {path.name for path in model.glob("evaluation*")} == {"evaluation", own}


def test_another_evaluation_goes_beside_a_folder_that_was_named(models, sets, tmp_path):
    """Alike: what --output_dir holds stays."""
    where = (
        "--model",
        models["small"],
        *sets["grey"].options,
        *FEW,
        "--num_images",
        2,
        "--output_dir",
        tmp_path / "own",
    )
    first, second = (run_evaluate(*where, "--seed", seed) for seed in (0, 1))
    for name, metrics in (("own", first), (f"own-{second['key'][:8]}", second)):
        assert json.loads((tmp_path / name / "metrics.json").read_text())["key"] == metrics["key"]


def test_options_of_a_pilot_are_refused_where_none_is_run(models, sets, tmp_path, capsys):
    """Where few steps are walked in full of themselves, too."""
    where = ("--model", models["small"], *sets["grey"].options, "--output_dir", tmp_path / "own")
    with pytest.raises(SystemExit):
        run_evaluate(*where, "--num_inference_steps", 5, "--pilot_calls", 500)
    assert "--pilot_calls has no effect where all 5 steps are taken" in capsys.readouterr().err


def test_a_stopped_evaluation_keeps_its_folder(models, sets, tmp_path):
    """Another one, before it goes on, does not take it over."""
    model = shutil.copytree(models["small"], tmp_path / "model")
    where = ("--model", model, *sets["grey"].options, *FEW, "--num_images", 2)
    key = run_evaluate(*where, "--output_dir", tmp_path / "elsewhere")["key"]
    (model / "evaluation" / f"partial-{key[:16]}").mkdir(parents=True)
    other = run_evaluate(*where, "--seed", 1)
    run_evaluate(*where)
    assert {path.name for path in model.glob("evaluation*")} == {"evaluation", f"evaluation-{other['key'][:8]}"}
