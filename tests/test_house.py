"""The house: what stands where, which arrows there are, what README and --help promise."""

import ast
import dataclasses
import re
import sys

import pytest
from helpers import ENVIRONMENT, HERE, run_here, run_python, write_lines

import cofinetune
import data
import model as M
from extras import door
from extras import recipe as recipes

LEAVES = {"model": {"torch"}, "data": {"torch", "numpy", "av"}, "ava_eval": {"numpy"}}
OPTIONAL = set(
    "torchvision tensorboard onnx onnxscript onnxruntime "
    "transformers decord torchcodec cv2 safetensors".split()
)


def imports_of(path):
    """(module, "from" name or "", at the top of the file?) of every import, late ones included."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, "", id(node) in top
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.module, alias.name, id(node) in top


def project_arrows():
    """file -> project files that it imports."""
    files = {path.stem: path for path in HERE.glob("*.py")}
    files |= {f"extras.{path.stem}": path for path in (HERE / "extras").glob("*.py")}
    arrows = {}
    for name, path in files.items():
        targets = set()
        for module, part, _ in imports_of(path):
            targets |= {module, f"{module}.{part}"} & files.keys()
        arrows[name] = targets - {name, "extras.__init__"}
    return arrows


ALONE = """
import os, sys
import torch, numpy, av  # what leaves may need, once for all of them
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        os.chdir(name)
        __import__(name)
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""


def test_leaves_stand_alone(tmp_path):
    """Copied into an empty folder each imports, silently, with what its docstring says."""
    for name in LEAVES:
        path = HERE / f"{name}.py"
        assert not project_arrows()[name]
        top = {module.split(".")[0] for module, _, first in imports_of(path) if first}
        assert top - sys.stdlib_module_names <= LEAVES[name]
        write_lines(tmp_path / name / f"{name}.py", path.read_text())
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "PYTHONPATH"}
    done = run_python("-c", ALONE, *LEAVES, cwd=tmp_path, env=environment)
    assert done.returncode == 0 and done.stdout == done.stderr == "", done.stderr


def test_no_circles_and_nobody_imports_the_door():
    arrows = project_arrows()
    for name, targets in arrows.items():
        if not name.startswith("test_"):
            assert "cofinetune" not in targets, name

    def walk(name, path):
        assert name not in path, " -> ".join([*path, name])
        for target in arrows[name]:
            walk(target, [*path, name])

    for name in arrows:
        walk(name, [])


def test_only_declared_packages():
    """torch, numpy, av at the top of a file; what else there is is optional, imported late."""
    for path in [*HERE.glob("*.py"), *(HERE / "extras").glob("*.py")]:
        if path.name.startswith("test_"):
            continue
        for module, _, first in imports_of(path):
            package = module.split(".")[0]
            if package in sys.stdlib_module_names or (HERE / f"{package}.py").exists():
                continue
            allowed = {"torch", "numpy", "av", "extras"} | (set() if first else OPTIONAL)
            assert package in allowed, f"{path.name}: {module}"


def test_the_top_level_is_the_card():
    done = run_python("-c", "import subprocess; print(subprocess.getoutput('git ls-files'))")
    names = {line for line in done.stdout.split() if "/" not in line}
    if "cofinetune.py" not in names:
        pytest.skip("not a git checkout")
    card = """cofinetune.py model.py data.py ava_eval.py train_ddp.sh test_cofinetune.py README.md
              requirements.txt pyproject.toml LICENSE .gitignore""".split()
    assert names == set(card)


def test_every_setting_is_read_somewhere():
    """And says what it is."""
    sources = [
        path.read_text() for path in [*HERE.glob("[!t]*.py"), *(HERE / "extras").glob("*.py")]
    ]
    text = "\n".join(sources)
    for kind in (cofinetune.Recipe, M.ModelConfig, data.Task):
        for field in dataclasses.fields(kind):
            assert field.metadata.get("help") or kind is data.Task, field.name
            read = rf"\.{field.name}\b|getattr\(task, f\"(exclude_)?{{split}}(_boxes)?\"\)"
            assert len(re.findall(read, text)) >= 1, f"{kind.__name__}.{field.name}"


def test_recipes_open_with_what_they_need_to_say():
    """Command, hardware, time, expected numbers or "not run"; and each value is a known one."""
    for name in recipes.names():
        path = recipes.find(name)
        head = path.read_text().split("\n\n")[0]
        for word in ("python cofinetune.py", "Hardware:", "Time:", "Expected:"):
            assert word in head.replace("./train_ddp.sh", "python cofinetune.py"), (name, word)
        problems = recipes.override(cofinetune.Recipe, recipes.load(path), {})
        assert not problems


def test_help_fits_a_screen_and_shows_its_own_options():
    overview = run_here("cofinetune.py", "--help").stdout
    assert overview.count("\n") <= 24
    for command in cofinetune.COMMANDS:
        assert re.search(rf"^  {command} ", overview, re.M)
        shown = run_here("cofinetune.py", command, "--help")
        assert shown.returncode == 0 and f"cofinetune.py {command}" in shown.stdout
    assert "--lr" not in run_here("cofinetune.py", "check", "--help").stdout
    everything = run_here("cofinetune.py", "train", "--help").stdout
    for kind in (cofinetune.Recipe, M.ModelConfig, data.Task):
        for field in dataclasses.fields(kind):
            if field.name not in ("model", "task"):
                assert field.name in everything.replace("-", "_"), field.name


def test_readme_commands_exist():
    """Every command of README names a file of the project and options of its parser."""
    pages = [HERE / "README.md", *(HERE / "docs").glob("*.md")]
    program = r"^(?:\$ |    )((?:python|\./train_ddp\.sh) [^\n]*?)(?:\s+#.*)?$"
    programs = {}
    for page in pages:
        for command in re.findall(program, page.read_text(), re.M):
            words = command.replace("./train_ddp.sh", "python cofinetune.py --recipe").split()[1:]
            file, words = words[0], words[1:]
            if file == "-m":
                continue
            command = "train"
            if file == "cofinetune.py" and words and not words[0].startswith("-"):
                command = words[0]
            key = (file, command) if file == "cofinetune.py" else (file,)
            options = [word.split("=")[0] for word in words if word.startswith("--")]
            programs.setdefault(key, set()).update(options)
    assert len(programs) >= 6
    everything = run_here("cofinetune.py", "train", "--help").stdout
    for program, options in programs.items():
        done = run_here(*program, "--help")
        assert done.returncode == 0, program
        known = done.stdout
        if program[-1] in door.WITH_RECIPE:
            known += everything
        for option in options:
            assert option.startswith(("--task.", "--model.")) or option in known, (program, option)


def test_readme_reading_order_exists():
    """The pieces that README names as `file: function`, in contiguous lines, are under 900."""
    text = (HERE / "README.md").read_text()
    section = text[text.index("## Read the code") :]
    lines = 0
    pieces = re.findall(r"`([a-z_/]+\.py): ([\w., ]+)`", section)
    assert len(pieces) >= 8
    for file, names in pieces:
        tree = ast.parse((HERE / file).read_text())
        known = {}
        for node in ast.walk(tree):
            for child in (
                getattr(node, "body", []) if isinstance(node, ast.Module | ast.ClassDef) else []
            ):
                if isinstance(child, ast.FunctionDef | ast.ClassDef):
                    prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
                    known[prefix + child.name] = child
        for name in names.split(", "):
            assert name in known, f"{file}: {name}"
            lines += known[name].end_lineno - known[name].lineno + 1
    assert lines < 900


def test_readme_names_the_tests_that_hold_the_method():
    """Each of its eight sentences names one at least, and all exist."""
    text = (HERE / "README.md").read_text()
    section = text[text.index("The method in eight sentences") : text.index("## Own videos")]
    sentences = re.split(r"^\d\. ", section, flags=re.M)[1:]
    assert len(sentences) == 8
    known = set()
    for path in [HERE / "test_cofinetune.py", *(HERE / "tests").glob("test_*.py")]:
        known |= set(re.findall(r"^def (test_\w+)", path.read_text(), re.M))
    for sentence in sentences:
        named = re.findall(r"`(test_\w+)`", sentence)
        assert named, sentence
        assert set(named) <= known, set(named) - known


def test_relative_links_lead_to_files():
    for page in [HERE / "README.md", *(HERE / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), (page.name, target)
