"""Checkpoints of flow matching, EDM and their kin: stock's network and scheduler, and a chain of ours beside them."""

import json
import logging
import re

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    CosineDPMSolverMultistepScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hub_server import HubServer
from networks import quiet, sample, seeded, tiny_dit, tiny_unet
from sharing_support import client_of

from ddpm_vlb import (
    DDPMVLBPipeline,
    DDPMVLBScheduler,
    GaussianPath,
    SquaredErrors,
    StoredPath,
    describe_path,
    model_card,
    path_chain,
    spaced_ratios,
    stock_sigmas,
)
from ddpm_vlb.path_checkpoints import ratios_of

SCHEDULERS = {
    "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "heun": lambda: FlowMatchHeunDiscreteScheduler(),
    "unipc": lambda: UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    "edm": lambda: EDMEulerScheduler(),
    "cosine": lambda: CosineDPMSolverMultistepScheduler(),
    "svd": lambda: EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
}
RATIOS = spaced_ratios(0.05, 100.0, 40)


def pipe_of(name="flow", unet=None, **options):
    """A tiny network of a path, with a chain of 40 steps."""
    scheduler = SCHEDULERS[name]()
    pipe = quiet(DDPMVLBPipeline(tiny_unet(out=1) if unet is None else unet, scheduler))
    pipe.chain = path_chain(scheduler, **{"levels": 17, "ratios": RATIOS, **options})
    return pipe


def test_the_chain_gives_the_ratios_back():
    """Through its betas and the JSON of its file, to the last digits; its decoder's noise is that of the first."""
    chain = path_chain(SCHEDULERS["flow"](), 17)
    loaded = DDPMVLBScheduler.from_config(json.loads(chain.to_json_string()))
    assert torch.allclose(ratios_of(loaded), spaced_ratios(0.05, 100.0, 1000), rtol=1e-12, atol=0)
    first = loaded.reverse_process(dtype=torch.float64)(*torch.zeros(2, 1, 1, 2).double(), 0)[0].log_variance
    assert torch.allclose(first.exp().sqrt(), torch.tensor(0.05).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_stock_s_files_and_the_chain_come_back(name, tmp_path):
    """The scheduler is stock's and untouched, and the images are the same to the bit."""
    pipe = pipe_of(name)
    pipe.save_pretrained(tmp_path)
    again = quiet(DDPMVLBPipeline.from_pretrained(tmp_path))
    assert type(again.scheduler) is type(SCHEDULERS[name]())
    assert torch.equal(ratios_of(again.chain), ratios_of(pipe.chain)) and again.chain.levels == 17
    # Loaded weights lie where the file has them, and another alignment may round sums otherwise.
    assert torch.allclose(sample(pipe), sample(again), rtol=0, atol=1e-5)


def test_sampling_is_p_on_the_chain():
    """A step after the other by the reverse process and the network of the path."""
    pipe, generator = pipe_of("edm"), seeded()
    images = sample(pipe, steps=40, output_type="latent")
    path = GaussianPath.from_config(SCHEDULERS["edm"](), RATIOS)
    network, reverse = path.network(pipe.unet), path.reverse_process(17)
    x = torch.randn(1, 1, 8, 8, generator=generator)
    with torch.no_grad():
        for t in reversed(range(40)):
            p, _ = reverse(network(x, t), x, t)
            x = p.sample(torch.randn(x.shape, generator=generator)) if t else p.mean
    assert torch.allclose(images, x, rtol=0, atol=1e-5)


def test_stored_steps_are_taken(tmp_path):
    """Paths and their optimal variances lie in chain/, and stock's own scheduler file stays as it was."""
    pipe = pipe_of()
    pipe.save_pretrained(tmp_path)
    before = (tmp_path / "scheduler/scheduler_config.json").read_bytes()
    errors = SquaredErrors(torch.arange(40), torch.linspace(0.01, 0.5, 40).double())
    pipe.chain.store_few_steps([StoredPath((39, 20, 0), "analytic", 0.1)], errors)
    pipe.save_pretrained(tmp_path)
    again = quiet(DDPMVLBPipeline.from_pretrained(tmp_path))
    assert again.chain.optimal_paths[3].timesteps == (39, 20, 0)
    assert torch.allclose(sample(again, steps=3), sample(pipe, steps=3), rtol=0, atol=1e-5)
    assert (tmp_path / "scheduler/scheduler_config.json").read_bytes() == before
    shorter = again.chain.reverse_process(dtype=torch.float64, num_inference_steps=3)
    assert shorter.decoder_log_variance == pytest.approx(0.1 + torch.tensor(0.01).log().item(), abs=1e-6)


def test_the_default_chain_is_not_saved(tmp_path):
    """A checkpoint without a chain has one of 256 levels, and leaves the choice to the next."""
    pipe = quiet(DDPMVLBPipeline(tiny_unet(out=1), SCHEDULERS["flow"]()))
    assert len(pipe.chain) == 1000 and pipe.chain is pipe.chain
    assert float(pipe.path.ratios[0]) == pytest.approx(0.8 / 255) and float(pipe.path.ratios[-1]) == pytest.approx(100)
    with_steps().save_pretrained(tmp_path)
    pipe.save_pretrained(tmp_path)
    assert len(DDPMVLBPipeline.from_pretrained(tmp_path).chain) == 1000
    assert not list((tmp_path / "chain").iterdir())


def test_the_default_chain_is_of_the_network_that_there_is():
    """One with a variance half has learned variance, and a scheduler that begins later has another first ratio."""
    pipe = DDPMVLBPipeline(tiny_unet(out=1), SCHEDULERS["edm"]())
    assert pipe.chain.config.variance_type == "fixed_small"
    pipe.unet = tiny_unet()
    assert pipe.chain.config.variance_type == "learned_range"
    pipe = DDPMVLBPipeline(tiny_dit(), EDMEulerScheduler(sigma_min=0.01))
    first = pipe.path.ratios[0]
    pipe.register_modules(scheduler=EDMEulerScheduler(sigma_min=0.1))
    assert [float(first), float(pipe.path.ratios[0])] == pytest.approx([0.01, 0.1])


def test_latents_are_not_clipped_by_default():
    """A transformer's data have no levels, wherever it comes from."""
    chain = DDPMVLBPipeline(tiny_dit(), SCHEDULERS["flow"]()).chain
    assert chain.levels is None and not chain.config.clip_sample and chain.config.variance_type == "learned_range"


def with_steps():
    """A pipeline of a flow whose chain stores a path of three steps."""
    pipe = pipe_of()
    pipe.chain.store_few_steps([StoredPath((39, 20, 0), "network", 0.0)])
    return pipe


def test_from_pipe_brings_the_chain(tmp_path):
    """Of ours, and of a stock pipeline the one beside its files."""
    pipe = with_steps()
    pipe.save_pretrained(tmp_path)
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock).__name__ == "DDPMPipeline"
    for source in (pipe, stock):
        made = quiet(DDPMVLBPipeline.from_pipe(source))
        assert torch.equal(ratios_of(made.chain), ratios_of(pipe.chain)) and 3 in made.chain.optimal_paths
        assert torch.allclose(sample(made, steps=3), sample(pipe, steps=3), rtol=0, atol=1e-5)


def test_from_pipe_without_a_chain(tmp_path, said):
    """There is the default one, without a word where none is missing, and told of where the folder is gone."""
    DDPMVLBPipeline(tiny_unet(out=1), SCHEDULERS["flow"]()).save_pretrained(tmp_path / "flow")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "flow")
    assert len(DDPMVLBPipeline.from_pipe(stock).chain) == 1000 and "chain" not in said.text
    (tmp_path / "flow").rename(tmp_path / "other")
    assert len(DDPMVLBPipeline.from_pipe(stock).chain) == 1000 and "is gone" in said.text


def test_noise_alone_is_written_as_json():
    """sigma = 1 of a flow has no ratio, and metrics.json no infinity."""
    pipe = pipe_of(ratios=torch.cat([RATIOS, torch.tensor([torch.inf]).double()]))
    told = describe_path(pipe)
    assert json.loads(json.dumps(told, allow_nan=False))["ratios"] == [pytest.approx(0.05), None]
    assert "41 steps with noise-to-signal ratios from 0.05 to noise alone" in str(model_card(pipe, "flow"))


def test_what_cannot_be_read_is_not_portable():
    """A scheduler that was put in place of the one that the chain was set for."""
    pipe = pipe_of()
    assert pipe.portable
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    assert not pipe.portable


OF_ANOTHER_DECODER = {
    "learned": {"variance_type": "learned_range"},
    "betas": {"trained_betas": [0.1, 0.2]},
    "schedule": {"trained_betas": None},
    "zero snr": {"rescale_betas_zero_snr": True},
}


@pytest.mark.parametrize("name", OF_ANOTHER_DECODER)
@pytest.mark.parametrize("how", ["from_config", "register_to_config"])
def test_the_decoder_goes_with_its_chain(name, how):
    """As if the scheduler had been made with the new values alone."""
    given, chain = OF_ANOTHER_DECODER[name], path_chain(SCHEDULERS["flow"](), 17, RATIOS)
    without = {key: own for key, own in chain.config.items() if key != "decoder_log_variance"}
    expected = DDPMVLBScheduler.from_config(without | given).reverse_process()
    if how == "from_config":
        chain = DDPMVLBScheduler.from_config(chain.config, **given)
    else:
        chain.register_to_config(**given)
    output, x = torch.ones(2, 2 if name == "learned" else 1, 1, 1) * 0.3, torch.zeros(2, 1, 1, 1)
    assert torch.equal(chain.reverse_process()(output, x, 0)[0].log_variance, expected(output, x, 0)[0].log_variance)


def test_the_decoder_stays_with_its_chain():
    """Where other things change, the same betas are given, or it is given itself."""
    config = path_chain(SCHEDULERS["flow"](), 17, RATIOS).config
    betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
    for given in ({"clip_sample": False}, {"trained_betas": betas}, {"variance_type": "fixed_large"}):
        assert DDPMVLBScheduler.from_config(config, **given).config["decoder_log_variance"] is not None
    given = {"variance_type": "learned_range", "decoder_log_variance": -3.0}
    assert DDPMVLBScheduler.from_config(config, **given).config["decoder_log_variance"] == -3.0


def test_continuous_data_begins_where_stock_s_grid_does():
    """The lowest sigma of EDM's grid, and 1 / (N - 1) of flow matching's, shifted or made for an image's size."""
    lows = [float(ratios_of(path_chain(scheduler, None))[0]) for scheduler in (EDMEulerScheduler(sigma_min=0.01),)]
    lows.append(float(ratios_of(path_chain(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), None))[0]))
    assert lows == pytest.approx([0.01, 1 / 999])
    assert not path_chain(EDMEulerScheduler(), None).config.clip_sample


def test_stock_samples_a_flow_as_its_own_formula(tmp_path):
    """`DDPMPipeline` walks Euler's steps with a flow's network; of the other kinds it would not, and is not named."""
    pipe_of().save_pretrained(tmp_path)
    stock = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert type(stock).__name__ == "DDPMPipeline"
    scheduler, x = SCHEDULERS["flow"](), torch.randn(1, 1, 8, 8, generator=seeded())
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for now, then in zip(scheduler.sigmas, scheduler.sigmas[1:]):
            x = x + (then - now) * stock.unet(x, 1000 * now).sample
    assert torch.allclose(sample(stock), (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)
    others = [pipe_of(name) for name in SCHEDULERS if name != "flow"]
    others += [pipe_of(unet=tiny_unet(), variance_type="learned_range"), pipe_of(unet=tiny_unet(out=1, classes=3))]
    assert not any(pipe.portable for pipe in others)


def test_classes_and_a_variance_half():
    """A DiT's labels and its learned variance go through the path."""
    pipe = pipe_of("flow", tiny_dit(), levels=None, variance_type="learned_range")
    latents = [sample(pipe, class_labels=label, output_type="latent") for label in (0, 1)]
    assert latents[0].shape == (1, 2, 8, 8) and not torch.equal(*latents)


def test_chains_of_betas_have_no_path():
    """There the chain is the scheduler, which is set itself."""
    pipe = DDPMVLBPipeline(tiny_unet(), DDPMVLBScheduler(variance_type="learned_range"))
    assert pipe.chain is pipe.scheduler and pipe.path is None and pipe.network is pipe.unet
    with pytest.raises(ValueError, match="set `pipeline.scheduler`"):
        pipe.chain = path_chain(SCHEDULERS["flow"](), 17)


PREDICTS_FLOW = {"prediction_type": "flow_prediction"}
REFUSED = {
    "invert_sigmas": lambda: DDPMVLBPipeline(tiny_unet(), FlowMatchEulerDiscreteScheduler(invert_sigmas=True)),
    "must be a DDPMVLBScheduler": lambda: setattr(pipe_of(), "chain", DDPMScheduler()),
    "prediction_type='v_prediction'": lambda: setattr(pipe_of(), "chain", DDPMVLBScheduler()),
    "for images of shape": lambda: setattr(pipe_of(), "chain", with_errors((1, 4, 4))),
    "`decoder_log_variance` must be a finite number": lambda: DDPMVLBScheduler(decoder_log_variance="0"),
    "describes a chain of betas, not a path": lambda: path_chain(DDPMScheduler()),
    "betas: set `use_flow_sigmas=True`": lambda: path_chain(UniPCMultistepScheduler(**PREDICTS_FLOW)),
    "network of flow matching, set `use_flow_sigmas=True`": lambda: DDPMVLBPipeline(
        tiny_unet(out=1), DPMSolverMultistepScheduler(**PREDICTS_FLOW)
    ),
}


def with_errors(shape):
    chain = path_chain(SCHEDULERS["flow"](), 17, RATIOS)
    chain.store_few_steps((), SquaredErrors(torch.tensor([0, 39]), torch.ones(2).double(), torch.ones(2, *shape)))
    return chain


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_refused(words):
    """In one line."""
    with pytest.raises(ValueError, match=words.replace("(", "\\(")) as refusal:
        REFUSED[words]()
    assert "\n" not in str(refusal.value)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Two repositories, one with a chain and one without, read by this process' client."""
    root = tmp_path_factory.mktemp("hub")
    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        client_of(server, patch, root)
        pipe = pipe_of()
        pipe.push_to_hub("tester/flow")
        quiet(DDPMVLBPipeline(pipe.unet, pipe.scheduler)).push_to_hub("tester/foreign")
        yield root / "cache"


@pytest.fixture
def said(caplog):
    """What diffusers' loggers say."""
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_the_chain_comes_from_the_hub(hub, said):
    """Fetched beside what the index names, from the cache too; absent without a word where the repository has none."""
    told = [{}, {"local_files_only": True}]
    chains = [DDPMVLBPipeline.from_pretrained("tester/flow", cache_dir=hub, **own).chain for own in told]
    assert all(torch.equal(ratios_of(chain), ratios_of(pipe_of().chain)) for chain in chains)
    foreign = [DDPMVLBPipeline.from_pretrained("tester/foreign", cache_dir=hub, **own) for own in told]
    assert [len(pipe.chain) for pipe in foreign] == [1000, 1000]
    assert "chain" not in said.text


def test_from_pipe_takes_the_chain_from_the_cache(hub, monkeypatch, said):
    """Of a stock pipeline from the Hub, once ours was loaded from there; else it is told of."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub.with_name("other")))
    monkeypatch.setattr("diffusers.configuration_utils.HF_HUB_CACHE", str(hub.with_name("other")), raising=False)
    stock = DiffusionPipeline.from_pretrained("tester/flow")
    assert len(DDPMVLBPipeline.from_pipe(stock).chain) == 1000 and "is not in the cache" in said.text
    DDPMVLBPipeline.from_pretrained("tester/flow")
    assert len(DDPMVLBPipeline.from_pipe(stock).chain) == 40


def test_a_chain_that_cannot_be_asked_for_is_told_of(hub, tmp_path, said):
    """Where stock alone filled the cache, and the Hub is out of reach."""
    DiffusionPipeline.from_pretrained("tester/flow", cache_dir=tmp_path)
    DDPMVLBPipeline.from_pretrained("tester/flow", cache_dir=tmp_path, local_files_only=True)
    assert "whether it has a chain/ is not in the cache" in said.text


HONOURED = {
    "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "unipc": lambda: UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0),
    "svd": lambda: EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
}


@pytest.mark.parametrize("name", HONOURED)
def test_stock_visits_the_steps_by_its_sigmas(name):
    """Given to stock's class, they are the path's levels again, and the network is told the path's times."""
    scheduler, steps = HONOURED[name](), [39, 20, 5, 0]
    pipe = DDPMVLBPipeline(tiny_unet(out=1), scheduler)
    pipe.chain = path_chain(scheduler, 17, RATIOS)
    scheduler.set_timesteps(sigmas=np.array(stock_sigmas(pipe, steps)))
    assert torch.allclose(scheduler.sigmas[:4].double(), pipe.path.sigma[steps], rtol=1e-5, atol=0)
    assert float(scheduler.sigmas[-1]) == 0 and len(scheduler.timesteps) == 4
    truncated = name == "unipc"
    assert torch.allclose(
        scheduler.timesteps.double(), pipe.path.timesteps[steps], rtol=1e-5, atol=1.0 if truncated else 0
    )


@pytest.mark.parametrize("name", ["edm", "heun"])
def test_no_sigmas_where_stock_takes_none(name):
    """EDM's class takes ramp positions, Heun's nothing."""
    assert stock_sigmas(pipe_of(name), [5, 0]) is None


@pytest.mark.parametrize(
    "key",
    ["use_dynamic_shifting", "shift_terminal", *(f"use_{own}_sigmas" for own in ("exponential", "beta", "karras"))],
)
def test_no_sigmas_where_stock_remakes_them(key):
    """Each option makes another grid of what is given; without it the sigmas are taken."""
    pipe = pipe_of()
    assert len(stock_sigmas(pipe, [5, 0])) == 2
    pipe.scheduler.register_to_config(**{key: 0.1 if key == "shift_terminal" else True})
    assert stock_sigmas(pipe, [5, 0]) is None


def test_a_transformer_is_the_network(tmp_path):
    """Of DiTPipeline's folder it and the scheduler are read, for paths and for chains of betas."""
    vae = AutoencoderKL(latent_channels=2, norm_num_groups=2, block_out_channels=(4,))
    for scheduler, kind in (
        (SCHEDULERS["flow"](), FlowMatchEulerDiscreteScheduler),
        (DDPMScheduler(), DDPMVLBScheduler),
    ):
        DiTPipeline(tiny_dit(), vae, scheduler).save_pretrained(tmp_path)
        pipe = DDPMVLBPipeline.from_pretrained(tmp_path)
        assert type(pipe.scheduler) is kind and type(pipe.unet) is DiTTransformer2DModel
        assert all(torch.equal(*pair) for pair in zip(pipe.unet.parameters(), tiny_dit().parameters()))
    index = json.loads((tmp_path / "model_index.json").read_text())
    for bad in (["os", "system"], ["diffusers", "UNet2DConditionOutput"], ["diffusers", "DDPMScheduler"]):
        (tmp_path / "model_index.json").write_text(json.dumps(index | {"transformer": bad}))
        with pytest.raises(ValueError, match="transformer|system"):
            DDPMVLBPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["unet", "transformer"])
def test_a_given_network_is_taken(part, tmp_path):
    """In place of the folder's, whose weights are not read."""
    vae = AutoencoderKL(latent_channels=2, norm_num_groups=2, block_out_channels=(4,))
    DiTPipeline(tiny_dit(), vae, SCHEDULERS["flow"]()).save_pretrained(tmp_path)
    (tmp_path / "transformer/diffusion_pytorch_model.safetensors").unlink()
    network = tiny_dit(seed=1)
    assert DDPMVLBPipeline.from_pretrained(tmp_path, **{part: network}).unet is network
    for unknown in ({"transfomer": network}, {"unet": network, "transformer": network}):
        with pytest.raises(ValueError, match="leave them out"):
            DDPMVLBPipeline.from_pretrained(tmp_path, **unknown)


@pytest.mark.parametrize("name", ["flow", "unipc", "edm", "svd"])
def test_the_card_s_code_of_stock_runs(name, tmp_path):
    """By the sigmas of a stored chain where stock takes them; the card says which chain the number is of."""
    pipe = pipe_of(name)
    pipe.chain.store_few_steps([StoredPath((39, 20, 0), "network", 0.0)])
    pipe.save_pretrained(tmp_path)
    card = str(model_card(pipe, str(tmp_path)))
    assert "40 steps with noise-to-signal ratios from 0.05 to 100, with fixed variance" in card
    stock = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[name != "flow"]
    assert ("sigmas=np" in stock) == (name != "edm") == ("sampled by ddpm-vlb alone" not in card)
    names: dict = {}
    exec(stock, names)
    assert names["x"].shape == (4, 1, 8, 8) and names["x"].isfinite().all()
    assert len(names["scheduler"].timesteps) == (50 if name == "edm" else 3)


def test_a_scheduler_of_betas_in_a_path_s_pipeline_is_refused():
    """The network would be told times, and sampled as what it is not."""
    pipeline = DDPMVLBPipeline(tiny_unet(out=1), FlowMatchEulerDiscreteScheduler())
    pipeline.chain = path_chain(pipeline.scheduler, levels=17)
    pipeline.scheduler = DDPMScheduler()
    with pytest.raises(ValueError, match="put the path's scheduler back"):
        pipeline(num_inference_steps=2)


def test_fewer_steps_that_begin_later_keep_the_decoder_of_their_first_level():
    """Log r^2 of that level; a value of one's own is of the chain's first alone."""
    chain = path_chain(FlowMatchEulerDiscreteScheduler(), 17, RATIOS)
    last, start = len(RATIOS) - 1, float(RATIOS[1])
    assert chain.reverse_process(timesteps=[1, last]).decoder_log_variance == pytest.approx(2 * np.log(start))
    own = path_chain(FlowMatchEulerDiscreteScheduler(), 17, RATIOS, decoder_log_variance=-6.0)
    assert own.reverse_process(timesteps=[1, last]).decoder_log_variance is None
