"""A small process beside a host: it says who is gone when the host was ended before it could say so itself.

jax ends a process from within, in a thread that no Python sees, as soon as the host that all others meet at closes its
socket. This process outlives it. It imports nothing but the standard library, and reads its input until it ends: the word
`done` is a host's own end, anything else a death.
"""

import socket
import sys

TRY_S = 5.0


def main(address: str, name: str) -> None:
    """Waits for the host's end, then looks whether the meeting place answers.

    Args:
      address: of the meeting place, `host:port`.
      name: how host 0 is called.
    """
    if sys.stdin.read().strip() == "done":
        return
    where, _, port = address.rpartition(":")
    try:
        socket.create_connection((where.strip("[]"), int(port)), timeout=TRY_S).close()
    except OSError:
        sys.stderr.write(
            f"palmette: {name} is gone: start all hosts again, the run goes on from its newest checkpoint\n"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
