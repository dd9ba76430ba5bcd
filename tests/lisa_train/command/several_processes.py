"""What `torchrun` starts in `test_several_processes.py`: `lisa-train` several times in a row.

One launch for all of them, since what takes time is to import everything in every process.
"""

import json
import sys

from lisa_train.command.cli import main

if __name__ == "__main__":
    for arguments in json.loads(sys.argv[1]):
        code = main(arguments)
        if code:
            sys.exit(code)
