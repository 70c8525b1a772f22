"""The options of `ddpm-vlb train`: on the command line, in a file of --config, and refused before training."""

import json
import re

import datasets
import pytest
import yaml
from hub_server import HubServer
from processes import fresh_accelerate  # noqa: F401
from training_support import Reached, until_training

from ddpm_vlb.commands import train
from ddpm_vlb.commands.train_options import build_parser, parse_args
from ddpm_vlb.training.paths import build_scheduler

SHARED_WITH_DIFFUSERS = """
    dataset_name dataset_config_name model_config_name_or_path train_data_dir output_dir cache_dir resolution
    random_flip train_batch_size eval_batch_size dataloader_num_workers num_epochs gradient_accumulation_steps
    learning_rate lr_scheduler lr_warmup_steps adam_beta1 adam_beta2 adam_weight_decay adam_epsilon use_ema
    ema_inv_gamma ema_power ema_max_decay logger logging_dir mixed_precision prediction_type ddpm_num_steps
    ddpm_num_inference_steps ddpm_beta_schedule checkpointing_steps checkpoints_total_limit resume_from_checkpoint
""".split()
ALSO_IN_DIFFUSERS_OTHER_SCRIPTS = "max_train_steps seed snr_gamma max_grad_norm image_column validation_steps".split()


def test_every_option_has_a_help_text():
    """And the help renders, with all of them in it."""
    parser = build_parser()
    page = parser.format_help()
    for action in parser._actions:
        assert action.help and action.help.strip(), action.option_strings
        assert action.option_strings[0] in page
    assert "8x8 digits" in page


@pytest.mark.parametrize("name", SHARED_WITH_DIFFUSERS + ALSO_IN_DIFFUSERS_OTHER_SCRIPTS)
def test_options_are_named_as_in_diffusers(name):
    """Where diffusers' scripts have a feature too, they and we call it the same."""
    assert f"--{name}" in build_parser()._option_string_actions


def test_defaults_of_the_objectives():
    """Each objective brings the variance and the sampler that it needs; given ones stay."""
    chosen = {
        objective: (args.variance_type, args.timestep_sampler)
        for objective in ("vlb", "hybrid", "simple")
        for args in [parse_args(["--objective", objective])]
    }
    assert chosen == {
        "vlb": ("learned_range", "gaussian"),
        "hybrid": ("learned_range", "low_discrepancy"),
        "simple": ("fixed_small", "low_discrepancy"),
    }
    args = parse_args("--variance_type fixed_large --timestep_sampler uniform".split())
    assert (args.variance_type, args.timestep_sampler) == ("fixed_large", "uniform")


@pytest.mark.parametrize("calls", [1, 2, 3, 6, 8, 63, 64])
def test_network_calls_come_in_replicates(calls, capsys):
    """--calls_per_image is taken as it is where it makes two replicates or more, and refused otherwise."""
    if calls >= 2:
        assert parse_args(["--calls_per_image", str(calls)]).calls_per_image == calls
        return
    with pytest.raises(SystemExit):
        parse_args(["--calls_per_image", str(calls)])
    assert "--calls_per_image" in capsys.readouterr().err


def test_more_sampled_steps_than_the_chain_has_are_refused(capsys):
    """A number that was given is never changed silently; the default fits itself to the chain."""
    assert parse_args(["--ddpm_num_steps", "20"]).ddpm_num_inference_steps == 20
    with pytest.raises(SystemExit):
        parse_args("--ddpm_num_steps 20 --ddpm_num_inference_steps 21".split())
    assert "--ddpm_num_inference_steps 21" in capsys.readouterr().err


BAD = """
    --max_train_steps 0
    --max_train_steps -5
    --max_train_steps 2.5
    --num_epochs 0
    --train_batch_size 0
    --eval_batch_size 0
    --gradient_accumulation_steps 0
    --learning_rate -1e-3
    --learning_rate 0
    --learning_rate nan
    --learning_rate fast
    --lr_warmup_steps -1
    --max_grad_norm 0
    --adam_beta1 1.5
    --ema_max_decay 2
    --dropout -0.1
    --dropout 1.5
    --label_dropout 1 --class_conditional
    --vlb_weight -1
    --snr_gamma 0 --objective simple
    --seed -1
    --ddpm_num_steps 0
    --ddpm_beta_start 0
    --ddpm_num_inference_steps 0
    --calls_per_image 0
    --num_test_images -1
    --validation_steps 0
    --checkpointing_steps -1
    --checkpoints_total_limit 0
    --resolution 0
    --dataloader_num_workers -1
    --block_out_channels 8 0
    --block_out_channels
    --attention_levels -1
    --norm_num_groups 0
    --layers_per_block 0
    --objective elbo
    --timestep_sampler importance
    --timestep_sampler sigma --objective simple
    --timestep_sampler sigma --path flow
    --path ve
    --variance_type learnt
    --prediction_type eps
    --ddpm_beta_schedule cosine
    --timestep_spacing even
    --lr_scheduler cos
    --mixed_precision fp8
    --logger mlflow
    --variance_type learned_range --objective simple
    --variance_type learned --objective simple
    --variance_type fixed_small --objective hybrid
    --variance_type fixed_large_log --objective hybrid
    --rescale_betas_zero_snr
    --rescale_betas_zero_snr --prediction_type epsilon
    --train_data_dir a --dataset_name b
    --num_epochs 1 --max_train_steps 1
    --batch_size 8
    --max_train_step 8
"""


@pytest.mark.parametrize("options", [line.strip() for line in BAD.strip().splitlines()])
def test_bad_options_are_refused(tmp_path, capsys, options):
    """Exit code 2 and the option's name, before a folder is made or data is read."""
    with pytest.raises(SystemExit) as stop:
        train.main(["--output_dir", str(tmp_path / "run"), *options.split()])
    message = capsys.readouterr().err.partition("error: ")[2]  # the usage before it names every option
    assert stop.value.code == 2
    assert re.search(rf"{options.split()[0]}\b", message)
    assert not (tmp_path / "run").exists()


IDLE = """
    --vlb_weight 0.01 | --objective vlb
    --vlb_weight 0.01 | --objective simple
    --snr_gamma 5 | --objective vlb
    --sigma_sampling logit_normal | --objective vlb --path flow
    --sigma_sampling logit_normal | --objective simple
    --sigma_sampling logit_normal | --objective simple --path edm
    --snr_gamma 5 | --objective simple --path edm
    --ddpm_beta_schedule laplace | --path flow
    --ddpm_beta_start 1e-3 | --path flow
    --ddpm_beta_end 0.03 | --path edm
    --rescale_betas_zero_snr | --path edm
    --prediction_type v_prediction | --path flow
    --block_out_channels 8 16 | --model_config_name_or_path mine
    --layers_per_block 2 | --model_config_name_or_path mine
    --norm_num_groups 4 | --model_config_name_or_path mine
    --attention_levels 0 | --model_config_name_or_path mine
    --dropout 0.1 | --model_config_name_or_path mine
    --ddpm_beta_start 1e-3 | --ddpm_beta_schedule squaredcos_cap_v2
    --ddpm_beta_end 0.03 | --ddpm_beta_schedule laplace
    --label_column kind | --no-class_conditional
    --label_dropout 0.1 | --no-class_conditional
    --lr_warmup_steps 10 | --lr_scheduler constant
    --ema_power 0.7 | --no-use_ema
    --logging_dir elsewhere | --logger none
    --calls_per_image 8 | --num_test_images 0
    --hub_license mit | --no-push_to_hub
    --no-hub_private_repo | --no-push_to_hub
"""


@pytest.mark.parametrize("case", [line.strip() for line in IDLE.strip().splitlines()])
def test_options_without_effect_are_refused(capsys, case):
    """Named as given; at its default one may stay, as in the options of an earlier run."""
    option, other = case.split(" | ")
    with pytest.raises(SystemExit):
        parse_args([*option.split(), *other.split()])
    assert f"{option.split()[0]} has no effect" in capsys.readouterr().err
    default = build_parser().get_default(option.split()[0].removeprefix("--").removeprefix("no-"))
    if default is not None and default is not False:  # a switch takes no value
        given = map(str, default) if isinstance(default, list) else [str(default)]
        parse_args([option.split()[0], *given, *other.split()])


@pytest.mark.parametrize("options", ["--ddpm_beta_start 0.05", "--ddpm_beta_start 0.02 --ddpm_beta_end 0.01"])
def test_noise_that_falls_is_refused(capsys, options):
    """No schedule that is trained on goes down."""
    with pytest.raises(SystemExit):
        parse_args(options.split())
    assert re.search("--ddpm_beta_start .* is above --ddpm_beta_end", capsys.readouterr().err)


@pytest.mark.parametrize("end", [5e-5, 1e-3, 0.02])
@pytest.mark.parametrize("levels", [2, 17, 256, 65536])
def test_the_recipe_s_schedule_never_falls(end, levels):
    """Whatever its end is."""
    betas = build_scheduler(parse_args(["--ddpm_beta_end", str(end)]), levels).betas
    assert (betas.diff() >= 0).all()


@pytest.mark.parametrize("option", ["objective", "variance_type", "prediction_type", "lr_scheduler", "logger"])
def test_unknown_names_list_the_choices(capsys, option):
    """The message says what there is to choose from."""
    with pytest.raises(SystemExit):
        parse_args([f"--{option}", "nonsense"])
    message = capsys.readouterr().err.partition("error: ")[2]
    choices = build_parser()._option_string_actions[f"--{option}"].choices
    assert all(choice in message for choice in choices)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--norm_num_groups 3", "--norm_num_groups 3 must divide"),
        ("--attention_levels 2", "--attention_levels 2 is not below the 2 levels"),
        ("--resolution 7", r"sides that 2 divides, but they are \(7, 7\).*--resolution"),
        ("--ddpm_beta_end 2", "`beta_end` must lie in"),
        ("--test_split dev", "no split 'dev'"),
        ("--image_column img", "no column 'img'"),
        ("--levels 17", "above 16.*--levels"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, few, options, message):
    """What only the data or the network shows is refused before training too, with the fix."""
    with pytest.raises(SystemExit, match=message):
        until_training(tmp_path / "run", options, *few)


def test_an_unknown_data_set_of_the_hub_is_refused(tmp_path, monkeypatch):
    """In one line."""
    with HubServer() as server:
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.endpoint)
        with pytest.raises(SystemExit) as refusal:
            until_training(tmp_path, "--dataset_name nobody/nothing", "--cache_dir", tmp_path / "cache")
    assert refusal.value.code.startswith("ddpm-vlb train: --dataset_name nobody/nothing cannot be loaded: ")
    assert "\n" not in refusal.value.code and "HF_ENDPOINT" in refusal.value.code
    assert any("nobody/nothing" in request.path for request in server.requests)


@pytest.mark.parametrize("name", build_parser()._option_string_actions["--lr_scheduler"].choices)
def test_every_learning_rate_schedule_can_be_made(tmp_path, few, name):
    """No choice is offered that cannot work."""
    with pytest.raises(Reached):
        until_training(tmp_path / "run", "--max_train_steps 4 --lr_scheduler", name, *few)


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path, name):
    """Before training, with the option and the path; a file in the way stops even root."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit, match=rf"--output_dir .*{name} cannot be written"):
        until_training(tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"


# --config


def config(tmp_path, content, *argv, name="options.yaml"):
    """Parse a config file's content, and the command line after it."""
    text = content if isinstance(content, str) else yaml.safe_dump(content)
    (tmp_path / name).write_text(text)
    return parse_args(["--config", str(tmp_path / name), *argv])


def test_config_gives_every_type(tmp_path):
    """Numbers (YAML reads 1e-3 as text), lists, switches both ways, names, and null for a default."""
    args = config(
        tmp_path,
        "learning_rate: 1e-3\nmax_train_steps: 7\nblock_out_channels: [16, 8]\nattention_levels: []\n"
        "use_ema: false\nrandom_flip: true\nobjective: hybrid\noutput_dir: a b\nresolution: null\n",
    )
    assert args.learning_rate == 0.001 and isinstance(args.learning_rate, float)
    assert args.max_train_steps == 7 and args.block_out_channels == [16, 8] and args.attention_levels == []
    assert args.use_ema is False and args.random_flip is True
    assert (args.objective, args.output_dir, args.resolution) == ("hybrid", "a b", None)
    assert args.train_batch_size == parse_args([]).train_batch_size


def test_config_may_be_json(tmp_path):
    """As the help says."""
    args = config(tmp_path, json.dumps({"learning_rate": 1e-3, "use_ema": False, "logger": "none"}), name="a.json")
    assert (args.learning_rate, args.use_ema, args.logger) == (1e-3, False, "none")


def test_the_command_line_overrides_the_config(tmp_path):
    """Wherever --config stands on it."""
    content = {"learning_rate": 1e-3, "block_out_channels": [16, 8], "use_ema": False, "seed": 5}
    options = "--learning_rate 5e-4 --use_ema --block_out_channels 4".split()
    args = config(tmp_path, content, *options)
    assert (args.learning_rate, args.block_out_channels, args.use_ema, args.seed) == (5e-4, [4], True, 5)
    args = parse_args([*options, f"--config={tmp_path / 'options.yaml'}"])
    assert (args.learning_rate, args.block_out_channels, args.use_ema, args.seed) == (5e-4, [4], True, 5)


@pytest.mark.parametrize(
    "content, message",
    [
        ("batch_size: 8", "--batch_size"),
        ("max_train_step: 8", "--max_train_step"),
        ("no-use_ema: 1", "--no-use_ema"),
        ("max_train_steps: 2.5", "--max_train_steps"),
        ("max_train_steps: ten", "--max_train_steps"),
        ("max_train_steps: 0", "--max_train_steps"),
        ("learning_rate: fast", "--learning_rate"),
        ("learning_rate: -1e-3", "--learning_rate"),
        ("block_out_channels: [8, wide]", "--block_out_channels"),
        ("seed: true", "--seed"),
        ("use_ema: 3", "use_ema"),
        ("objective: elbo", "--objective"),
        ("objective: simple\nvariance_type: learned", "--variance_type"),
        ("[1, 2]", "options by name, but holds list"),
        ("", "options by name, but holds NoneType"),
        ("a: [1", "cannot be read"),
    ],
)
def test_a_bad_config_is_refused(tmp_path, capsys, content, message):
    """Names, types, ranges, choices and combinations are checked as on the command line."""
    with pytest.raises(SystemExit) as stop:
        config(tmp_path, content)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.partition("error: ")[2]


def test_a_missing_config_is_named(tmp_path, capsys):
    """With its path."""
    with pytest.raises(SystemExit) as stop:
        parse_args(["--config", str(tmp_path / "missing.yaml")])
    assert stop.value.code == 2
    assert "missing.yaml cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.json", b'{\n\t"learning_rate": 1e-3,\n\t"output_dir": "gr\xc3\xb6\xc3\x9fe"\n}'),
        ("a.json", b'\xef\xbb\xbf{"learning_rate": 1e-3, "output_dir": "gr\xc3\xb6\xc3\x9fe"}'),
        ("a.yaml", "learning_rate: 1e-3\noutput_dir: größe\n".encode("utf-16")),
        ("a.yaml", "learning_rate: 1e-3\noutput_dir: größe\n".encode()),
    ],
    ids=["tabs", "BOM", "UTF-16", "UTF-8"],
)
def test_config_is_read_as_it_is_written(tmp_path, name, content):
    """JSON with tabs, a byte order mark, UTF-16."""
    (tmp_path / name).write_bytes(content)
    args = parse_args(["--config", str(tmp_path / name)])
    assert (args.learning_rate, args.output_dir) == (1e-3, "größe")


def test_config_of_another_encoding_is_refused(tmp_path, capsys):
    """In one line that says which one is read."""
    (tmp_path / "a.yaml").write_bytes(b"output_dir: gr\xf6\xdfe\n")
    with pytest.raises(SystemExit):
        parse_args(["--config", str(tmp_path / "a.yaml")])
    assert "a.yaml is no text in UTF-8" in capsys.readouterr().err


def test_a_configuration_of_no_data_set_is_refused(capsys):
    """It would have no effect on the digits or a folder."""
    for data in ([], ["--train_data_dir", "pictures"]):
        with pytest.raises(SystemExit):
            parse_args(["--dataset_config_name", "small", *data])
        assert "--dataset_config_name has no effect without --dataset_name" in capsys.readouterr().err


def test_config_understands_a_plain_no(tmp_path):
    """`mixed_precision: no` is one of its choices, though YAML makes a boolean of the word."""
    assert config(tmp_path, "mixed_precision: no").mixed_precision == "no"
