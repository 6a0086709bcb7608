"""Plain lines to the standard output, as the progress bar prints them."""

from typing import Any


def console() -> Any:
    """The standard output; of several hosts, the first one speaks."""
    import jax
    from rich.console import Console

    return Console(quiet=jax.process_index() > 0)


def say(line: str) -> None:
    """Prints a line as it is, however wide the screen."""
    console().print(line, highlight=False, markup=False, soft_wrap=True)
