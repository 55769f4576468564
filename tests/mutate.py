"""Which changes of one operator do the tests not see? Run by hand, never collected.

    python tests/mutate.py cofinetune.py test_cofinetune.py --count 30 --seed 0

Changes one comparison, sum, product, number or `not` of a file at random, in a copy of the project,
runs the tests, and prints the changes that survive. The goal: none of them changes a number.
"""

import argparse
import ast
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Lt: ast.LtE, ast.LtE: ast.Lt,
    ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.And: ast.Or, ast.Or: ast.And, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip


def places(tree: ast.AST) -> list[tuple[ast.AST, str]]:
    """(node, attribute) of everything that can be changed."""
    result = []
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPS:
            result.append((node, "op"))
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
            result.append((node, "ops"))
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            result.append((node, "value"))
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
            result.append((node, "operand"))
    return result


def change(source: str, rng: random.Random) -> tuple[str, str]:
    """-> the changed source, and what was changed."""
    tree = ast.parse(source)
    node, attribute = rng.choice(places(tree))
    before = ast.unparse(node)
    if attribute == "op":
        node.op = SWAPS[type(node.op)]()
    elif attribute == "ops":
        node.ops[0] = SWAPS[type(node.ops[0])]()
    elif attribute == "value":
        node.value += 1
    else:
        node.op = ast.UAdd() if isinstance(node.op, ast.USub) else ast.Not()
        node.operand = (
            node.operand if isinstance(node.op, ast.UAdd) else ast.UnaryOp(ast.Not(), node.operand)
        )
    return ast.unparse(tree), f"line {node.lineno}: {before}  ->  {ast.unparse(node)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", help="of the project, to change")
    parser.add_argument("tests", nargs="+", help="files or options of pytest")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options, more = parser.parse_known_args()
    home = Path(__file__).resolve().parent.parent
    rng, survived = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(home, copy, ignore=shutil.ignore_patterns(".git", "data", "runs"))
        source = (copy / options.file).read_text()
        for number in range(options.count):
            changed, what = change(source, rng)
            (copy / options.file).write_text(changed)
            command = [sys.executable, "-m", "pytest", "-q", "-x", *options.tests, *more]
            done = subprocess.run(command, cwd=copy, capture_output=True)
            if done.returncode == 0:
                survived += 1
                print(f"survived: {options.file} {what}", flush=True)
            elif sys.stderr.isatty():
                print(f"{number + 1}/{options.count}", end="\r", file=sys.stderr)
    print(f"{survived} of {options.count} changes of {options.file} survive")


if __name__ == "__main__":
    main()
