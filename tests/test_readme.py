"""The documents keep their word: every Python block runs as it stands, every command exists."""

import configparser
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from hub_server import HubServer

from ddpm_vlb import cli

ROOT = Path(__file__).parents[1]
NEEDS_A_HUB = {"sharing.md"}
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PYTHON_BLOCK = re.compile(r"^(<!-- continues -->\s*)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BASH_BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")
INSTALL = 'pip install -c constraints.txt -e ".[test]"'


def python_programs(path):
    """The Python blocks of a document as lists of (line, code); a continuing block joins the one before it."""
    programs = []
    text = path.read_text()
    for match in PYTHON_BLOCK.finditer(text):
        block = text.count("\n", 0, match.start(2)), match[2]
        if match[1]:
            programs[-1].append(block)
        else:
            programs.append([block])
    return programs


def commands(text):
    """The commands of a script, without comments, flags for silence, and shell set-up."""
    lines = (line.split(" #")[0].strip() for line in text.splitlines() if not line.startswith("#"))
    return [command.strip().replace(" --quiet", "") for line in lines for command in line.split("&&") if command]


def bash_commands(path):
    """The commands in the bash blocks of a document."""
    return [command for block in BASH_BLOCK.findall(path.read_text()) for command in commands(block)]


PROGRAMS = [(path, program) for path in DOCUMENTS for program in python_programs(path)]


@pytest.mark.parametrize(
    "path, program", PROGRAMS, ids=[f"{path.name}:{program[0][0] + 1}" for path, program in PROGRAMS]
)
def test_python_blocks_run(path, program, tmp_path, monkeypatch):
    """Each block, with those that continue it, runs as a program in an empty folder."""
    source = whole(program)
    if path.name == "README.md":  # a tenth of its batches and steps; the slow test takes all of them
        source = source.replace("250", "25")
    if path.name in NEEDS_A_HUB:
        with HubServer(user="me") as server:
            environment = server.environment(tmp_path / "home", OMP_NUM_THREADS="1")
            done = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()[-3000:]
        # There a comment behind a print is what it prints.
        promised = [match[1] for line in source.splitlines() if (match := re.fullmatch(r"print\(.*\)  # (.*)", line))]
        assert promised and done.stdout.decode().splitlines() == promised
    else:
        monkeypatch.chdir(tmp_path)
        exec(compile(source, str(path), "exec"), {"__name__": "__main__"})


def whole(program):
    """The source of a program, its lines numbered as in the document, which a traceback then points into."""
    lines = [""] * (program[-1][0] + program[-1][1].count("\n"))
    for line, code in program:
        lines[line : line + code.count("\n")] = code.splitlines()
    return "\n".join(lines)


@pytest.mark.slow
def test_the_readme_prints_what_it_says(tmp_path, monkeypatch, capsys):
    """The first program's number is README's; rounding differs between machines, and a training then by hundredths."""
    path, program = PROGRAMS[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(whole(program), str(path), "exec"), {"__name__": "__main__"})
    said = re.search(r"prints `([\d.]+) \+- ", path.read_text())
    assert float(capsys.readouterr().out.split()[0]) == pytest.approx(float(said[1]), abs=0.03)


def test_every_python_block_is_run():
    """No block hides from the test above behind an unusual fence."""
    fences = sum(len(re.findall(r"```\s*(?:python|py)\b", path.read_text(), re.IGNORECASE)) for path in DOCUMENTS)
    assert fences == sum(len(program) for _, program in PROGRAMS) > 0


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_documents_name_the_commands_of_ci(name):
    """What .ci/run runs is what a contributor is told to run: install, checks, tests, in the same words."""
    script = commands((ROOT / ".ci" / "run").read_text())
    start = script.index(INSTALL)
    assert script[start:] == [INSTALL, "ruff check", "ruff format --check", "mypy", "mkdocs build --strict", "pytest"]
    assert set(script[start:]) <= set(bash_commands(ROOT / name))


def test_install_commands_name_extras_that_exist():
    """Every `pip install` of the documents is pinned, editable, and asks for an extra of setup.cfg."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = set(config["options.extras_require"])
    documents = (*DOCUMENTS, ROOT / "CONTRIBUTING.md")
    installs = [command for path in documents for command in bash_commands(path) if "pip install" in command]
    assert installs
    for command in installs:
        match = re.fullmatch(r'pip install -c constraints\.txt -e "\.\[(\w+)\]"', command)
        assert match and match[1] in extras, command


def documented(command):
    """The options of every `ddpm-vlb COMMAND` line of the documents and of the command's own description."""
    module = ROOT / "src" / "ddpm_vlb" / "commands" / f"{command.replace('-', '_')}.py"
    paths = [
        *DOCUMENTS,
        ROOT / "CONTRIBUTING.md",
        module,
        module.with_stem("train_options"),
        ROOT / "benchmarks/README.md",
    ]
    text = "\n".join(path.read_text() for path in paths).replace("\\\n", " ")
    lines = re.findall(rf"^ *ddpm-vlb {command}\b(.*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def test_the_first_training_command_is_the_default_one():
    """The README's figures come from the command without options."""
    assert documented("train")[0] == []


@pytest.mark.parametrize("command", [*cli.LAUNCHED, "publish", "compress", "decompress", "inspect"])
def test_commands_parse(command, tmp_path, monkeypatch):
    """Every command of a document has options that exist, with values that they take, for itself or for the launch."""
    module = importlib.import_module(f"ddpm_vlb.commands.{command.replace('-', '_')}")
    parser, launch = module.build_parser(), launch_command_parser()
    lines = documented(command)
    assert len(lines) >= 2
    monkeypatch.chdir(tmp_path)
    for line in lines:
        to_launch, options = cli.split(line, parser._option_string_actions, launch._option_string_actions)
        launch.parse_args([*to_launch, "script"])
        if "--config" in options:
            Path(options[options.index("--config") + 1]).write_text("{}")
        if options != ["--help"]:
            getattr(module, "parse_args", parser.parse_args)(options)


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_relative_links_lead_somewhere(path):
    """Files that a document points to are there."""
    assert [link for link in LINK.findall(path.read_text()) if not (path.parent / link).exists()] == []


def test_every_fault_has_its_test():
    """The tests that docs/reliability.md names are there."""
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "reliability.md").read_text()))
    written = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 15 and [name for name in named if f"def {name}(" not in written] == []


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_reads_the_shipped_configs(path):
    """Each by `accelerate launch --config_file`, as what its name says."""
    config = load_config_from_file(str(path))
    kind = {"fsdp.yaml": "FSDP", "deepspeed_zero2.yaml": "DEEPSPEED", "two_machines.yaml": "MULTI_GPU"}[path.name]
    assert str(config.distributed_type).endswith(kind)
    assert config.num_machines == (2 if path.name == "two_machines.yaml" else 1)
    assert kind != "FSDP" or config.fsdp_config["fsdp_version"] == 2
    assert kind != "DEEPSPEED" or config.deepspeed_config["zero_stage"] == 2
