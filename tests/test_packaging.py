"""What a user installs: a wheel and an sdist that are complete, say what they need, and import without a word."""

import configparser
import email
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import ddpm_vlb

ROOT = Path(__file__).parents[1]
# The repository, less what git ignores.
FOLDERS = (".ci", "benchmarks", "docs", "examples", "src", "tests")
FILES = (
    *(".gitignore", ".pre-commit-config.yaml", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in"),
    *("README.md", "constraints.txt", "mkdocs.yml", "pyproject.toml", "ruff.toml", "setup.cfg"),
)
METADATA = f"ddpm_vlb-{ddpm_vlb.__version__}.dist-info/METADATA"


def run(*command, cwd) -> str:
    """A program's standard output; both streams are shown if it fails."""
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def config() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg")
    return parser


def requirements(text: str) -> list[str]:
    """The lines of an option of setup.cfg, those that refer to another extra left out."""
    return [line for line in text.split() if not line.startswith("%")]


def lower_bounds() -> dict[str, str]:
    """Every `name>=version` that users must meet, by name."""
    options = config()
    wanted = requirements(options["options"]["install_requires"] + options["options.extras_require"]["train"])
    return dict(line.split(">=") for line in wanted if ">=" in line)


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, without the zeros at its end: 1.0 is 1.0.0."""
    numbers = [int(number) for number in version.split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of one build: source/, dist/, unpacked/wheel, unpacked/sdist, again/ (the sdist's wheel)."""
    folder = tmp_path_factory.mktemp("build")
    # What an earlier build left in the tree (build/, *.egg-info) would hide what this one lacks.
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
    ignore = shutil.ignore_patterns(".git", *ignored)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, folder / "source" / name)
    (folder / "source" / "tests" / "left_over.pyc").touch()
    # Both from the source: by itself `build` makes the wheel from the sdist, which comes below.
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--sdist", "--wheel", "--outdir", folder / "dist", folder / "source", cwd=folder)
    with zipfile.ZipFile(next((folder / "dist").glob("*.whl"))) as wheel:
        wheel.extractall(folder / "unpacked" / "wheel")
    for copy in ("sdist", "to_build"):
        with tarfile.open(next((folder / "dist").glob("*.tar.gz"))) as sdist:
            sdist.extractall(folder / "unpacked" / copy, filter="data")
    run(
        *build, "--wheel", "--outdir", folder / "again", next((folder / "unpacked" / "to_build").iterdir()), cwd=folder
    )
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """A folder's files by path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_file_names(built):
    """One pure wheel and one sdist, named with the package's version."""
    version = ddpm_vlb.__version__
    assert {path.name for path in (built / "dist").iterdir()} == {
        f"ddpm_vlb-{version}-py3-none-any.whl",
        f"ddpm_vlb-{version}.tar.gz",
    }


def test_the_wheel_holds_the_package_and_nothing_else(built):
    """Every module, py.typed and the licence; no tests, no examples."""
    held = files(built / "unpacked" / "wheel")
    package = files(built / "source" / "src" / "ddpm_vlb")
    assert "py.typed" in package and "pipeline_ddpm_vlb.py" in package
    assert {name: data for name, data in held.items() if ".dist-info/" not in name} == {
        f"ddpm_vlb/{name}": data for name, data in package.items()
    }
    information = METADATA.removesuffix("METADATA")
    assert held[information + "licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert held[information + "top_level.txt"] == b"ddpm_vlb\n"


def test_metadata(built):
    """Name, version, Python, licence and description are those of setup.cfg, the package and the README."""
    metadata = email.message_from_bytes(files(built / "unpacked" / "wheel")[METADATA])
    assert metadata["Name"] == "ddpm-vlb" and metadata["Version"] == ddpm_vlb.__version__
    assert metadata["Requires-Python"] == config()["options"]["python_requires"]
    assert metadata["Summary"] == config()["metadata"]["description"]
    assert "Apache-2.0" in (metadata["License"], metadata["License-Expression"])
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Description-Content-Type"] == "text/markdown"
    description = files(built / "unpacked" / "wheel")[METADATA].decode().split("\n\n", 1)[1]
    assert description.strip() == (ROOT / "README.md").read_text().strip()


def test_required_versions(built):
    """The wheel asks for setup.cfg's requirements, under no extra, and those of each extra under its own."""
    metadata = email.message_from_bytes(files(built / "unpacked" / "wheel")[METADATA])
    said = sorted(metadata.get_all("Requires-Dist"))
    extras = config()["options.extras_require"]
    wanted = requirements(config()["options"]["install_requires"])
    assert {"torch", "diffusers", "huggingface_hub"} <= {re.split("[<>=]", line)[0] for line in wanted}
    named = {name: requirements(extras[name]) for name in ("train", "docs", "test")}
    named["test"] += named["train"] + named["docs"]
    wanted += [f'{line}; extra == "{name}"' for name, lines in named.items() for line in lines]
    assert said == sorted(wanted)
    assert metadata.get_all("Provides-Extra") == ["train", "docs", "test"]


def test_the_sdist_holds_what_builds_and_tests_it(built):
    """All of the repository's files, so that the tests run from it, and no left-overs."""
    (top,) = (built / "unpacked" / "sdist").iterdir()
    assert top.name == f"ddpm_vlb-{ddpm_vlb.__version__}"
    held, expected = (
        {name: data for name, data in files(folder).items() if not re.match(r"build/|src/ddpm_vlb\.egg-info/", name)}
        for folder in (top, built / "source")
    )
    del held["PKG-INFO"], expected["tests/left_over.pyc"]
    assert {".ci/run", "tests/golden/inputs.npz", "tests/hub_server.py", "docs/samples.png"} <= set(expected)
    assert sorted(held) == sorted(expected)
    # The build adds a section of its own to setup.cfg.
    assert [name for name in held if held[name] != expected[name] and name != "setup.cfg"] == []


def test_the_sdist_builds_the_same_wheel(built):
    """A wheel made from the sdist has the same files, byte for byte."""
    wheels = [next((built / name).glob("*.whl")) for name in ("dist", "again")]
    first, second = ({name: wheel.read(name) for name in wheel.namelist()} for wheel in map(zipfile.ZipFile, wheels))
    assert first == second


@pytest.mark.slow
def test_the_wheel_imports_without_a_word(built, tmp_path):
    """Unpacked anywhere, it imports from there, all of it, and prints nothing on either stream."""
    wheel = built / "unpacked" / "wheel"
    program = f"""
import sys
sys.path.insert(0, {str(wheel)!r})
import ddpm_vlb
import json, pathlib
modules = {{name: module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "ddpm_vlb"}}
missing = [name for name in ddpm_vlb.__all__ if not hasattr(ddpm_vlb, name)]
pathlib.Path("said.json").write_text(json.dumps([ddpm_vlb.__file__, ddpm_vlb.__version__, modules, missing]))
"""
    command = [sys.executable, "-I", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    file, version, modules, missing = json.loads((tmp_path / "said.json").read_text())
    assert Path(file) == wheel / "ddpm_vlb" / "__init__.py" and version == ddpm_vlb.__version__
    assert {Path(path).parent for path in modules.values()} == {wheel / "ddpm_vlb"}
    assert len(modules) > 10 and missing == []


def test_the_oldest_tested_are_the_oldest_admitted():
    """.ci/oldest installs exactly setup.cfg's lower bounds; torch, which it takes as an argument, is the exception."""
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / ".ci" / "oldest").read_text(), re.MULTILINE))
    bounds = lower_bounds()
    assert f".ci/oldest {bounds.pop('torch')}" in (ROOT / ".ci" / "oldest").read_text()
    assert {"accelerate", "datasets", "diffusers", "huggingface_hub", "transformers"} == set(bounds)
    assert {name: release(version) for name, version in pins.items()} == {
        name: release(version) for name, version in bounds.items()
    }


def test_nothing_is_capped():
    """Requirements have a lower bound or none: what is newer is for constraints.txt to hold back."""
    options = config()
    wanted = [options["options"]["install_requires"], *options["options.extras_require"].values()]
    for line in requirements("\n".join(wanted)):
        assert re.fullmatch(r"[\w-]+(>=[\d.]+)?", line), line


def test_the_newest_tested_are_admitted():
    """constraints.txt pins every package that has a lower bound, above it."""
    pins = re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    for name, bound in lower_bounds().items():
        versions = [version for pinned, version in pins if pinned == name]
        assert versions and all(release(version) > release(bound) for version in versions), name
