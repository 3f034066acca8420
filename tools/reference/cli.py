from __future__ import annotations

import argparse
from collections.abc import Iterator

from foldserve.server import cli, commands
from tools.reference.markdown import code, prose, table

_PAGE = """\
# Command line

What `foldserve COMMAND --help` says. `make serve ARGS="..."` passes options on.

{index}
{commands}"""


def page() -> str:
    index = table(["Command", "What it does"], [(f"[`{name}`](#foldserve-{name})", prose(does)) for name, does in _ALL])
    sections = [section for name, _ in _ALL for section in _sections(_command(name))]
    return _PAGE.format(index=index, commands="\n".join(sections))


_ALL = list(commands.ALL.items())


def _command(name: str) -> argparse.ArgumentParser:
    return _subcommands(cli.build_parser(name))[name]


def _subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    kinds = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(kinds[0].choices) if kinds else {}


def _sections(parser: argparse.ArgumentParser, level: int = 2) -> Iterator[str]:
    """A command and its subcommands."""
    text = f"{'#' * level} {parser.prog}\n\n```text\n{_usage(parser)}\n\n{(parser.description or '').strip()}".rstrip()
    yield f"{text}\n```\n" + "".join(f"\n{part}" for part in _groups(parser))
    for command in _subcommands(parser).values():
        yield from _sections(command, level + 1)


def _usage(parser: argparse.ArgumentParser) -> str:
    if parser.usage:
        return parser.usage
    positional = [action for action in parser._actions if not action.option_strings]
    names = [_name(parser, action) for action in positional]
    shown = [f"[{name}]" if action.nargs == "?" else name for action, name in zip(positional, names, strict=True)]
    return " ".join([parser.prog, *shown, "[options]"])


def _groups(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Tables of options, grouped as in the help; arguments share a table with options without a group."""
    rows: dict[str, list[tuple[str, str]]] = {}
    for group in parser._action_groups:
        title = "" if group.title in ("positional arguments", "options") else f"**{group.title}**"
        shown = f"{title}: {group.description}" if group.description else title
        actions = [action for action in group._group_actions if not _is_elsewhere(action)]
        rows.setdefault(shown, []).extend((code(_name(parser, each)), prose(_help(parser, each))) for each in actions)
    for title, options in rows.items():
        if options:
            yield (f"{title}\n\n" if title else "") + table(["Option", "What it says"], options)


def _is_elsewhere(action: argparse.Action) -> bool:
    """Whether an action has no row: `--help`, and subcommands, which have their own sections."""
    return isinstance(action, argparse._HelpAction | argparse._SubParsersAction) or "--help" in action.option_strings


def _name(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return parser._get_formatter()._format_action_invocation(action)


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return parser._get_formatter()._expand_help(action) if action.help else ""
