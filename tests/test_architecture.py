"""The rules of docs/architecture.md, read off the source: sizes, parameters, the direction of imports, plain words."""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import vla_adapter_cli


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "vla_adapter_hf"
# Folders by the name that they have once installed; see setup.cfg.
FOLDERS = {
    ROOT / "src" / PACKAGE: PACKAGE,
    ROOT / "modeling": f"{PACKAGE}.modeling",
    ROOT / "processing": f"{PACKAGE}.processing",
}
MAX_ROOT_MODULES = 6
MAX_MODULE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 10
# What travels with every checkpoint runs on machines that have nothing else. simplejpeg is optional there.
TRAVELLING = ("modeling", "processing")
TRAVELLING_MAY_IMPORT = {"torch", "transformers", "huggingface_hub", "numpy", "PIL", "simplejpeg"}
# A room imports rooms of the lines above it only, inside functions too.
LAYERS = (
    {"_passive_waiting", "_version", "modeling", "processing", "utils"},
    {"robots"},
    {"checkpoints"},
    {"init", "data", "robot"},
    {"training", "simulation", "export"},
    {"recording"},
    {"bench", "demo", "serving"},
    {"doctor"},
    {"cli"},
)
NOT_PLAIN = re.compile(r"\b(lest|anew|whence|told|beside|mends?)\b", re.IGNORECASE)

# What breaks a rule today. Each list only shrinks: an entry that no longer breaks its rule must be removed.
KNOWN: dict[str, set[str]] = {}


@cache
def modules() -> dict[str, Path]:
    """All modules by their dotted name."""
    found = {}
    for folder, name in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((name, *(part for part in parts if part != "__init__")))] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def room(module: str) -> str:
    """The part of the package that a module belongs to, such as `data`; empty for the package itself."""
    return module.split(".")[1] if "." in module else ""


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function with its name, such as `vla_adapter_hf.data.chunks:Chunks.load`."""

    def visit(node: ast.AST, name: str) -> Iterator[tuple[str, ast.FunctionDef]]:
        for child in ast.iter_child_nodes(node):
            inner = f"{name}{'.' if name[-1] != ':' else ''}{child.name}" if hasattr(child, "name") else name
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield inner, child
            is_scope = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            yield from visit(child, inner if is_scope else name)

    for module, path in modules().items():
        yield from visit(tree(path), f"{module}:")


def is_command(name: str) -> bool:
    """Whether a function is a command of the command line."""
    return name in {f"{PACKAGE}.cli.{entry.module}:{entry.function}" for entry in vla_adapter_cli.COMMANDS.values()}


def imports(module: str, everywhere: bool) -> Iterator[str]:
    """Dotted names that a module imports: `everywhere`, or only when it is imported itself."""

    def visit(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.Import, ast.ImportFrom)):
                yield child
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not everywhere:
                continue
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            else:
                yield from visit(child)

    path = modules()[module]
    for node in visit(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
            continue
        origin = node.module or ""
        if node.level:
            parts = module.split(".")
            package = parts if path.name == "__init__.py" else parts[:-1]
            origin = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
        for alias in node.names:
            inner = f"{origin}.{alias.name}"
            yield inner if inner in modules() else origin


def check(rule: str, found: dict[str, str], advice: str) -> None:
    """Fail if anything but the known offenders breaks a rule, or if a known one no longer does."""
    known = KNOWN.get(rule, set())
    lines = [f"{name}: {what}" for name, what in found.items() if name not in known]
    assert not lines, f"{advice}\n  " + "\n  ".join(lines)
    fixed = sorted(known - set(found))
    assert not fixed, f"no longer breaks the rule, remove it from KNOWN[{rule!r}]: {', '.join(fixed)}"


def test_a_stranger_finds_few_modules_at_the_packages_root():
    names = sorted(path.name for path in (ROOT / "src" / PACKAGE).glob("*.py"))
    assert len(names) <= MAX_ROOT_MODULES, f"move modules into a room, {len(names)} are at the root: {names}"


def test_modules_are_short():
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in modules().items()}
    found = {module: f"{length} lines" for module, length in lengths.items() if length > MAX_MODULE_LINES}
    check("module", found, f"divide the module, {MAX_MODULE_LINES} lines are enough")


def test_functions_are_short():
    found = {}
    for name, function in functions():
        # The parameters of a command are its options, each with its help; what counts is what it does.
        begin = function.body[0].lineno if is_command(name) else function.lineno
        length = function.end_lineno - begin + 1
        if ast.get_docstring(function) is not None:
            length -= function.body[0].end_lineno - function.body[0].lineno + 1
        if length > MAX_FUNCTION_LINES:
            found[name] = f"{length} lines without its docstring"
    check("function", found, f"divide the function, {MAX_FUNCTION_LINES} lines are enough")


def test_functions_take_few_parameters():
    """`forward` takes what transformers and the collator give; a command's parameters are its options."""
    found = {}
    for name, function in functions():
        arguments = function.args
        taken = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        count = len([argument for argument in taken if argument not in ("self", "cls")])
        if count > MAX_PARAMETERS and function.name != "forward" and not is_command(name):
            found[name] = f"{count} parameters"
    check("parameters", found, "gather the parameters in a settings dataclass, which alone holds the defaults")


def test_imports_have_no_circles():
    graph = {module: {name for name in imports(module, everywhere=False) if name in modules()} for module in modules()}

    def reachable(module: str) -> set[str]:
        seen, waiting = set(), list(graph[module])
        while waiting:
            current = waiting.pop()
            if current not in seen:
                seen.add(current)
                waiting += graph[current]
        return seen

    after = {module: reachable(module) for module in graph}
    found = {
        module: "imports itself through " + ", ".join(sorted(name for name in after[module] if module in after[name]))
        for module in graph
        if module in after[module]
    }
    check("circle", found, "break the circle: move what both need into a module of its own")


def test_imports_run_one_way():
    levels = {name: level for level, names in enumerate(LAYERS) for name in names}
    found = {}
    for module in modules():
        if not room(module):  # the package itself: its public names
            continue
        level = levels.get(room(module), -1)
        names = {room(name) for name in imports(module, everywhere=True) if name.split(".")[0] == PACKAGE}
        wrong = sorted(name for name in names - {room(module)} if levels.get(name, level) >= level)
        if wrong:
            found[module] = f"imports {', '.join(wrong)}"
    check("direction", found, "imports run the wrong way; a new room needs a line of LAYERS")


def test_what_travels_with_a_checkpoint_imports_nothing_else():
    found = {}
    for module in modules():
        if room(module) not in TRAVELLING:
            continue
        outside = {name.split(".")[0] for name in imports(module, everywhere=True) if name.split(".")[0] != PACKAGE}
        rooms = {room(name) for name in imports(module, everywhere=True) if name.split(".")[0] == PACKAGE}
        wrong = sorted((outside - TRAVELLING_MAY_IMPORT - sys.stdlib_module_names) | (rooms - {room(module)}))
        if wrong:
            found[module] = f"imports {', '.join(wrong)}"
    check(
        "travels",
        found,
        "copied into checkpoints, a module finds only its own folder, torch, transformers and what they bring, Pillow",
    )


def prose() -> list[Path]:
    folders = ("benchmarks", "examples", "lerobot_policy_vla_adapter", "tests")
    python = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    text = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    return [path for path in sorted([*modules().values(), *python, *text]) if path != Path(__file__).resolve()]


def test_words_are_plain():
    found = {}
    for path in prose():
        words = {word.lower() for word in NOT_PLAIN.findall(path.read_text(encoding="utf-8"))}
        if words:
            found[path.relative_to(ROOT).as_posix()] = ", ".join(sorted(words))
    check("words", found, "write it in plain English")
