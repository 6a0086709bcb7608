"""The other end of `harness.Contestant`: sets a program up, then runs it as often as each line of standard input says."""

import importlib
import json
import os
import sys
import time


def main() -> None:
    """Speaks JSON lines with the one who measures, and keeps everything else that is printed out of them."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, function, arguments = sys.argv[1:]
    turn, facts = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            begin = time.perf_counter()
            counted = turn()
            seconds.append(time.perf_counter() - begin if counted is None else counted)
        print(json.dumps(seconds), file=answers, flush=True)


if __name__ == "__main__":
    main()
