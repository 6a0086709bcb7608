"""The page of the `palmette` command: every verb with its help, arguments and options."""

from typing import Any

from docs.generator.markdown import cell


def command_page() -> str:
    """The page, from the parser itself."""
    import typer

    from launch.verbs import app

    lines = ["# The command", "", "`palmette VERB --help` says the same."]
    lines += _verbs(typer.main.get_command(app), "palmette")
    return "\n".join(lines) + "\n"


def _verbs(group: Any, name: str) -> list[str]:
    lines: list[str] = []
    for verb, command in group.commands.items():
        whole = f"{name} {verb}"
        if hasattr(command, "commands"):
            lines += _verbs(command, whole)
            continue
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
        usage = " ".join([whole, *(p.metavar or p.name.upper() for p in arguments)])
        lines += ["", f"## {whole}", "", f"    {usage}", "", cell(" ".join((command.help or "").split()))]
        if options:
            lines += ["", "| option | what | default |", "|---|---|---|"]
            lines += [f"| `{', '.join(p.opts)}` | {cell(p.help or '')} | {_default(p)} |" for p in options]
    return lines


def _default(option: Any) -> str:
    if isinstance(option.show_default, str):
        return cell(option.show_default)
    # A flag is off and the rest has nothing, unless it says what.
    return "" if option.default in (None, False, ()) or callable(option.default) else f"`{option.default}`"
