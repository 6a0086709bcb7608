"""Plain lines to the standard output, as the progress bar prints them."""


def say(line: str) -> None:
    """Prints a line as it is, however wide the screen."""
    from rich.console import Console

    Console().print(line, highlight=False, markup=False, soft_wrap=True)
