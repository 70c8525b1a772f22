"""Bad input to any command: one line that begins with its name and says what to mend, never a traceback.

What one command alone refuses is in its own tests; training's is in test_train.py.
"""

import json
import re
import shutil

import datasets
import PIL.Image
import pytest
import safetensors.torch
import torch
from diffusers import CMStochasticIterativeScheduler, EDMEulerScheduler
from processes import reset_accelerate
from scoring_support import FEW, edit_config, options_for, write_splits

from ddpm_vlb import DDPMVLBPipeline
from ddpm_vlb.commands import evaluate, optimize_timesteps, publish, sample_quality
from ddpm_vlb.scoring.checkpoint import RECORD, fingerprint_of

COMMANDS = {
    "evaluate": (evaluate.main, ["--cpu", *FEW]),
    "optimize-timesteps": (optimize_timesteps.main, "--cpu --steps 2 --num_knots 8 --num_images 4".split()),
    "sample-quality": (sample_quality.main, "--cpu --steps 2 --num_bootstrap 5".split()),
    "publish": (publish.main, []),
}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
HUGE = "9" * 20


@pytest.fixture
def refused(capsys, calls):
    """Run a command on bad input: it ends with one line of its own, before the network is called."""

    def refuse(command, pattern, *options):
        reset_accelerate()
        main, few = COMMANDS[command]
        with pytest.raises(SystemExit) as stop:
            main([*few, *map(str, options)])
        message = stop.value.code if stop.value.code != 2 else capsys.readouterr().err
        assert message.startswith(f"ddpm-vlb {command}: ") and "\n" not in message.strip()
        assert re.search(pattern, message), message
        assert calls == []

    return refuse


def written(name, content):
    """A change: a file of the folder holds this."""
    return lambda folder: (folder / name).write_text(content)


def recorded(**changed):
    """A change: a data.json with these values."""
    whole = dict.fromkeys(RECORD) | {"image_column": "image", "train_split": "train"} | changed
    return written("data.json", json.dumps(whole))


def lose_a_weight(folder):
    weights = safetensors.torch.load_file(folder / WEIGHTS)
    del weights["conv_out.bias"]
    safetensors.torch.save_file(weights, folder / WEIGHTS, {"format": "pt"})


def consistency(folder):
    """As stock's pipeline saves a network with such a scheduler."""
    edit_config("model_index.json", scheduler=["diffusers", "CMStochasticIterativeScheduler"])(folder)
    CMStochasticIterativeScheduler().save_pretrained(folder / "scheduler")


def pickles(folder):
    """As repositories of 2022 have them."""
    torch.save(safetensors.torch.load_file(folder / WEIGHTS), folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


NETWORK, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"
CHECKPOINTS = [
    (
        "evaluate",
        edit_config("model_index.json", unet=["diffusers", "AutoencoderKL"]),
        "AutoencoderKL, none of x_t",
    ),
    ("sample-quality", edit_config("model_index.json", unet=["diffusers", "AutoencoderKL"]), "AutoencoderKL"),
    ("optimize-timesteps", edit_config(NETWORK, class_embed_type="timestep"), "embeddings of classes"),
    ("evaluate", lose_a_weight, "conv_out.bias"),
    ("sample-quality", lose_a_weight, "conv_out.bias"),
    ("evaluate", edit_config(NETWORK, sample_size=8.0), r"`sample_size` must .* is 8\.0"),
    ("sample-quality", edit_config(NETWORK, sample_size={"a": 1}), "`sample_size` must"),
    ("optimize-timesteps", edit_config(NETWORK, sample_size=[8, 0, 8]), r"`sample_size` must .*\[8, 0, 8\]"),
    (
        "optimize-timesteps",
        edit_config(NETWORK, sample_size=[8, 8, 8]),
        r"holds images, .* arrays .*\(1, 8, 8, 8\)",
    ),
    ("sample-quality", edit_config(NETWORK, sample_size=[8]), r"1 dimension\(s\).*images only"),
    ("sample-quality", edit_config(NETWORK, sample_size=[]), "`sample_size` must"),
    ("evaluate", edit_config(NETWORK, sample_size=True), "`sample_size` must"),
    ("sample-quality", edit_config(NETWORK, sample_size=None), "no `sample_size`"),
    ("evaluate", written("data.json", "null"), "data.json is no record"),
    ("evaluate", recorded(dataset_name=3), "data.json is no record.*'dataset_name'"),
    ("sample-quality", recorded(dataset_name=["a"]), "data.json is no record.*'dataset_name'"),
    ("optimize-timesteps", recorded(train_split=["a"]), "data.json is no record.*'train_split'"),
    ("evaluate", recorded(image_column=None), "data.json is no record.*'image_column'"),
    ("evaluate", recorded(resolution="big"), "data.json is no record.*'resolution'"),
    ("evaluate", recorded(label_column=3), "data.json is no record.*'label_column'"),
    ("sample-quality", recorded(resolution=8.5), "data.json is no record.*'resolution'"),
    ("optimize-timesteps", recorded(resolution=0), "data.json is no record.*'resolution'"),
    ("evaluate", recorded(levels=1), "data.json is no record.*'levels'"),
    ("sample-quality", recorded(channels="3"), "data.json is no record.*'channels'"),
    ("evaluate", recorded(dataset_name=""), "'' names no data set"),
    ("evaluate", lambda folder: (folder / "data.json").mkdir(), "data.json must be a file"),
    ("sample-quality", lambda folder: (folder / "data.json").mkdir(), "data.json must be a file"),
    ("evaluate", edit_config(SCHEDULER, _class_name="UNet2DModel"), "`_class_name` is 'UNet2DModel'.*no scheduler"),
    ("evaluate", consistency, "no chain of betas: a CMStochasticIterativeScheduler"),
    ("optimize-timesteps", consistency, "no chain of betas: a CMStochasticIterativeScheduler"),
    ("sample-quality", consistency, "no chain of betas: a CMStochasticIterativeScheduler"),
    ("evaluate", lambda folder: EDMEulerScheduler().save_pretrained(folder / "scheduler"), "EDMEulerScheduler"),
    ("evaluate", pickles, "use_safetensors=False.*save_pretrained"),
    ("sample-quality", pickles, "use_safetensors=False.*save_pretrained"),
]


@pytest.mark.parametrize("command, change, pattern", CHECKPOINTS)
def test_a_spoilt_checkpoint(refused, models, tmp_path, command, change, pattern):
    """What lies in --model, one thing in it changed."""
    folder = shutil.copytree(models["small"], tmp_path / "model")
    change(folder)
    refused(command, pattern, "--model", folder, "--output_dir", tmp_path / "run")


DATA = [
    ("evaluate", "set/a.csv", "image\n1\n1,2,3\n"),
    ("sample-quality", "set/a.csv", ""),
    ("optimize-timesteps", "set/a.json", "{"),
    ("evaluate", "set/a.jsonl", ""),
    ("evaluate", "set/README.md", "---\ndataset_info: [1\n---\n"),
    ("sample-quality", "set/README.md", "---\nconfigs:\n- 3\n---\n"),
    ("evaluate", "script/script.py", "raise RuntimeError"),
]


@pytest.mark.parametrize("command, name, content", DATA)
def test_a_spoilt_data_set(refused, models, tmp_path, command, name, content):
    """A file, or the card or the script of a folder, that `datasets` does not take: --dataset_name is named."""
    file = tmp_path / name
    file.parent.mkdir()
    if file.name == "README.md":
        (file.parent / "train.csv").write_text("image\n1\n")
    file.write_text(content)
    named = file.parent if file.suffix in (".md", ".py") else file
    where = ("--model", models["small"], "--output_dir", tmp_path / "run")
    refused(command, f"--dataset_name {named} cannot be loaded: ", *where, *options_for(tmp_path, named))


@pytest.mark.parametrize("command", ["evaluate", "sample-quality"])
def test_splits_with_other_columns(refused, models, tmp_path, command):
    """Which `datasets` tells in many lines."""
    (tmp_path / "set").mkdir()
    for split, column in (("train", "image"), ("test", "picture")):
        (tmp_path / "set" / f"{split}.csv").write_text(f"{column}\n1\n2\n")
    where = ("--model", models["small"], "--output_dir", tmp_path / "run")
    refused(command, "--dataset_name .*picture", *where, *options_for(tmp_path, tmp_path / "set"))


@pytest.mark.parametrize("command", ["evaluate", "optimize-timesteps", "sample-quality"])
@pytest.mark.parametrize("first", [0, 2])
def test_a_missing_image(refused, models, tmp_path, command, first):
    """A null among the images: with its number."""
    images = [PIL.Image.new("L", (8, 8), i) for i in range(4)]
    test = [*images[:first], None, *images[first:]]
    content = {"train": {"image": images}, "test": {"image": test}}
    folder = write_splits(tmp_path / "set", content, image=datasets.Image())
    where = ("--model", models["small"], "--output_dir", tmp_path / "run")
    # The small feature model would ask for labels first.
    more = ("--feature_model", "any") if command == "sample-quality" else ()
    refused(command, f"Image number {first} is missing", *where, *more, *options_for(tmp_path, folder))


OPTIONS = [
    ("evaluate", "--pilot_calls", HUGE, "--pilot_calls.*2147483647"),
    ("evaluate", "--calls_per_image", HUGE, "--calls_per_image.*2147483647"),
    ("optimize-timesteps", "--num_fit_images", HUGE, "--num_fit_images.*2147483647"),
    ("sample-quality", "--num_samples", HUGE, "--num_samples.*2147483647"),
    ("evaluate", "--dataset_name", "", "'' names no data set"),
    ("evaluate", "--dataset_config_name", "small", "--dataset_config_name small` has no effect without"),
    ("sample-quality", "--dataset_config_name", "small", "--dataset_config_name small` has no effect without"),
    ("optimize-timesteps", "--label_column", "kind", "--label_column kind` has no effect"),
    ("sample-quality", "--dataset_name", "/", "'/' names no data set"),
]


@pytest.mark.parametrize("command, option, value, pattern", OPTIONS)
def test_a_bad_value(refused, models, tmp_path, command, option, value, pattern):
    """Of an option."""
    refused(command, pattern, "--model", models["small"], "--output_dir", tmp_path / "run", option, value)


def test_one_column_for_images_and_labels(refused, models, sets, tmp_path):
    """Named twice, it is in the data once."""
    where = ("--model", models["classes"], *sets["labelled"].options, "--output_dir", tmp_path / "run")
    refused("evaluate", "--image_column.*--label_column.*both 'image'", *where, "--label_column", "image")


@pytest.mark.parametrize(
    "row", [{"path": "optimal"}, {"path": "optimal", "variance": "fixed_small", "timesteps": None, "decoder_shift": 0}]
)
def test_a_table_of_paths_with_a_spoilt_row(refused, models, sets, tmp_path, row):
    """The few_steps.json beside a model."""
    folder = shutil.copytree(models["small"], tmp_path / "model")
    weights = fingerprint_of(DDPMVLBPipeline.from_pretrained(folder).unet)
    (folder / "few_steps.json").write_text(json.dumps({"rows": [row], "model": {"weights_sha256": weights}}))
    where = ("--model", folder, *sets["grey"].options, "--output_dir", tmp_path / "run", "--variance", "network")
    refused("sample-quality", "few_steps.json is no file of", *where)


EVALUATION = {"bits_per_dim": 1, "timesteps": [0], "data": {}, "num_images": 1, "network_calls_per_image": 2}


@pytest.mark.parametrize("key", ["options", "train", "model"])
@pytest.mark.parametrize("value", [3, None, [1]])
def test_metrics_with_a_spoilt_value(refused, models, tmp_path, key, value):
    """Of a run that is to be published, or of its evaluation."""
    folder = shutil.copytree(models["small"], tmp_path / "model")
    (folder / "metrics.json").write_text(json.dumps({key: value}))
    refused("publish", f"metrics.json: the values of .*'{key}'", folder)
    (folder / "metrics.json").rename(tmp_path / "metrics.json")
    (tmp_path / "metrics.json").write_text(json.dumps(EVALUATION | {key: value}))
    refused("publish", f"metrics.json: the values of .*'{key}'", folder, "--evaluations", tmp_path / "metrics.json")


def test_metrics_that_are_no_object(refused, models, tmp_path):
    """A number is JSON too."""
    folder = shutil.copytree(models["small"], tmp_path / "model")
    (folder / "metrics.json").write_text("3")
    refused("publish", "is no metrics.json", folder)


def test_a_hash_that_is_none(refused, models, tmp_path):
    """Of an evaluation's weights."""
    (tmp_path / "metrics.json").write_text(json.dumps(EVALUATION | {"model": {"weights_sha256": [3]}}))
    refused("publish", "of other weights", models["small"], "--evaluations", tmp_path / "metrics.json")


@pytest.mark.parametrize("options", [("no\nwhere",), (".", "--hub_model_id", "a/b/c")])
def test_a_folder_or_a_name_that_is_none(refused, models, monkeypatch, options):
    """In one line, whatever the name holds."""
    monkeypatch.chdir(models["small"])
    refused("publish", "no pipeline|no name of a repository", *options)
