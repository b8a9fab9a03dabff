"""README and documentation: links lead somewhere, commands parse and run, Python blocks compile and import what
exists.

Commands that need no network, no simulator and no checkpoint of the reader's are run (`make commands`).
"""

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

import vla_adapter_hf
from vla_adapter_cli import COMMANDS, load_command
from vla_adapter_hf.cli.train import parse_arguments


ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    {
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/**/*.md"),
        *ROOT.glob("lerobot_policy_vla_adapter/*.md"),
        *ROOT.glob("examples/*.ipynb"),
    }
    - {ROOT / "MODEL_CARD.md"}  # a template
    - set(ROOT.glob("docs/_build/**/*"))
    - set(ROOT.glob("examples/libero_object/results/**/*"))
)
# What a command needs that a test does not have, by what its line holds.
NEEDS = {
    "the Hub": r"\bVLA-Adapter/|libero-object-pro|\bme/|Stanford-ILIAD/|facebook/|Qwen/",
    "the simulator": r"vla-adapter (eval|calvin-check|demonstrate|scores)\b|--policy |"
    r"make (demo-loop|simulator|policy)",
    "a checkpoint or files of the reader's": r"\bCHECKPOINT\b|\bSTART\b|path/to/|results/|outputs/trained|"
    r"calvin_abc_rlds",
    "minutes and gigabytes": r"--size full|benchmarks/|bench --serve",
    "an installation": r"^(pip|apt-get|git clone|make|export|pre-commit)\b|for .* in |^done",
    "another test": r"^([A-Z]+=\S+ )?python (-m pytest|tests/|examples/finetune\.py)",
    "a service that keeps running": r"vla-adapter serve\b",
    "LeRobot": r"^lerobot-",
}

# Packages that pages show and the tests do not have.
NOT_INSTALLED = {"lerobot"}


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def text_of(page: Path) -> str:
    """A page's Markdown; of a notebook its Markdown cells."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".md":
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
    return "\n\n".join("".join(cell["source"]) for cell in cells)


def blocks(language: str) -> list[Block]:
    return [block for block in all_blocks() if block.language == language]


def all_blocks() -> Iterator[Block]:
    for page in PAGES:
        text = text_of(page)
        for match in re.finditer(r"^```(\S*)[^\n]*\n(.*?)^```\s*$", text, flags=re.DOTALL | re.MULTILINE):
            line = text[: match.start()].count("\n") + 1
            yield Block(str(page.relative_to(ROOT)), line, match[1], match[2])


def command_lines(block: Block) -> list[str]:
    """A shell block's commands, each on one line, without comments and without the variables of a leading `env`."""
    lines = block.text.replace("\\\n", " ").splitlines()
    lines = [re.sub(r"\s#.*", "", f" {line}").strip() for line in lines]
    return [re.sub(r"^env (\w+=\S+\s+)+", "", line) for line in lines if line]


def commands(pattern: str) -> list:
    found = []
    for block in blocks("bash"):
        for line in command_lines(block):
            if re.search(pattern, line):
                found.append(pytest.param(line, id=f"{block}-{line[:60]}"))
    return found


def words_of(line: str) -> list[str]:
    return shlex.split(re.sub(r"\$\w+", "both", line.split(" --against ")[0]))


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """A working folder that looks like a clone and may be written to, with the files that the pages show."""
    for name in ("src", "tests", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    for block in blocks("yaml"):
        name = re.match(r"# (\S+\.yaml)\n", block.text)
        if name:
            (tmp_path / name[1]).write_text(block.text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLA_ADAPTER_CACHE", str(tmp_path / "cache"))
    return tmp_path


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"`", "", heading).strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    named = re.findall(r"^\(([\w-]+)\)=$", text, flags=re.MULTILINE)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)} | set(named)


def test_links_lead_to_files_and_headings_that_exist():
    lost = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"https?:|mailto:", target):
                continue
            file, _, anchor = target.partition("#")
            # Notebooks become pages of docs/tutorials.
            path = (
                page.parent / re.sub(r"^(\.\./)?tutorials/", "../examples/" if "docs" in page.parts else "", file)
            ).resolve()
            path = page if not file else path
            if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
                lost.append(f"{page.relative_to(ROOT)}: {target}")
    assert not lost


def test_every_code_block_names_its_language():
    assert not [str(block) for block in all_blocks() if not block.language]


@pytest.mark.parametrize("line", commands(r"\bvla-adapter \w|-m vla_adapter_hf\.cli "))
def test_a_command_line_parses(line, clone):
    words = words_of(line)
    start = words.index("vla-adapter") if "vla-adapter" in words else words.index("vla_adapter_hf.cli")
    name, *arguments = words[start + 1 :]
    if name == "train":
        parse_arguments(arguments)
        return
    context = load_command(name).make_context(name, arguments)
    assert context.params


@pytest.mark.parametrize("line", commands(r"^python benchmarks/"))
def test_options_of_a_benchmark_exist(line):
    _, script, *arguments = shlex.split(line.replace("[", "").replace("]", ""))
    source = (ROOT / script).read_text(encoding="utf-8")
    for option in [word for word in arguments if word.startswith("--")]:
        assert f'"{option}"' in source, f"{script} has no {option}"


@pytest.mark.parametrize("line", commands(r"^make \w"))
def test_a_target_of_make_exists(line):
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)[
        1
    ].split()
    for word in re.findall(r"make ([\w-]+)", line):
        assert word in targets


def reason(line: str) -> str | None:
    return next((need for need, pattern in NEEDS.items() if re.search(pattern, line)), None)


def lines_to_run() -> list[tuple[str, str]]:
    """Pages and commands, of those that need nothing else."""
    return [(block.page, line) for block in blocks("bash") for line in command_lines(block) if reason(line) is None]


def test_commands_are_run_or_there_is_a_reason():
    """A line of a new kind has to be run, or to be given a reason."""
    lines = [line for _, line in lines_to_run()]
    unknown = [line for line in lines if not re.match(r"vla-adapter |torchrun |accelerate ", line)]
    assert not unknown, "neither run nor excused"
    assert len(lines) >= 7


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", sorted({page for page, _ in lines_to_run()}))
def test_commands_of_a_page_run(page, clone):
    """In their order, since later ones read what earlier ones wrote."""
    lines = [line for where, line in lines_to_run() if where == page]
    binaries = str(Path(sys.executable).parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    environment["PATH"] = f"{binaries}{os.pathsep}{environment['PATH']}"
    for line in lines:
        line = re.sub(r"^vla-adapter ", f"{shlex.quote(sys.executable)} -m vla_adapter_hf.cli ", line)
        line = re.sub(r"^torchrun ", f"{shlex.quote(sys.executable)} -m torch.distributed.run ", line)
        line = re.sub(r"^accelerate ", f"{shlex.quote(sys.executable)} -m accelerate.commands.accelerate_cli ", line)
        finished = subprocess.run(line, shell=True, cwd=clone, env=environment, capture_output=True, text=True)
        assert finished.returncode == 0, f"{line}\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}"


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_a_python_block_compiles_and_its_names_exist(block):
    tree = ast.parse(block.text)
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            if node.module.split(".")[0] in NOT_INSTALLED:
                continue
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name), f"{node.module} has no {name.name}"
        elif isinstance(node, ast.Import):
            for name in node.names:
                aliases[name.asname or name.name] = importlib.import_module(name.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            assert hasattr(aliases[node.value.id], node.attr), f"{node.value.id} has no {node.attr}"


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_a_python_block_imports_the_package_before_torch(block):
    """In the other order OpenMP's threads spin, see docs/speed.md."""
    assert_package_comes_first(block.text)


def test_the_example_of_finetuning_imports_the_package_before_torch():
    assert_package_comes_first((ROOT / "examples/finetune.py").read_text(encoding="utf-8"))


def assert_package_comes_first(program: str) -> None:
    """Of the packages that are imported: transformers imports torch."""
    imported = re.findall(r"^(?:import|from) (torch|transformers|vla_adapter_hf)\b", program, flags=re.MULTILINE)
    assert "vla_adapter_hf" not in imported or imported[0] == "vla_adapter_hf"


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_a_yaml_block_is_a_mapping(block):
    assert isinstance(yaml.safe_load(block.text), dict)


def test_the_reference_has_every_command_and_every_public_name():
    reference = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/reference").glob("*.md"))
    for command in COMMANDS:
        assert f"{{option-table}} {command}\n" in reference or command == "train", f"vla-adapter {command} is missing"
    for name in set(vla_adapter_hf.__all__) - {"__version__"}:
        assert re.search(rf"\b{name}\b", reference), f"{name} is missing"


def test_the_architecture_page_shows_every_room():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    package = ROOT / "src/vla_adapter_hf"
    rooms = {path.name for path in package.iterdir() if (path / "__init__.py").is_file()}
    assert rooms == set(re.findall(r"^  (\w+)/ ", page, flags=re.MULTILINE))


def test_the_readme_is_one_screen():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 75
