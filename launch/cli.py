"""The `palmette` command's beginning and end: are the packages ours, and with which status does it exit."""

import errno
import sys
from typing import NoReturn

from launch import ours

# What the user can mend about a disk: full, over quota, read-only, not theirs.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command and exit: 0 when done, 2 with one line on stderr for what the user can mend, 130 on Ctrl-C.

    Whatever else is raised is a mistake of ours and keeps its traceback.
    """
    foreign = ours.foreign()
    if foreign is not None:
        _fail(foreign)
    # Only now: these import the packages that were just looked at.
    import typer

    from launch.verbs import app
    from partitioning.errors import UserError

    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = app(arguments or ["--help"], prog_name="palmette", standalone_mode=False)
    except UserError as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except OSError as error:
        if error.errno not in DISK:
            raise
        _fail(f"{error.filename or 'writing'}: {error.strerror}")
    except Exception as error:
        # The parser's own errors (an unknown option, a missing argument) know how to say themselves in a line.
        if not hasattr(error, "format_message"):
            raise
        _fail(error.format_message())
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> NoReturn:
    sys.stderr.write(f"palmette: {' '.join(message.split())}\n")
    sys.exit(2)


if __name__ == "__main__":
    main()
