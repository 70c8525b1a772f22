"""Configurations of flow matching, EDM and their like describe no chain of betas; those of no known path are out."""

import json
import re

import diffusers
import pytest
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    IPNDMScheduler,
)
from networks import pipeline, sample, tiny_unet

from ddpm_vlb import DDPMVLBPipeline, DDPMVLBScheduler
from ddpm_vlb.path_configurations import EDM_SCHEDULERS, FLOW_SCHEDULERS, is_path

# Stock's numpy round trips, none of our business.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
FOREIGN = re.compile("Flow|flow|EDM|Karras|SdeVe|^CM|^SCM|IPNDM|Wuerstchen|CogVideoX|^CosineDPM|Helios|LTX|MiniMax")
SHIFTED = {
    "flow sigmas": lambda: DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    "told log sigma": lambda: EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
    "a velocity": lambda: DDIMScheduler(prediction_type="flow_prediction"),
    "a flow's keys": lambda: DDIMScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config),
    "an EDM's keys": lambda: DDPMScheduler.from_config(EDMEulerScheduler(sigma_data=1.0).config),
    "betas of its own kind": lambda: IPNDMScheduler(trained_betas=[0.1, 0.2]),
}
CASES = [name for name in dir(diffusers) if name.endswith("Scheduler") and FOREIGN.search(name)] + list(SHIFTED)


def foreign(name):
    """A scheduler of no chain of betas."""
    cls = None if name in SHIFTED else getattr(diffusers, name)
    if cls is not None and type(cls) is not type:
        pytest.skip(f"{name} needs a package")
    return SHIFTED[name]() if cls is None else cls()


@pytest.mark.parametrize("name", CASES)
def test_from_config_refuses(name, tmp_path):
    """From memory, from a plain dict and from a file, and whatever betas are given beside it."""
    config = foreign(name).config
    foreign(name).save_pretrained(tmp_path)
    for given in ({}, {"beta_schedule": "linear"}, {"trained_betas": [0.1, 0.2], "prediction_type": "epsilon"}):
        for own in (config, dict(config)):
            with pytest.raises(ValueError, match="no chain of betas.*build `DDPMVLBScheduler"):
                DDPMVLBScheduler.from_config(own, **given)
        if "keys" not in name:  # in a file they are a DDPM's or a DDIM's, with keys of another's
            with pytest.raises(ValueError, match="no chain of betas"):
                DDPMVLBScheduler.from_pretrained(tmp_path, **given)


@pytest.mark.parametrize("name", CASES)
def test_the_pipeline_refuses(name):
    """When it is made, when it takes over a stock one, and when the scheduler was replaced later."""
    scheduler, unet = foreign(name), tiny_unet()
    if is_path(scheduler):
        assert DDPMVLBPipeline(unet, scheduler).path is not None
        return
    for make in (
        lambda: DDPMVLBPipeline(unet, scheduler),
        lambda: DDPMVLBPipeline.from_pipe(DDPMPipeline(unet, scheduler)),
    ):
        with pytest.raises(ValueError, match="no chain of betas"):
            make()
    pipe = pipeline(unet)
    pipe.scheduler = scheduler
    unet.register_forward_pre_hook(lambda module, args: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match="no chain of betas"):
        sample(pipe)


@pytest.mark.parametrize("cls", [FlowMatchEulerDiscreteScheduler, EDMEulerScheduler, CMStochasticIterativeScheduler])
def test_saved_pipelines_are_refused(cls, tmp_path):
    """Under the class's own name in the index, unless it walks a path, and where the index says DDPMScheduler."""
    DDPMPipeline(tiny_unet(), cls()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    for scheduler in (index["scheduler"], ["diffusers", "DDPMScheduler"]):
        if scheduler[1] in (*FLOW_SCHEDULERS, *EDM_SCHEDULERS):
            continue
        (tmp_path / "model_index.json").write_text(json.dumps(index | {"scheduler": scheduler}))
        with pytest.raises(ValueError, match="no chain of betas"):
            DDPMVLBPipeline.from_pretrained(tmp_path)


def test_a_class_without_betas_carries_ours():
    """EDM made from our configuration ignores the chain, so that it is no sampler; the configuration comes back."""
    ours = DDPMVLBScheduler(beta_end=0.03, variance_type="learned_range")
    edm = EDMEulerScheduler.from_config(ours.config)
    assert DDPMVLBScheduler.from_config(edm.config).config.beta_end == 0.03
    with pytest.raises(ValueError, match="EDMEulerScheduler, was made from the configuration of a chain of betas"):
        DDPMVLBPipeline(tiny_unet(), edm)


def test_subclasses_of_the_user_are_taken():
    """A scheduler of the user's own keeps the chain of the class that it stands on."""

    class Mine(DDIMScheduler):
        def __init__(self, **options):
            super().__init__(**options)

    assert sample(DDPMVLBPipeline(tiny_unet(), Mine(num_train_timesteps=20))).isfinite().all()


@pytest.mark.parametrize("name", ["UNet2DModel", "DDPMPipeline", ["DDPMScheduler"], 3])
def test_a_class_that_is_no_scheduler(name, tmp_path):
    """A configuration of something else is refused in one line, with its class."""
    config = {"_class_name": name, "beta_schedule": "linear"}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    for load in (lambda: DDPMVLBScheduler.from_config(config), lambda: DDPMVLBScheduler.from_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="`_class_name` is .*, which is no scheduler") as refusal:
            load()
        assert "\n" not in str(refusal.value)
