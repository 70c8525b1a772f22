"""The house above the core: commands, recipes and wings; who imports whom, what they need, and how large they are."""

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import ddpm_vlb

SOURCE = Path(ddpm_vlb.__file__).parent
TESTS = Path(__file__).parent
# Each floor imports from those before it and from itself.
FLOORS = ("runtime", "scoring", "training few_steps quality", "recipes", "commands")
WINGS = [name for floor in FLOORS for name in floor.split()]
OF_THE_EXTRA = {"accelerate", "datasets", "matplotlib", "scipy", "sklearn", "tensorboard", "transformers"}
MODULES = [path for name in WINGS for path in sorted((SOURCE / name).glob("*.py"))]
CORE = sorted(SOURCE.glob("*.py"))


def identify(path):
    return path.relative_to(SOURCE).as_posix()


def imported(path, guarded=False):
    """The modules that a file imports, and the names it takes of the package itself."""
    tree = ast.parse(path.read_text())
    if not guarded:
        tree.body = [node for node in tree.body if "__name__" not in ast.unparse(getattr(node, "test", node))]
    modules, names = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a file that may be copied names its imports in full"
            modules.add(node.module)
            names |= {alias.name for alias in node.names} if node.module == "ddpm_vlb" else set()
    return modules, names


def wings_of(modules):
    parts = [module.split(".") for module in modules if module.startswith("ddpm_vlb.")]
    return {own[1] for own in parts}


def test_every_wing_has_its_floor():
    """A new folder must be entered into the order, and says in its first lines what it is."""
    folders = {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(WINGS)
    assert all(ast.get_docstring(ast.parse(path.read_text())) for path in MODULES)
    assert not {"utils", "util", "helpers", "common", "misc"} & {path.stem for path in MODULES}


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_wings_import_downwards(path):
    """From lower floors, from their own, and of the core what it calls public."""
    modules, names = imported(path)
    own = path.parent.name
    allowed = {own}
    for floor in FLOORS:
        if own in floor.split():
            break
        allowed |= set(floor.split())
    assert wings_of(modules) <= allowed
    assert names <= {*ddpm_vlb.__all__, *allowed}


@pytest.mark.parametrize("name", ["training", "few_steps", "quality", "scoring"])
def test_only_its_program_part_names_a_command(name):
    """No wing does at all; a recipe does where it is run as a program, when it is nobody's module."""
    assert all("commands" not in wings_of(imported(path, guarded=True)[0]) for path in (SOURCE / name).glob("*.py"))
    recipe = SOURCE / "recipes" / "train.py"
    assert "commands" in wings_of(imported(recipe, guarded=True)[0]) - wings_of(imported(recipe)[0])


@pytest.mark.parametrize("path", [path for path in CORE if path.stem != "cli"], ids=identify)
def test_the_core_stands_alone(path):
    """It names no wing, and no package of the `train` extra."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and (node.module or "").split(".")[0] not in WINGS
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            assert not {name.split(".")[0] for name in names} & (OF_THE_EXTRA | {"ddpm_vlb"})


WITHOUT_THE_EXTRA = f"""
import sys
for name in {sorted(OF_THE_EXTRA)}:
    sys.modules[name] = None
import ddpm_vlb
from ddpm_vlb.cli import main
assert ddpm_vlb.DDPMVLBScheduler(num_train_timesteps=5).reverse_process().forward.betas.shape == (5,)
for command in (["train"], ["evaluate", "--model", "nowhere"], ["publish", "nowhere"]):
    try:
        main(command)
    except SystemExit as stop:
        print(stop.code)
try:
    import ddpm_vlb.scoring.sweep
except ModuleNotFoundError as error:
    print(error)
"""


def test_without_the_extra():
    """The core works, and whatever needs more says in one line what to install."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_THE_EXTRA], capture_output=True, text=True, check=False)
    said = done.stdout.splitlines()
    assert done.returncode == 0 and len(said) == 4 and len(set(said)) == 1, done.stdout + done.stderr
    assert 'pip install "ddpm-vlb[train]"' in said[0] and "accelerate, datasets" in said[0]


# Size


def lengths(paths):
    """Lines of every function, without its docstring."""
    found = []
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                text = node.body[0] if ast.get_docstring(node) else None
                found.append(node.end_lineno - node.lineno + 1 - (text.end_lineno - text.lineno + 1 if text else 0))
    return found


@pytest.mark.parametrize("paths", [CORE, MODULES], ids=["core", "wings"])
def test_functions_are_short(paths):
    """The median function has at most eight lines."""
    assert statistics.median(lengths(paths)) <= 8


@pytest.mark.parametrize(
    "paths, limit", [(CORE, 400), (MODULES, 350), (list(TESTS.rglob("*.py")), 700)], ids=["core", "wings", "tests"]
)
def test_files_are_of_a_size_to_be_read(paths, limit):
    """No file is longer than what one reads at a sitting."""
    sizes = {path.name: len(path.read_text().splitlines()) for path in paths}
    assert {name: size for name, size in sizes.items() if size > limit} == {}
