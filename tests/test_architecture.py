"""The house: who imports whom, what is public, and which private names of diffusers it stands on."""

import ast
import importlib
import inspect
import json
import logging
import sys
from pathlib import Path

import diffusers
import pytest
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, HeunDiscreteScheduler
from diffusers.configuration_utils import ConfigMixin
from diffusers.configuration_utils import register_to_config as registered
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin

import ddpm_vlb

# Stock's numpy round trips, none of our business.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SOURCE = Path(ddpm_vlb.__file__).parent
# Each module imports only from those before it.
ORDER = (
    "counter_noise",
    "bin_mass",
    "distributions",
    "schedules",
    "devices",
    "forward_process",
    "reverse_tables",
    "reverse_process",
    "step_log_probs",
    "checks",
    "path_configurations",
    "path_networks",
    "gaussian_paths",
    "path_losses",
    "losses",
    "gaussian_model",
    "timestep_samplers",
    "evaluation",
    "pilot",
    "identities",
    "students_t",
    "scores",
    "estimation",
    "validation",
    "guidance",
    "classification",
    "ode",
    "respacing",
    "optimal_paths",
    "step_statistics",
    "transition_costs",
    "described_chains",
    "configurations",
    "few_step_store",
    "chains",
    "walk",
    "configured_scheduler",
    "scheduling_ddpm_vlb",
    "path_checkpoints",
    "sample_shapes",
    "card_results",
    "model_card",
    "repositories",
    "finite_samples",
    "swapped_schedulers",
    "widening",
    "recorded_trajectories",
    "pipeline_ddpm_vlb",
    "checkpoint_scores",
    "integer_gaussians",
    "rans",
    "seed_images",
    "compressed_files",
    "exact_networks",
    "bits_back",
    "compression",
)
MATHEMATICS = ORDER[: ORDER.index("described_chains")]
# Narrower than the order: what some modules may import of this package at all.
SIBLINGS = {
    "bin_mass": set(),
    "distributions": {"bin_mass"},
    "schedules": set(),
    "devices": set(),
    "path_configurations": {"schedules"},
    "gaussian_model": set(),
    "timestep_samplers": {"devices", "gaussian_model"},
    "students_t": set(),
    "scores": {"identities", "students_t"},
    "respacing": {"forward_process"},
    "optimal_paths": {"forward_process"},
    "described_chains": {"path_configurations"},
    "configurations": {"described_chains", "respacing", "schedules"},
    "few_step_store": {"configurations", "respacing"},
    "sample_shapes": set(),
    "card_results": {"sample_shapes"},
    "model_card": {"card_results", "path_checkpoints", "sample_shapes"},
    "repositories": set(),
    "guidance": {"devices"},
    "finite_samples": set(),
    "swapped_schedulers": {"path_configurations", "scheduling_ddpm_vlb"},
    "widening": {"scheduling_ddpm_vlb"},
    "step_log_probs": {"distributions", "reverse_process"},
    "recorded_trajectories": {"scheduling_ddpm_vlb", "step_log_probs"},
    "integer_gaussians": set(),
    "rans": {"integer_gaussians"},
    "seed_images": {"integer_gaussians", "rans"},
    "compressed_files": set(),
    "exact_networks": {"checks", "forward_process", "path_networks", "reverse_process"},
    "bits_back": {"checks", "evaluation", "integer_gaussians", "rans", "reverse_process"},
}
# The console command stands above all of this: test_wings.py.
MODULES = sorted(path.stem for path in SOURCE.glob("*.py") if path.stem not in ("__init__", "cli"))


def imports(name: str) -> tuple[set[str], set[str]]:
    """The siblings and the top-level packages that a module imports, anywhere in its code."""
    siblings, packages = set(), set()
    for node in ast.walk(ast.parse((SOURCE / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1, f"{name} imports from above the package"
            siblings |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
            continue
        else:
            continue
        for imported in names:
            parts = imported.split(".")
            if parts[0] == "ddpm_vlb":
                siblings.add(parts[1] if len(parts) > 1 else "__init__")
            else:
                packages.add(parts[0])
    return siblings, packages


def test_every_module_has_its_place():
    """A new module must be entered into the order; a module of the order cannot silently vanish."""
    assert set(MODULES) == set(ORDER), "enter the new module into ORDER"


@pytest.mark.parametrize("name", MODULES)
def test_modules_import_only_from_above(name):
    """No module imports one that comes after it, nor the package's `__init__`: the order is that of reading."""
    siblings, _ = imports(name)
    assert siblings <= set(ORDER[: ORDER.index(name)])
    assert siblings <= SIBLINGS.get(name, siblings)


@pytest.mark.parametrize("name", MATHEMATICS)
def test_the_mathematics_needs_torch_only(name):
    """Below the configurations there is the standard library and torch: no numpy, no diffusers."""
    _, packages = imports(name)
    assert packages <= set(sys.stdlib_module_names) | {"torch"}


@pytest.mark.parametrize("name", ORDER[len(MATHEMATICS) :])
def test_the_front_door_needs_few_packages(name):
    """Scheduler, card, pipeline and what they stand on add what the installation asks for, and nothing else."""
    _, packages = imports(name)
    assert packages <= set(sys.stdlib_module_names) | {
        "torch",
        "diffusers",
        "huggingface_hub",
        "safetensors",
        "numpy",
        "PIL",
    }


def test_the_checker_sees_imports(tmp_path, monkeypatch):
    """The parser behind these tests finds every form of import, inside functions too."""
    code = "import numpy.linalg as x\nfrom . import a\nfrom .b import c\nfrom ddpm_vlb.d import e\nimport ddpm_vlb\n"
    (tmp_path / "module.py").write_text(code + "def f():\n    from .g import h\n    import os\n")
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    assert imports("module") == ({"a", "b", "d", "g", "__init__"}, {"numpy", "os"})


def test_no_drawer_for_leftovers():
    """No module is a drawer called utils, helpers, common or misc."""
    assert not {"utils", "util", "helpers", "common", "misc"} & set(MODULES)
    assert (SOURCE / "py.typed").exists()


def test_public_names_exist_once():
    """__all__ has each of its names once (ruff sorts them), and each is there."""
    assert len(ddpm_vlb.__all__) == len(set(ddpm_vlb.__all__))
    assert all(hasattr(ddpm_vlb, name) for name in ddpm_vlb.__all__)
    imported = {
        name
        for name, value in vars(ddpm_vlb).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("ddpm_vlb")
    }
    constants = {name for name in ddpm_vlb.__all__ if name.isupper()}
    assert imported == set(ddpm_vlb.__all__) - constants


@pytest.mark.parametrize("name", ddpm_vlb.__all__)
def test_public_names_are_documented(name):
    """Every public name, and every public method of a public class, has a docstring of its own."""
    public = getattr(ddpm_vlb, name)
    assert public.__doc__ and not public.__doc__.startswith(f"{name}(")
    if inspect.isclass(public):
        for key, member in vars(public).items():
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if inspect.isfunction(function) and not key.startswith("_") and function.__module__ == public.__module__:
                assert function.__doc__, f"{name}.{key}"


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_documented(name):
    """Every module says in its first lines what it is."""
    assert importlib.import_module(f"ddpm_vlb.{name}").__doc__


def test_mixins_are_the_only_bases():
    """Our classes inherit from nothing but diffusers' mixins, pipeline and outputs, NamedTuple, and three of our own.

    An autograd.Function is no object with a hierarchy but torch's way to write a derivative down, and a Module its way
    to carry another one's weights.
    """
    allowed = {"SchedulerMixin", "ConfigMixin", "DiffusionPipeline", "NamedTuple", "ImportanceTimesteps"}
    allowed |= {"torch.autograd.Function", "ConfiguredScheduler", "nn.Module", "Stack"}
    allowed |= {"DDPMSchedulerOutput", "ImagePipelineOutput"}
    for name in MODULES:
        for node in ast.walk(ast.parse((SOURCE / f"{name}.py").read_text())):
            if isinstance(node, ast.ClassDef):
                assert {ast.unparse(base) for base in node.bases} <= allowed, f"{name}.{node.name}"


# --- private names of diffusers


def test_compatibles_mean_what_we_take_them_for():
    """SchedulerMixin finds the classes that share a config through `_compatibles`; stock DDPM's are ours."""
    assert DDPMScheduler._compatibles == [e.name for e in KarrasDiffusionSchedulers]
    assert isinstance(inspect.getattr_static(SchedulerMixin, "compatibles"), property)
    assert HeunDiscreteScheduler in ddpm_vlb.DDPMVLBScheduler().compatibles


def test_default_values_are_dropped_on_a_change_of_class():
    """The reason for our register_to_config: stock lists values left at their defaults and drops them from a config.

    If this fails diffusers has changed `_use_default_values`, and the override can go or has to follow.
    """
    stock = DDPMScheduler(beta_end=0.02)
    dropped = stock.config["_use_default_values"]
    assert "beta_start" in dropped and "beta_end" not in dropped
    other = HeunDiscreteScheduler.from_config(stock.config)
    assert (other.config.beta_start, other.config.beta_end) == (0.00085, 0.02)
    ours = ddpm_vlb.DDPMVLBScheduler(beta_end=0.02)
    assert "beta_start" not in ours.config["_use_default_values"]
    assert "clip_sample" in ours.config["_use_default_values"]


def test_register_to_config_gets_the_defaults_as_a_keyword():
    """The decorator hands `_use_default_values` to the instance's own register_to_config, where we take keys out."""
    seen = {}

    class Spy(ConfigMixin):
        config_name = "spy.json"

        def register_to_config(self, **kwargs):
            seen.update(kwargs)
            super().register_to_config(**kwargs)

        @registered
        def __init__(self, a=1, b=2):
            pass

    Spy(b=3)
    assert seen["_use_default_values"] == ["a"] and (seen["a"], seen["b"]) == (1, 3)


@pytest.mark.parametrize("base", [ConfigMixin, DiffusionPipeline])
def test_configs_are_written_through_to_json_string(base, tmp_path):
    """save_config writes what to_json_string returns: the one place where we decide what stands in the files."""

    class Written(base):
        config_name = "written.json"

        def to_json_string(self):
            return json.dumps({"by": "us"})

    instance = Written()
    if base is ConfigMixin:
        instance.register_to_config(a=1)
    instance.save_config(tmp_path)
    assert json.loads((tmp_path / "written.json").read_text()) == {"by": "us"}


def test_pipelines_know_callback_tensor_inputs():
    """`_callback_tensor_inputs` and `model_cpu_offload_seq` are still diffusers' names for what we set."""
    # Read as text: importing that pipeline needs transformers.
    stable = Path(diffusers.__file__).parent / "pipelines/stable_diffusion/pipeline_stable_diffusion.py"
    assert "_callback_tensor_inputs = [" in stable.read_text()
    assert DiffusionPipeline.model_cpu_offload_seq is None and DDPMPipeline.model_cpu_offload_seq == "unet"
    assert ddpm_vlb.DDPMVLBPipeline._callback_tensor_inputs == ["latents"]
    assert isinstance(inspect.getattr_static(DiffusionPipeline, "_execution_device"), property)
    assert callable(DiffusionPipeline.progress_bar) and callable(DiffusionPipeline.maybe_free_model_hooks)
    assert callable(DiffusionPipeline.numpy_to_pil)


def test_loader_finds_the_mixin_on_our_scheduler_s_module():
    """diffusers' pipeline loader looks SchedulerMixin up by its bare name on the module of the scheduler it loads."""
    from ddpm_vlb import scheduling_ddpm_vlb

    assert scheduling_ddpm_vlb.SchedulerMixin is SchedulerMixin
    assert "ddpm_vlb.scheduling_ddpm_vlb" in sys.modules


def test_unexpected_config_keys_are_logged_by_diffusers():
    """The logger that the silence of our plain configs is measured on still speaks for unknown keys."""
    messages = []
    handler = logging.Handler(level=logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("diffusers")
    logger.addHandler(handler)
    try:
        DDPMScheduler.from_config({"unheard_of": 1})
    finally:
        logger.removeHandler(handler)
    assert len(messages) == 1 and "unheard_of" in messages[0]
