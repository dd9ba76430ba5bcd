"""The one way in which tests start several processes: at home on this machine, loud when they fail.

Every process speaks over the loopback device by its address, whatever this machine is called and
whether anybody can resolve that; nobody chooses a port that somebody else might take meanwhile.
"""

import os
import subprocess
import sys
import uuid
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).parent
TIMEOUT = 240  # seconds; a hang, which no test should wait for longer
_SAID = 6000  # characters of a child's output that a failure shows


def environment():
    """Return the variables of a child: one thread, offline, and gloo on the loopback device."""
    known = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MASTER_ADDR": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join(map(str, (HERE.parent, HERE))),
    }  # fmt: skip
    if sys.platform == "linux":
        known["GLOO_SOCKET_IFNAME"] = "lo"
    return known


def torchrun(words, *, processes=2, fails=False):
    """Run `torchrun … words` as a user would; return what it did and said.

    `fails`: whether the test expects it to; otherwise a failure shows what the processes said.
    """
    # Without an address of its own it takes this machine's name, which not every machine resolves.
    launcher = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *launcher, *map(str, words)],
        env=environment(), cwd=HERE.parent, capture_output=True, text=True, check=False,
        timeout=TIMEOUT,
    )  # fmt: skip
    _expect(done.returncode != 0, fails, [done.stdout, done.stderr])
    return done


def scripts(script, folder, world=2):
    """Run a script of this folder as `script FOLDER RANK WORLD` in processes side by side."""
    started = [
        subprocess.Popen(
            [sys.executable, str(HERE / script), str(folder), str(rank), str(world)],
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=TIMEOUT)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
            process.stdout.close()
    _expect(any(process.returncode for process in started), False, outputs)


def ranks(function, folder, *arguments, world=2):
    """Call `function(rank, folder, *arguments)` in as many processes, which form a group.

    What they print goes where this process prints; the first error is raised here.
    """
    store = Path(folder) / f"store-{uuid.uuid4().hex}"
    given = (function, str(folder), str(store), world, arguments)
    before = dict(os.environ)
    os.environ.update(environment())
    try:
        torch.multiprocessing.spawn(_rank, given, nprocs=world)
    finally:
        os.environ.clear()
        os.environ.update(before)


def _rank(rank, function, folder, store, world, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    function(rank, folder, *arguments)
    dist.destroy_process_group()


def _expect(failed, fails, outputs):
    if failed != fails:
        said = "\n".join(output[-_SAID:] for output in outputs)
        raise AssertionError(f"the processes {'failed' if failed else 'did not fail'}:\n{said}")
