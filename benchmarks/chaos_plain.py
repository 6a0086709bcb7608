"""The campaign of `chaos`, in which no checkpoint is copied and none is waited for.

python -m benchmarks chaos_plain
"""

from benchmarks import chaos


def main() -> None:
    """Runs it and writes its section."""
    chaos.main(copied=False)
