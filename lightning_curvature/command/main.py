"""Subcommands by name, and their arguments by the signatures of their functions."""

import inspect
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from lightning_curvature.command.cost import cost
from lightning_curvature.command.measure import measure
from lightning_curvature.command.report import report

# A sequence without a default is positional: one or more.
COMMANDS: dict[str, Callable[..., Any]] = {"report": report, "measure": measure, "cost": cost}
_NAME = "lightning-curvature"
# Packages of the extra "report".
_OF_EXTRA = ("jsonargparse", "docstring_parser", "matplotlib", "jinja2")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand; a user's mistake ends in one sentence and exit code 2."""
    try:
        run(COMMANDS, arguments)
    except ModuleNotFoundError as error:
        if error.name not in _OF_EXTRA:
            raise
        sys.exit(_said(f"{error.name} must be installed for this command: pip install '{_NAME}[report]'."))
    except ValueError as error:
        sys.exit(_said(error))


def _said(text: object) -> int:
    print(f"{_NAME}: {text}", file=sys.stderr)
    return 2


def run(commands: Mapping[str, Callable[..., Any]], arguments: Sequence[str] | None = None) -> Any:
    """Return what the subcommand of a command line returns; without arguments print the help."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=_NAME, description="Loss curvature along training steps.", version=version("lightning-curvature")
    )
    subcommands = parser.add_subcommands(dest="command")
    for name, function in commands.items():
        subcommands.add_subcommand(name, _parser_of(function), help=_summary(function))
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments:
        parser.print_help()
        return None
    parsed = parser.parse_args(arguments)
    # jsonargparse 4.49 has given the method another name.
    made = getattr(parser, "instantiate", None) or parser.instantiate_classes
    return commands[parsed.command](**made(parsed)[parsed.command].as_dict())


def _parser_of(function: Callable[..., Any]) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(description=_summary(function))
    several = _sequences(function)
    for name, item in several.items():
        shown = name.removesuffix("s").upper()
        parser.add_argument(name, nargs="+", type=item, metavar=shown, help=_help(function, name))
    parser.add_function_arguments(function, skip=set(several), as_positional=False, as_group=False)
    return parser


def _sequences(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the arguments without a default that are sequences, with the types of their items."""
    hints = typing.get_type_hints(function)
    wanted = [one.name for one in inspect.signature(function).parameters.values() if one.default is one.empty]
    found = {name: hints[name] for name in wanted if typing.get_origin(hints[name]) in (list, Sequence)}
    return {name: typing.get_args(hint)[0] for name, hint in found.items()}


def _summary(function: Callable[..., Any]) -> str:
    return inspect.cleandoc(function.__doc__ or "").split("\n\n")[0]


def _help(function: Callable[..., Any], name: str) -> str | None:
    import docstring_parser

    described = {one.arg_name: one.description for one in docstring_parser.parse(function.__doc__ or "").params}
    return described.get(name)
