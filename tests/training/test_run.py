"""What is trained: the network, its average, and what a run in this process has of a checkpoint."""

import json

import pytest
import torch
from diffusers import UNet2DModel
from processes import fresh_accelerate  # noqa: F401
from training_support import (
    check_metrics,
    checkpoint_weights,
    only_train,
    same_weights,
    tiny,
    until_training,
    weights,
)

from ddpm_vlb import DDPMVLBPipeline
from ddpm_vlb.commands.train_options import parse_args
from ddpm_vlb.recipes import train as recipe
from ddpm_vlb.training import run as training_run
from ddpm_vlb.training import scores as training_scores
from ddpm_vlb.training.global_batches import GlobalBatches


def is_channels_last(tensor):
    """None where the shape fits either order."""
    if tensor.shape[1] == 1 or tensor.shape[2:].numel() == 1:
        return None
    return tensor.is_contiguous(memory_format=torch.channels_last)


def test_channels_last(tmp_path, few):
    """All that is convolved while it trains, and the weights; the result is nearly the same, and it is saved plain."""
    options = "--max_train_steps 3 --checkpointing_steps 3 --lr_warmup_steps 100 --block_out_channels 8 16"
    seen = {True: 0, False: 0, None: 0}

    def look(module, inputs, output):
        if type(module) is torch.nn.Conv2d:
            if module.kernel_size == (1, 1):  # a shortcut, whose input diffusers makes contiguous
                inputs = ()
            for tensor in (*inputs, module.weight, output):
                seen[is_channels_last(tensor)] += 1

    only_train(tmp_path / "plain", options, *few)
    hook = torch.nn.modules.module.register_module_forward_hook(look)
    try:
        run = only_train(tmp_path / "last", f"{options} --channels_last", *few)
    finally:
        hook.remove()
    assert seen[True] > 3 * 50 and seen[False] == 0
    moments = [state["exp_avg"] for state in run.optimizer.state.values()]
    assert {is_channels_last(value) for value in moments if value.dim() == 4} == {True, None}
    plain, last = weights(tmp_path / "plain"), weights(tmp_path / "last")
    far = max(float((last[name] - plain[name]).norm() / plain[name].norm()) for name in plain)
    assert far < 1e-5
    own = run.averaged_network().state_dict()
    saved = DDPMVLBPipeline.from_pretrained(tmp_path / "last").unet.state_dict()
    assert all(value.is_contiguous() and torch.equal(value, own[name]) for name, value in saved.items())


def test_the_input_has_the_network_s_memory_format(tmp_path, few):
    """Images in colour, which the digits are not: x_t comes as the network holds its weights, and is not converted."""
    run, strides = only_train(tmp_path, "--max_train_steps 1 --channels_last", *few), []

    def network(x_t, timesteps):
        strides.append(x_t.is_contiguous(memory_format=torch.channels_last))
        return torch.cat([x_t, x_t], dim=1).requires_grad_()

    run.network = network
    recipe.train_batch(run, torch.zeros(8, 3, 8, 8), 0, recipe.draw(run))
    assert strides == [True]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_read_ahead_of_a_gpu(monkeypatch):
    """Up to four of them, unless their number is given; none beside a CPU, whose cores the network needs."""
    for given, device, cores, expected in [
        ([], "cuda", 16, 4),
        ([], "cuda", 2, 2),
        ([], "cpu", 16, 0),
        (["--dataloader_num_workers", "1"], "cuda", 16, 1),
        (["--dataloader_num_workers", "0"], "cuda", 16, 0),
    ]:
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        batches = GlobalBatches(8, 2, 1, 0, 1, seed=0)
        loader = training_run.build_loader(parse_args(given), torch.zeros(8), batches, torch.device(device))
        assert (loader.num_workers, loader.pin_memory) == (expected, device == "cuda")


def test_a_network_from_its_config(tmp_path):
    """--model_config_name_or_path takes a saved UNet2DModel config; one with the wrong channels is refused."""
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (12,)}
    for out_channels in (1, 2):
        unet = UNet2DModel(8, 1, out_channels, norm_num_groups=4, layers_per_block=1, add_attention=False, **blocks)
        unet.save_config(tmp_path / f"unet{out_channels}")
    options = ("--max_train_steps 1 --logger none --model_config_name_or_path", tmp_path / "unet2")
    tiny(tmp_path / "run", *options)
    assert DDPMVLBPipeline.from_pretrained(tmp_path / "run").unet.config.block_out_channels == [12]
    with pytest.raises(SystemExit, match="1 input and 1 output channels, but this data.* need 1 and 2"):
        tiny(tmp_path / "other", *options[:1], tmp_path / "unet1")


# The average


def test_the_average_is_what_is_saved(tmp_path, few):
    """With --use_ema that is s <- d s + (1 - d) w with d = 1 - (1 + k)^-0.75, over the weights w of all steps."""
    only_train(tmp_path, "--max_train_steps 4 --checkpointing_steps 1 --lr_scheduler constant", *few)
    last = checkpoint_weights(tmp_path, 4)
    average = checkpoint_weights(tmp_path, 1)  # before the second step nothing of the past is kept
    for k in (1, 2, 3):
        decay = 1 - (1 + k) ** -0.75
        current = checkpoint_weights(tmp_path, k + 1)
        average = {name: decay * average[name] + (1 - decay) * current[name] for name in average}
    saved = weights(tmp_path)
    for name in saved:
        torch.testing.assert_close(saved[name], average[name], rtol=1e-5, atol=1e-6)
    assert not same_weights(saved, last)


OTHER_NETWORKS = [
    ({"num_class_embeds": 10}, "takes classes.*give --class_conditional"),
    ({"class_embed_type": "timestep"}, "takes embeddings of classes"),
    ({"_class_name": "UNet1DModel"}, "is of a UNet1DModel"),
    ({"_class_name": "UNet2DConditionModel"}, "is of a UNet2DConditionModel"),
    ({"in_channels": 3}, "has 3 input and 2 output channels.*need 1 and 2"),
    ({"out_channels": 1}, "has 1 input and 1 output channels.*need 1 and 2"),
    ({"norm_num_groups": 3}, "makes no network of images of 8 x 8"),
    ({"down_block_types": ["NoBlock2D", "DownBlock2D"]}, "makes no network"),
]


@pytest.mark.parametrize("changes, pattern", OTHER_NETWORKS)
def test_a_network_that_is_not_trained_here_is_refused(tmp_path, changes, pattern):
    """At the start, in one line that names the option, and with no folder left."""
    network = dict(block_out_channels=[8, 8], norm_num_groups=4, layers_per_block=1, in_channels=1, out_channels=2)
    kinds = dict(down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2, add_attention=False)
    config = {"_class_name": "UNet2DModel", "sample_size": 8, **network, **kinds, **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ("--max_train_steps 1 --logger none --model_config_name_or_path", tmp_path / "config.json")
    with pytest.raises(SystemExit, match=f"--model_config_name_or_path .*{pattern}") as stop:
        until_training(tmp_path / "run", *options)
    assert "\n" not in stop.value.code and not (tmp_path / "run").exists()


def test_without_an_average_the_last_weights_are_saved(tmp_path, few):
    """--no-use_ema saves, and scores, what the optimizer left."""
    options = "--max_train_steps 4 --checkpointing_steps 4 --lr_scheduler constant --no-use_ema"
    check_metrics(tiny(tmp_path, options, *few), tmp_path)
    assert same_weights(weights(tmp_path), checkpoint_weights(tmp_path, 4))


def test_without_an_average_none_is_held(tmp_path, few):
    """Nor a copy of the weights in its place."""
    assert only_train(tmp_path, "--max_train_steps 1 --no-use_ema", *few).ema is None


def test_the_average_of_half_precision_weights_moves(tmp_path, few, monkeypatch):
    """It is in float32 also where the weights are not, as under DeepSpeed: a bf16 one would stand still."""
    build = training_run.build_unet
    monkeypatch.setattr(training_run, "build_unet", lambda *args: build(*args).to(torch.bfloat16))
    run = only_train(tmp_path, "--max_train_steps 1", *few)
    assert {value.dtype for value in run.ema.shadow_params} == {torch.float32}
    assert {value.dtype for value in weights(tmp_path).values()} == {torch.float32}
    run.ema.get_decay = lambda step: 0.9999
    before = [value.clone() for value in run.ema.shadow_params]
    moved = [parameter.detach() + 1 for parameter in run.unet.parameters()]
    for value in moved:
        value.requires_grad_()
    run.ema.step(moved)
    assert all((after > value).any() for after, value in zip(run.ema.shadow_params, before))


# Checkpoints


def test_three_steps_and_three_are_six(tmp_path, few):
    """Stopped after step 3 and resumed, a run has the weights and the score of one that was not, bit for bit."""
    straight = tiny(tmp_path / "straight", "--lr_scheduler constant --max_train_steps 6", *few)
    only_train(tmp_path / "resumed", "--lr_scheduler constant --max_train_steps 3 --checkpointing_steps 3", *few)
    assert not same_weights(weights(tmp_path / "resumed"), weights(tmp_path / "straight"))
    options = "--lr_scheduler constant --max_train_steps 6 --resume_from_checkpoint latest"
    resumed = tiny(tmp_path / "resumed", options, *few)
    assert same_weights(weights(tmp_path / "resumed"), weights(tmp_path / "straight"))
    assert resumed["test"] == straight["test"]


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--no-use_ema",
        "--validation_steps 4",
        "--gradient_accumulation_steps 2",
        "--timestep_sampler loss_second_moment --ddpm_num_steps 2 --ddpm_num_inference_steps 2",
        "--train_batch_size 35",  # four steps an epoch: the checkpoint lies within the second
        "--train_batch_size 22 --gradient_accumulation_steps 2",  # four too, the last of a single batch
        "--train_batch_size 22 --gradient_accumulation_steps 3",  # three, the last of a single batch
        "--random_flip",
        "--dropout 0.3",
    ],
)
def test_a_resumed_run_repeats_the_rest(tmp_path, few, train_batches, options):
    """From a checkpoint on, a second run ends in the same weights, bit for bit, without doing the first part again."""
    options = f"--max_train_steps 8 --checkpointing_steps 6 {options}"
    only_train(tmp_path, options, *few)
    straight = weights(tmp_path)
    train_batches.clear()
    only_train(tmp_path, f"{options} --resume_from_checkpoint checkpoint-6", *few)
    assert {step for step, _, _ in train_batches} == {6, 7}
    assert same_weights(weights(tmp_path), straight)


def test_the_importance_sampler_learns_its_probabilities(tmp_path, few):
    """Its history fills up in training and comes back with a checkpoint: the test above would not see it unused."""
    options = "--timestep_sampler loss_second_moment --ddpm_num_steps 2 --ddpm_num_inference_steps 2"
    options += " --max_train_steps 6 --checkpointing_steps 6"
    run = only_train(tmp_path, options, *few)
    assert not torch.allclose(run.sampler.probabilities, torch.full((2,), 0.5, dtype=torch.float64))
    again = only_train(tmp_path, f"{options} --resume_from_checkpoint latest", *few)
    assert torch.equal(again.sampler.probabilities, run.sampler.probabilities)


def test_the_validations_have_one_pilot(tmp_path, few, monkeypatch):
    """Fitted at the first of them, and kept in checkpoints: a resumed run has it too."""
    fitted = []
    own = training_scores.Scoring.pilot
    monkeypatch.setattr(training_scores.Scoring, "pilot", lambda self: fitted.append(self.what) or own(self))
    options = "--max_train_steps 6 --validation_steps 2 --checkpointing_steps 3"
    run = only_train(tmp_path, options, *few)
    assert fitted == ["validation images"]
    again = only_train(tmp_path, f"{options} --resume_from_checkpoint checkpoint-3", *few)
    assert fitted == ["validation images"]
    first, second = run.validations.so_far, again.validations.so_far
    assert first.pilot.digest == second.pilot.digest and list(first.history) == list(second.history) == [2, 4]
    assert (first.history[4] - second.history[4]).se == 0


def test_latest_without_a_checkpoint_starts_anew(few_base, tmp_path, few, capsys):
    """As in diffusers' scripts: the same command line serves the first start and every restart."""
    only_train(tmp_path, "--max_train_steps 3 --resume_from_checkpoint latest", *few)
    assert "starting anew" in capsys.readouterr().out
    assert same_weights(weights(tmp_path), weights(few_base[0]))


def test_a_missing_checkpoint_is_refused(tmp_path, few):
    """With its path, before training; what is there is listed, and how it is named."""
    pattern = r"--resume_from_checkpoint {0}: there is no .*{0}, but {1}: give a name checkpoint-STEP, or latest"
    with pytest.raises(SystemExit, match=pattern.format("checkpoint-9", "no checkpoint")):
        until_training(tmp_path, "--resume_from_checkpoint checkpoint-9", *few)
    only_train(tmp_path, "--max_train_steps 2 --checkpointing_steps 1", *few)
    with pytest.raises(SystemExit, match=pattern.format("2", "checkpoint-1, checkpoint-2")):
        until_training(tmp_path, "--resume_from_checkpoint 2", *few)


def test_the_newest_checkpoints_are_kept(tmp_path, few):
    """--checkpoints_total_limit removes the oldest."""
    options = "--max_train_steps 5 --checkpointing_steps 1 --checkpoints_total_limit 2 --no-use_ema"
    tiny(tmp_path, options, *few)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    assert same_weights(weights(tmp_path), checkpoint_weights(tmp_path, 5))


def test_going_back_leaves_the_later_checkpoints_aside(tmp_path, few, capsys):
    """Taken up by name, an earlier checkpoint begins a branch: `latest` and the limit know of no later ones."""
    only_train(tmp_path, "--max_train_steps 12 --checkpointing_steps 4", *few)
    options = "--max_train_steps 8 --checkpointing_steps 3 --checkpoints_total_limit 1"
    only_train(tmp_path, f"{options} --resume_from_checkpoint checkpoint-4 --learning_rate 1e-3", *few)
    assert {path.name for path in tmp_path.glob("superseded-*")} == {"superseded-8", "superseded-12"}
    assert "checkpoint-8" in {path.name for path in tmp_path.glob("checkpoint-*")}
    capsys.readouterr()
    only_train(tmp_path, f"{options} --resume_from_checkpoint latest --learning_rate 1e-3", *few)
    assert f"Resuming from {tmp_path / 'checkpoint-8'}." in capsys.readouterr().out


def test_the_seconds_of_a_resumed_run_count_from_its_start(tmp_path, few):
    """metrics.json says how long its steps took, all of them: a finished run resumed has not taken 0 s."""
    options = "--max_train_steps 3 --checkpointing_steps 3"
    first = tiny(tmp_path, options, *few)
    again = tiny(tmp_path, f"{options} --resume_from_checkpoint latest", *few)
    assert again["train"]["steps"] == 3
    assert again["train"]["seconds"] >= 0.5 * first["train"]["seconds"] > 0
