"""Training that begins from a checkpoint of fixed variance: what it takes over, what stays frozen, what is refused."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from networks import tiny_unet
from processes import fresh_accelerate  # noqa: F401
from training_support import check_metrics, checkpoint_weights, only_train, same_weights, tiny, until_training, weights

from ddpm_vlb import DDPMVLBPipeline, DDPMVLBScheduler
from ddpm_vlb.commands import train
from ddpm_vlb.commands.train_options import parse_args
from ddpm_vlb.recipes import train as recipe

BETAS = [0.01 * (1 + i) for i in range(20)]
SHORT = "--lr_scheduler constant --checkpointing_steps 1"


def save(folder, scheduler=None, seed=0, **network):
    """A stock pipeline of a tiny network, of fixed variance and 20 steps."""
    unet = tiny_unet(**{"out": 1, "seed": seed} | network)
    if scheduler is None:
        scheduler = DDPMScheduler(20, trained_betas=BETAS, variance_type="fixed_large", prediction_type="v_prediction")
    DDPMPipeline(unet, scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("stock"))


def test_it_begins_from_the_checkpoint(tmp_path, few, checkpoint):
    """Its weights, betas, prediction and clipping, as the options that are recorded say too; the loss is L_hybrid."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "train", lambda run, validate: True)
        run = only_train(tmp_path, "--max_train_steps 1 --pretrained", checkpoint, *few)
    old, saved = weights(checkpoint), DDPMVLBPipeline.from_pretrained(tmp_path)
    assert all(torch.equal(weight[: len(old[name])], old[name]) for name, weight in weights(tmp_path).items())
    assert (weights(tmp_path)["conv_out.weight"][1:] == 0).all() and weights(tmp_path)["conv_out.bias"][1:] == 1
    config = saved.scheduler.config
    assert list(config.trained_betas) == BETAS and saved.unet.config.out_channels == 2
    assert (config.variance_type, config.prediction_type) == ("learned_range", "v_prediction")
    assert run.term_weights == {"simple": 1.0, "vlb": 0.001} and run.unet.training
    assert train.is_saved(run, run.averaged_network())
    options = run.record()["options"]
    assert (options["ddpm_num_steps"], options["ddpm_beta_schedule"]) == (20, "trained_betas")
    assert (options["prediction_type"], options["variance_type"]) == ("v_prediction", "learned_range")
    assert options["pretrained"] == str(checkpoint)


def test_a_frozen_mean_stays(tmp_path, few, checkpoint):
    """All weights but the variance half's are the checkpoint's, bit for bit, in the average too; that half moves."""
    metrics = tiny(tmp_path, f"{SHORT} --max_train_steps 2 --freeze_mean --pretrained", checkpoint, *few)
    check_metrics(metrics, tmp_path)
    assert metrics["options"]["objective"] == "vlb" and metrics["options"]["adam_weight_decay"] == 0
    old = weights(checkpoint)
    for own in (weights(tmp_path), checkpoint_weights(tmp_path, 2)):
        assert own.keys() == old.keys()
        assert all(torch.equal(own[name][: len(weight)], weight) for name, weight in old.items())
        assert (own["conv_out.weight"][1:] != 0).all() and own["conv_out.bias"][1:] != 1
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    assert pipeline.scheduler.config.variance_type == "learned_range"


def test_without_it_all_weights_are_trained(tmp_path, few, checkpoint):
    """Whatever the objective, the whole network learns."""
    only_train(tmp_path, f"{SHORT} --max_train_steps 1 --pretrained", checkpoint, *few)
    old, new = weights(checkpoint), checkpoint_weights(tmp_path, 1)
    assert not any(torch.equal(new[name][: len(weight)], weight) for name, weight in old.items())


def test_a_resumed_run_goes_on_from_its_own_weights(tmp_path, few):
    """Two steps are one and one more, also if the checkpoint that it began from has moved and changed meanwhile."""
    first, other = save(tmp_path / "stock"), save(tmp_path / "other", seed=1)
    options = f"{SHORT} --freeze_mean --pretrained"
    only_train(tmp_path / "straight", "--max_train_steps 2", *options.split(), first, *few)
    only_train(tmp_path / "resumed", "--max_train_steps 1", *options.split(), first, *few)
    resume = "--max_train_steps 2 --resume_from_checkpoint latest"
    only_train(tmp_path / "resumed", resume, *options.split(), other, *few)
    assert same_weights(weights(tmp_path / "resumed"), weights(tmp_path / "straight"))


def test_another_chain_or_a_mean_set_free_is_not_resumed(tmp_path, few, checkpoint):
    """The optimizer's state is of what was trained, and the weights are of the chain."""
    only_train(tmp_path / "run", f"{SHORT} --max_train_steps 1 --freeze_mean --pretrained", checkpoint, *few)
    steeper = DDPMScheduler(20, trained_betas=BETAS[:-1] + [0.3], prediction_type="v_prediction")
    resumed = f"{SHORT} --resume_from_checkpoint latest --max_train_steps 2"
    with pytest.raises(SystemExit, match="is of a run with --freeze_mean True, but this one has False"):
        until_training(tmp_path / "run", f"{resumed} --objective vlb --pretrained", checkpoint, *few)
    with pytest.raises(SystemExit, match="is of a run with the chain .*trained_betas"):
        until_training(
            tmp_path / "run", f"{resumed} --freeze_mean --pretrained", save(tmp_path / "steeper", steeper), *few
        )


LEARNED = DDPMScheduler(20, variance_type="learned_range")
OTHERS = [
    ({"scheduler": LEARNED, "out": 2}, "has 'learned_range': its network learns the variance already"),
    ({"scheduler": DDIMScheduler(20)}, "is a DDIMScheduler"),
    ({"out": 2}, "a variance half is there already"),
    ({"channels": 3, "out": 3}, r"of images \(C, H, W\) \(3, 8, 8\), but the data's are \(1, 8, 8\)"),
    ({"size": 16}, r"of images \(C, H, W\) \(1, 16, 16\), but the data's are \(1, 8, 8\)"),
    ({"classes": 10}, "takes classes"),
]


@pytest.mark.parametrize("kind, said", OTHERS)
def test_another_checkpoint_is_refused(tmp_path, few, kind, said):
    """At the start, in one line with the option's name."""
    folder = save(tmp_path / "stock", **kind)
    with pytest.raises(SystemExit, match=f"--pretrained {folder} .*{said}") as stop:
        until_training(tmp_path / "run", "--max_train_steps 1 --pretrained", folder, *few)
    assert "\n" not in stop.value.code and not (tmp_path / "run").exists()


def test_other_levels_are_refused(tmp_path, few):
    """Of a checkpoint that says so; stock's can say none."""
    DDPMVLBPipeline(tiny_unet(out=1), DDPMVLBScheduler(20, levels=17)).save_pretrained(tmp_path / "ours")
    with pytest.raises(SystemExit, match="--pretrained .* is of 17 levels, but the data has 256"):
        until_training(tmp_path / "run", "--max_train_steps 1 --pretrained", tmp_path / "ours", *few)


@pytest.mark.parametrize(
    "options, said",
    [
        ("", "cannot be loaded|there is no such folder"),
        ("--revision v1", "there is no such folder"),
        ("--ddpm_num_inference_steps 21", "--ddpm_num_inference_steps 21 is more than the 20 steps of --pretrained"),
    ],
)
def test_what_does_not_go_with_the_checkpoint(tmp_path, few, checkpoint, options, said):
    """A folder that is not there, and more steps than its chain has."""
    folder = checkpoint if "steps" in options else tmp_path / "none"
    with pytest.raises(SystemExit, match=said):
        until_training(tmp_path / "run", f"--max_train_steps 1 {options} --pretrained", folder, *few)


DECIDED = """
    --model_config_name_or_path mine, --block_out_channels 8 16, --layers_per_block 2, --norm_num_groups 4
    --attention_levels 0, --dropout 0.1, --path flow, --ddpm_num_steps 20, --ddpm_beta_schedule laplace
    --ddpm_beta_start 1e-3, --ddpm_beta_end 0.03, --rescale_betas_zero_snr, --prediction_type v_prediction
    --variance_type learned_range, --timestep_spacing leading
"""
CASES = [(option.strip(), "--pretrained mine") for option in DECIDED.replace("\n", ",").split(",") if option.strip()]


@pytest.mark.parametrize(
    "option, other",
    [
        *CASES,
        ("--freeze_mean", ""),
        ("--revision v1", ""),
        ("--adam_weight_decay 0.1", "--pretrained mine --freeze_mean"),
    ],
)
def test_options_that_the_checkpoint_decides_are_refused(capsys, option, other):
    """As those are that nothing is to be decided by."""
    with pytest.raises(SystemExit):
        parse_args([*option.split(), *other.split()])
    assert f"{option.split()[0]} has no effect" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, said",
    [
        ("--objective simple", "--objective simple does not train the variance"),
        ("--objective hybrid --freeze_mean", "--freeze_mean leaves L_simple of --objective hybrid nothing to train"),
        ("--output_dir mine", "--pretrained mine is --output_dir"),
    ],
)
def test_what_would_train_no_variance_or_replace_the_checkpoint(capsys, options, said):
    """In one line, before anything is read."""
    with pytest.raises(SystemExit):
        parse_args(["--pretrained", "mine", *options.split()])
    assert said in capsys.readouterr().err


def test_defaults_of_a_pretrained_network():
    """L_hybrid at a small rate, and of a frozen mean L_vlb with the sampler and the rate that a new network has."""
    plain, frozen = (parse_args(["--pretrained", "mine", *more]) for more in ([], ["--freeze_mean"]))
    assert (plain.objective, plain.timestep_sampler, plain.learning_rate) == ("hybrid", "low_discrepancy", 1e-4)
    assert (frozen.objective, frozen.timestep_sampler, frozen.learning_rate) == ("vlb", "gaussian", 2e-3)
    new = parse_args([])
    assert (new.objective, new.timestep_sampler, new.learning_rate) == ("vlb", "gaussian", 2e-3)
