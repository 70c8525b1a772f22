"""The model card: what the Hub reads, what a person reads, and that its code runs."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from diffusers import DDIMScheduler, DDPMParallelScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler
from hub_cards import card_metadata
from huggingface_hub import ModelCard
from networks import pipeline, tiny_dit, tiny_unet

from ddpm_vlb import DDPMVLBPipeline, StoredPath, model_card

# As `ddpm-vlb train` writes metrics.json, shortened.
TRAINING = {
    "test": {
        "bits_per_dim": 1.7934567,
        "noise_se": 0.00412,
        "image_se": 0.01298,
        "prior": 0.00012,
        "kl": 1.44321,
        "decoder": 0.35012,
        "num_images": 297,
        "network_calls_per_image": 64,
        "clip_sample": False,
        "seed": 0,
    },
    "baselines": {"uniform": 4.087, "histogram_per_position": 2.421, "lzma": 2.894},
    "train": {"steps": 1000, "seconds": 150.4, "device": "cpu"},
    "data": {
        "dataset_name": None,
        "train_data_dir": None,
        "dataset_config_name": None,
        "test_split": "test",
        "num_images": {"train": 1300, "validation": 200, "test": 297},
    },
    "options": {"learning_rate": 0.002, "block_out_channels": [32, 64], "seed": 0, "dataset_name": None},
    "versions": {"ddpm-vlb": "0.1.0", "torch": "2.13.0"},
}


def evaluation(timesteps: int = 1000, **changes) -> dict:
    """What `ddpm-vlb evaluate` writes, shortened."""
    own = {
        "bits_per_dim": 1.775,
        "noise_se": 0.004,
        "image_se": 0.013,
        "prior": 0.0,
        "kl": 1.4253,
        "decoder": 0.3494,
        "num_images": 297,
        "network_calls_per_image": 20,
        "unit": "bits/dim",
        "clip_sample": True,
        "timesteps": list(range(timesteps)),
        "data": {"dataset_name": "ylecun/mnist", "dataset_config_name": "mnist", "split": "validation"},
        "versions": {"ddpm-vlb": "0.1.0"},
    }
    return own | changes


def card(pipe=None, name: str = "me/digits", **options) -> ModelCard:
    return model_card(pipeline(levels=17) if pipe is None else pipe, name, **options)


def read(made: ModelCard) -> tuple[dict, ModelCard]:
    """The metadata as the Hub reads it, without a complaint, and the card as the client does."""
    metadata, problems = card_metadata(str(made))
    assert problems == []
    return metadata, ModelCard(str(made))


def prose(made: ModelCard) -> str:
    """The card's text with its lines joined."""
    return " ".join(made.text.split())


def rows(made: ModelCard) -> list[list[str]]:
    """The cells of all tables, as Markdown splits them; each table is rectangular."""
    tables, lines = [[]], []
    for line in str(made).splitlines():
        if line.startswith("|"):
            lines.append([cell.strip() for cell in re.findall(r"((?:\\.|[^|\\])*)\|", line[1:])])
            tables[-1].append(len(lines[-1]))
        elif tables[-1]:
            tables.append([])
    assert all(len(set(table)) == 1 for table in tables if table)
    return lines


# --- metadata


def test_metadata_of_a_trained_pipeline():
    """Library, task, license and the measured bound with its errors, read back through the Hub's own classes."""
    metadata, again = read(card(training=TRAINING, license="mit"))
    assert metadata["library_name"] == "diffusers" and metadata["license"] == "mit"
    assert metadata["pipeline_tag"] == "unconditional-image-generation"
    assert {"ddpm-vlb", "diffusers"} <= set(metadata["tags"]) and metadata["metrics"] == ["bits_per_dim"]
    assert "datasets" not in metadata  # scikit-learn's digits are not the Hub's
    (result,) = again.data.eval_results
    assert (result.metric_type, result.metric_name) == ("bits_per_dim", "Bits/dim (VLB)")
    assert result.metric_value == pytest.approx(1.7934567, abs=1e-6)
    assert result.metric_args == {
        "noise_se": 0.00412,
        "image_se": 0.01298,
        "num_images": 297,
        "network_calls_per_image": 64,
        "clip_sample": False,
    }
    assert (result.dataset_name, result.dataset_split) == ("scikit-learn digits", "test")
    assert result.task_type == "unconditional-image-generation" and again.data.model_name == "digits"


def test_metadata_round_trip():
    """Written, read and written again the card is the same."""
    made = card(training=TRAINING, evaluations=[evaluation()], license="mit", includes_code=True)
    assert str(ModelCard(str(made))) == str(made)
    assert yaml.safe_load(ModelCard(str(made)).data.to_yaml()) == card_metadata(str(made))[0]


def test_data_sets_of_the_hub_are_named():
    """A data set of the Hub is listed and linked, its configuration and split are those of the result."""
    training = TRAINING | {"data": TRAINING["data"] | {"dataset_name": "ylecun/mnist"}}
    metadata, again = read(card(training=training, evaluations=[evaluation()]))
    assert metadata["datasets"] == ["ylecun/mnist"]
    assert "https://huggingface.co/datasets/ylecun/mnist" in str(again)
    first, second = again.data.eval_results
    assert (second.dataset_type, second.dataset_config, second.dataset_split) == (
        "ylecun/mnist",
        "mnist",
        "validation",
    )
    assert first.metric_value != second.metric_value == 1.775


def test_validation_and_test_are_two_results():
    """A snapshot of training has a validation score; each split has its own result and row."""
    training = TRAINING | {"validation": TRAINING["test"] | {"bits_per_dim": 1.9, "num_images": 200}}
    made = card(training=training)
    splits = {result.dataset_split: result.metric_value for result in read(made)[1].data.eval_results}
    assert splits == {"test": pytest.approx(1.793457), "validation": 1.9}
    assert any("validation split" in row[0] and row[1] == "200" for row in rows(made))


def test_without_measurements():
    """No results, no model-index and no table, and the card says so."""
    metadata, again = read(card())
    assert "model-index" not in metadata and "metrics" not in metadata and again.data.eval_results is None
    assert "No likelihood was measured" in prose(again)
    assert "## Likelihood" not in str(again) and "## Training" not in str(again) and rows(again) == []
    assert metadata["license"] == "unknown"


def test_continuous_data_is_in_nats():
    """A density is scored in nats/dim, under another metric's name, and the card warns of comparing it."""
    score = TRAINING["test"] | {"bits_per_dim": None, "nats_per_dim": -0.4321}
    made = card(pipeline(levels=None), training={"test": score})
    (result,) = read(made)[1].data.eval_results
    assert (result.metric_type, result.metric_value) == ("nats_per_dim", -0.4321)
    assert "-0.432 ±" in str(made) and "nats/dim" in str(made) and "continuous values" in prose(made)
    assert "bits/dim" not in str(made).replace("cannot be compared with bits/dim", "")


def test_an_error_that_could_not_be_told():
    """None and 0 are no numbers of an error: they are left out of the metadata or shown as n/a."""
    score = TRAINING["test"] | {"image_se": None, "noise_se": 0.0}
    made = card(training={"test": score})
    (result,) = read(made)[1].data.eval_results
    assert "image_se" not in result.metric_args
    assert "1.793 ± n/a (noise) ± n/a (images)" in str(made)


@pytest.mark.parametrize("name", ["yes", "1.0", "null", "me/1e5", "me/2024-01-01", "a: b", "me/#x", "größe"])
def test_names_that_yaml_would_take_for_something_else(name):
    """The model's name comes back as the text that it is."""
    metadata, again = read(card(name=name, training=TRAINING))
    assert metadata["model-index"][0]["name"] == again.data.model_name == name.rsplit("/", 1)[-1]


# --- words


def test_numbers_appear_as_given():
    """The bound with both errors, the calls, the split, and L_T, L_t and L_0 that add up to it."""
    made = card(training=TRAINING)
    table = rows(made)
    where = ["scikit-learn digits (test split)", "297"]
    bound = "**1.793 ± 0.004 (noise) ± 0.013 (images)**"
    assert [*where, bound, "bits/dim", "64", "unclipped"] in table
    assert [*where, "0.0001", "1.4432", "0.3501"] in table
    assert ["histogram per position", "2.421"] in table and ["lzma", "2.894"] in table
    assert f"{bound[2:-2]} bits/dim** on 297 images" in prose(made)
    kept = {**TRAINING, "train": {**TRAINING["train"], "kept_step": 800}}
    assert "best validation" not in prose(made)
    assert "1000 steps in 150 s on `cpu`. The network is that of step 800, the best" in prose(card(training=kept))
    assert "1000 steps in 150 s" in prose(made) and "1300 train, 200 validation, 297 test images" in prose(made)
    assert ["`learning_rate`", "`0.002`"] in table and ["`block_out_channels`", "`32 64`"] in table
    assert not any("dataset_name" in row[0] for row in table)
    assert "8x8 with 1 channel of 17 levels" in prose(made) and "torch 2.13.0" in prose(made)
    assert "1000 steps" in prose(made) and "`UNet2DModel`" in prose(made)


def test_few_steps_only_where_they_were_measured():
    """Evaluations of shorter chains make a table of their own, in order, and no result of the Hub's."""
    whole = card(training=TRAINING, evaluations=[evaluation()])
    assert "## Few steps" not in str(whole)
    short = [evaluation(100, bits_per_dim=2.5), evaluation(10, bits_per_dim=4.25)]
    made = card(training=TRAINING, evaluations=[*short, evaluation()])
    assert "## Few steps" in str(made)
    found = [row for row in rows(made) if row[0] in ("10", "100")]
    assert [row[0] for row in found] == ["10", "100"] and found[0][3].startswith("4.250 ± 0.004")
    assert [result.metric_value for result in read(made)[1].data.eval_results] == [pytest.approx(1.793457), 1.775]
    alone = card(evaluations=short)
    assert "## Few steps" in str(alone) and read(alone)[1].data.eval_results is None


def test_a_class_conditional_pipeline():
    """It is called one, is shown with labels, has no task of the Hub's, and stock is said not to load it."""
    made = card(pipeline(tiny_unet(classes=4)), training=TRAINING, includes_code=True)
    metadata, again = read(made)
    assert "pipeline_tag" not in metadata and "class-conditional" in metadata["tags"]
    assert again.data.eval_results[0].task_type == "class-conditional-image-generation"
    assert "A class-conditional denoising diffusion model" in prose(made)
    assert str(made).count("class_labels=0)") == 2 and "does not load this repository" in prose(made)
    assert "With 🤗 diffusers alone:" not in str(made)


def test_a_learned_variance():
    """`learned` is named, stock is said not to load it; `learned_range` is learned too, and stock loads it."""
    made = card(pipeline(variance_type="learned"))
    assert "with learned variance (`learned`)" in prose(made) and "does not load this repository" in prose(made)
    made = card(pipeline(variance_type="learned_range"))
    assert "with learned variance (`learned_range`)" in prose(made) and "does not load" not in prose(made)
    made = card(pipeline(tiny_unet(out=1), variance_type="fixed_small"))
    assert "with fixed variance (`fixed_small`)" in prose(made)


@pytest.mark.parametrize(
    ("prediction", "words"), [("epsilon", "the noise"), ("sample", "the data"), ("v_prediction", "v")]
)
def test_what_the_network_predicts(prediction, words):
    """Each prediction type has its words."""
    assert f"predicts {words}, with" in prose(card(pipeline(prediction_type=prediction)))


def test_a_swapped_in_scheduler():
    """A pipeline with DDIM in it has a card as well: stock's values, and stock is not said to load it."""
    pipe = pipeline(tiny_unet(3), levels=17)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    metadata, again = read(card(pipe, training=TRAINING, includes_code=True))
    assert metadata["library_name"] == "diffusers" and "over 1000 steps" in prose(again)


def test_why_stock_does_not_load_a_swapped_in_scheduler():
    """The reason given is that pipeline's own: it is neither class-conditional nor `learned`."""
    pipe = pipeline(tiny_unet(3))
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    text = prose(card(pipe))
    assert "does not load this repository" in text
    assert "takes no class labels" not in text and 'variance_type="learned"' not in text


def test_other_networks_and_shapes():
    """A DiT of 2 channels and an image that is not square: no task for what is no picture, the shape in words."""
    metadata, again = read(card(pipeline(tiny_dit(), levels=None)))
    assert "pipeline_tag" not in metadata and "`DiTTransformer2DModel`" in str(again)
    assert "4x12 with 3 channels of 256 levels" in prose(card(pipeline(tiny_unet(3, size=(4, 12)))))


def test_pictures_and_status():
    """Pictures appear where they lie beside the card; a status goes first."""
    made = card(training=TRAINING, pictures=["samples.png", "vlb_terms.png"], status="Training is not finished.")
    assert "(samples.png)" in str(made) and "(vlb_terms.png)" in str(made)
    assert made.text.strip().splitlines()[:3] == ["# me/digits", "", "> **Training is not finished.**"]
    assert ".png" not in str(card(training=TRAINING))


def test_values_that_would_break_a_table():
    """Pipes, backticks, ends of line and nothing at all stay one cell each, whatever the option or the data set."""
    options = {
        "pipe": "a|b",
        "tick": "a`b``c",
        "lines": "a\n| b | c |\n\n# d",
        "empty": "",
        "list": ["x|y", "`z`\n"],
        "html": "</details><script>alert(1)</script>",
        "backslash": "a\\|b",
    }
    data = TRAINING["data"] | {"train_data_dir": "da|ta\nset", "test_split": "te|st"}
    made = card(training=TRAINING | {"options": options, "data": data})
    table = {row[0]: row[1:] for row in rows(made)}
    assert set(table) >= {f"`{name}`" for name in options}
    assert all(len(table[f"`{name}`"]) == 1 for name in options)
    assert "# d" not in str(made).splitlines()
    inside = str(made).split("<details>")[1].split("\n\n</details>")[0]
    assert "| `html` |" in inside
    read(made)


def test_a_name_that_would_break_the_card():
    """A folder's name with quotes or an end of line in it cannot get out of the code that it stands in."""
    for name in ('a"b', "a\\b", "a\nb"):
        for block in blocks(card(name=name)):
            compile(block, name, "exec")


@pytest.mark.parametrize("key", ["dataset_name", "train_data_dir"])
def test_a_local_folder_is_not_revealed(tmp_path, key):
    """Of a folder of images only its last part is told, in the words and in the metadata."""
    folder = tmp_path / "of-somebody" / "pictures"
    folder.mkdir(parents=True)
    data = TRAINING["data"] | {key: str(folder)}
    own = [evaluation(steps, data={key: str(folder), "split": "test"}) for steps in (1000, 10)]
    metadata, again = read(card(training=TRAINING | {"data": data}, evaluations=own))
    assert "of-somebody" not in str(again) and str(tmp_path) not in json.dumps(metadata)
    assert "pictures (test split)" in str(again) and "datasets" not in metadata


@pytest.mark.parametrize("given", ["somebody/pictures", "./pictures", "~/pictures", "/nowhere/pictures"])
def test_a_folder_that_is_gone(given, tmp_path, monkeypatch):
    """A path that is no longer there is still none of the Hub's names; a name of the Hub's is one."""
    monkeypatch.chdir(tmp_path)
    metadata, _ = read(card(training=TRAINING | {"data": TRAINING["data"] | {"dataset_name": given}}))
    assert metadata.get("datasets") == (["somebody/pictures"] if given == "somebody/pictures" else None)


# --- the code in it


def blocks(made: ModelCard) -> list[str]:
    return re.findall(r"```python\n(.*?)```", str(made), re.DOTALL)


RUN = """
import sys
for block in __import__("json").loads(sys.argv[1]):
    names = {}
    exec(block, names)
    pipe, images = names["pipeline"], names["images"]
    print(type(pipe).__name__, type(pipe).__module__.split(".")[0], len(images), images[0].size)
"""


@pytest.mark.slow  # test_sharing.py loads a repository in these ways; this is the card's own words
def test_the_three_ways_to_load_run(tmp_path):
    """Each block of a portable card runs as it is: stock's class, ours, and ours from the code in the repository."""
    folder = tmp_path / "repository"
    pipe = pipeline(num_train_timesteps=5)
    pipe.save_pretrained(folder, include_code=True)
    code = blocks(card(pipe, str(folder), includes_code=True))
    assert len(code) == 3 and "trust_remote_code=True" in code[2]
    result = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(code)],
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines() == [
        "DDPMPipeline diffusers 4 (8, 8)",
        "DDPMVLBPipeline ddpm_vlb 4 (8, 8)",
        "DDPMVLBPipeline diffusers_modules 4 (8, 8)",
    ]


def test_without_the_code_the_third_way_is_not_shown():
    """A repository that carries no code shows two ways, and says that there is no third."""
    made = card()
    assert len(blocks(made)) == 2 and "carries no code" in prose(made)
    assert all("me/digits" in block for block in blocks(made))


def test_the_code_of_a_class_conditional_card_runs(tmp_path):
    """With labels in its call."""
    pipe = pipeline(tiny_unet(classes=4), num_train_timesteps=3)
    pipe.save_pretrained(tmp_path)
    (code,) = blocks(card(pipe, str(tmp_path)))
    names: dict = {}
    exec(code, names)
    assert len(names["images"]) == 4


def test_the_code_of_a_pipeline_of_many_channels_runs(tmp_path):
    """PIL has no images of 4 channels: the card's call asks for another output."""
    pipe = pipeline(tiny_unet(4), num_train_timesteps=3)
    pipe.save_pretrained(tmp_path)
    for code in blocks(card(pipe, str(tmp_path))):
        names: dict = {}
        exec(code, names)
        assert len(names["images"]) == 4


SCORE = {
    "bits_per_dim": 1.5,
    "noise_se": 0.01,
    "image_se": 0.0,
    "prior": 0.1,
    "kl": 1.0,
    "decoder": 0.4,
    "num_images": 4,
    "network_calls_per_image": 8,
    "clip_sample": True,
}


def swapped(scheduler_class, **network):
    pipe = pipeline(tiny_unet(**network))
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
    return pipe


@pytest.mark.parametrize(
    ("pipe", "says", "says_not"),
    [
        (lambda: pipeline(tiny_unet(out=1), variance_type="fixed_small"), "any number of steps,", "learned variance"),
        (lambda: pipeline(variance_type="learned"), 'samples `variance_type="learned"` wrongly', "no class labels"),
        (lambda: pipeline(variance_type="fixed_small"), "a variance half that `fixed_small` has no use", "labels"),
        (lambda: swapped(DDPMParallelScheduler), "rightly with `DDPMParallelScheduler`", "has no use for"),
        (lambda: swapped(DPMSolverMultistepScheduler), "num_inference_steps=50", "has no use for"),
        (lambda: pipeline(tiny_unet(4), levels=None), 'output_type="latent"', 'output_type="np"'),
        (lambda: pipeline(tiny_unet(4), levels=None), "spoils latents", "class labels"),
        (
            lambda: DDPMVLBPipeline(tiny_unet(out=1), HeunDiscreteScheduler()),
            "predicts the noise, over 1000 steps",
            "`fixed`",
        ),
    ],
    ids=["fixed", "learned", "unused", "parallel", "multistep", "latents", "latents-in-stock", "no-variance-type"],
)
def test_what_a_card_says_is_true_of_its_pipeline(pipe, says, says_not):
    """Each kind of network, chain and scheduler has the sentences that hold for it, and not those of another."""
    made = prose(card(pipe()))
    assert says in made and says_not not in made


def test_few_steps_alone_are_a_measurement():
    """They are explained, with what x_0 they are of, and nothing says that there was no measurement."""
    made = card(evaluations=[{**SCORE, "timesteps": [0, 5], "data": {}, "image_se": 0.02}])
    assert "No likelihood was measured" not in prose(made) and "standard errors are independent" in prose(made)
    assert any("clipped" in row for row in rows(made))


def test_an_error_that_is_not_known_is_no_zero():
    """An image_se of 0 (too few images to tell) is n/a in the text and is not in the metadata, nor is a NaN score."""
    made = card(training={"test": SCORE})
    metadata, _ = read(made)
    arguments = metadata["model-index"][0]["results"][0]["metrics"][0]["args"]
    assert arguments["noise_se"] == 0.01 and "image_se" not in arguments and "± n/a (images)" in prose(made)
    broken = card(training={"test": {**SCORE, "bits_per_dim": float("nan")}})
    assert "model-index" not in card_metadata(str(broken))[0] and ".nan" not in str(broken)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"training": "metrics.json"}, "`training` must be"),
        ({"training": {**SCORE, "timesteps": [0]}}, "these are of `ddpm-vlb evaluate`: pass them as `evaluations"),
        ({"training": {"test": {"bits_per_dim": 1.7}}}, "`training`.*num_images"),
        ({"evaluations": {**SCORE}}, "`evaluations` must be a list"),
        ({"evaluations": ["metrics.json"]}, "`evaluations` must be a list"),
        ({"evaluations": [SCORE]}, "`evaluations`.*timesteps"),
    ],
)
def test_metrics_in_the_wrong_place(options, message):
    """What is no metrics file, or the other script's, is refused by name."""
    with pytest.raises(ValueError, match=message):
        card(**options)


def test_stored_paths_are_told():
    """Which numbers of steps the checkpoint has chains for; nothing where it has none."""
    pipe = pipeline(levels=17)
    assert "stored chain" not in prose(card(pipe))
    last = len(pipe.scheduler) - 1
    pipe.scheduler.store_few_steps([StoredPath((last, 3, 0)), StoredPath((last, 1))])
    assert "`num_inference_steps` of 2, 3 takes the stored chain" in prose(card(pipe))
