"""The one exception that the command turns into a single line and exit status 2."""


class UserError(Exception):
    """Something the user can mend: the message is one line that names the file, key or record and what would be right."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))
