"""A cell for the runner's tests: ``toy FOLDER ENVIRONMENT AGENT SEED``. What it does is its agent's name."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

folder, (environment, agent, seed) = Path(sys.argv[1]), sys.argv[2:]
head = {"schema": 1, "environment": environment, "agent": agent, "seed": int(seed), "provenance": {}}
(folder / "cell.json").write_text(json.dumps(head))
with (folder.parents[3] / "ran.txt").open("a") as ran:
    ran.write(f"{agent} {seed}\n")
print(f"{agent} begins")
if agent == "fails":
    (folder / "failed.json").write_text(json.dumps({"error": "ValueError: no\nsuch thing", "traceback": "…"}))
    sys.exit(1)
if agent == "crashes":
    raise RuntimeError("nothing is left of it")
if agent == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if agent == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / "pids.txt").write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)
if agent == "naps":  # so that others can be seen to run at the same time
    time.sleep(0.2)
    with (folder.parents[3] / "ran.txt").open("a") as ran:
        ran.write(f"end {seed}\n")
done = {"seconds": 0.25, "measuring_seconds": 0.5, "start_seconds": 0.125, "peak_memory_mb": 100.0, "energy_j": None}
(folder / "done.json").write_text(json.dumps(done))
