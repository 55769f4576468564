"""The one door's mechanics: from the words of a command line to a command and its options.

A command is a module of extras with `add_options(parser)` and `run(options, overrides,
cofinetune)`, or one that serves several with a table COMMANDS of such pairs; train stands in
cofinetune.py, the module that they are given, since none of them may import it.
overrides: settings of the recipe that were typed, as text.
"""

import argparse
import dataclasses
import difflib
import importlib

import data
from extras import recipe as recipes
from extras import settings
from model import SIZES, ModelConfig

WITH_RECIPE = {"train", "evaluate", "predict", "compare", "bench"}  # they take its keys as options


def parse(words: list[str], commands: dict, cofinetune) -> tuple:
    """-> the function that runs the command, its options, the recipe's settings. ValueError."""
    command = "train"
    if words and not words[0].startswith("-"):
        command, words = words[0], words[1:]
    if command not in commands:
        near = mean_recipe(command) or settings.did_you_mean(command, list(commands))
        raise ValueError(f"no command {command!r}{near}; there are {', '.join(commands)}")
    overrides = {}
    if command in WITH_RECIPE:
        words, overrides = split_overrides(words, cofinetune.Recipe)
    parser, run = make_parser(command, commands, cofinetune)
    options, unknown = parser.parse_known_args(words)
    if unknown:
        known = list(vars(options))
        if command in WITH_RECIPE:
            known += [field.name for field in dataclasses.fields(cofinetune.Recipe)]
        known = [f"--{name.replace('_', '-')}" for name in known]
        near = difflib.get_close_matches(unknown[0], known, 1)
        hint = f", did you mean {near[0]}?" if near else ""
        if "--recipe" in known:
            hint = mean_recipe(unknown[0]) or hint
        if unknown[0].startswith("--epoch"):
            hint = ": a run's length is --steps, updates over all tasks together"
        what = "unknown option" if unknown[0].startswith("-") else "one word too many:"
        raise ValueError(f"{command}: {what} {unknown[0]}{hint}")
    return run, options, overrides


def mean_recipe(word: str) -> str:
    return f", did you mean --recipe {word}?" if word.endswith(".toml") else ""


def split_overrides(words: list[str], kind: type) -> tuple[list[str], dict[str, str]]:
    """Command line words without the recipe's own keys (--key value, --key=value), and those."""
    known = {field.name for field in dataclasses.fields(kind)}
    rest, overrides = [], {}
    words = iter(words)
    for word in words:
        option, equals, text = word.partition("=")
        key = option.removeprefix("--")
        if "." not in key:
            key = key.replace("-", "_")
        if not word.startswith("--") or not (key in known or key.startswith(("task.", "model."))):
            rest.append(word)
            continue
        overrides[key] = text if equals else next(words, None)
        if overrides[key] is None:
            raise ValueError(f"{option}: a value is expected after it")
    return rest, overrides


def make_parser(command: str, commands: dict, cofinetune) -> tuple[argparse.ArgumentParser, object]:
    """The parser of a command, and the function that runs it."""
    module, line = commands[command]
    parser = argparse.ArgumentParser(
        prog=f"cofinetune.py {command}",
        description=line,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if not module:
        add_options = getattr(cofinetune, f"add_{command}_options")
        run = getattr(cofinetune, f"run_{command}")
    else:
        module = importlib.import_module(f"extras.{module}")
        if hasattr(module, "COMMANDS"):
            add_options, run = module.COMMANDS[command]
        else:
            add_options, run = module.add_options, module.run
    add_options(parser)
    if command == "train":
        parser.epilog = explain_settings(cofinetune.Recipe)
    elif command in WITH_RECIPE and not parser.epilog:
        parser.epilog = "Settings of the recipe are options too: python cofinetune.py train --help"
    return parser, run


def explain_settings(kind: type) -> str:
    return "\n".join(
        [
            "Every setting of the recipe is an option.",
            settings.describe(kind, "--", leave_out=("model", "task")),
            "\n[model], as --model.KEY:\n  arch" + " " * 20 + ", ".join(SIZES),
            settings.describe(ModelConfig, ""),
            "\n[[task]], as --task.NAME.KEY:",
            settings.describe(data.Task, ""),
        ]
    )


def overview(commands: dict) -> str:
    lines = [f"  {name:<10} {line}" for name, (_, line) in commands.items()]
    return "\n".join(
        [
            "usage: python cofinetune.py [COMMAND] [options]; COMMAND --help explains them\n",
            *lines,
            f"\nrecipes (--recipe NAME or FILE.toml): {', '.join(recipes.names())}",
        ]
    )
