"""open_clip's own trainer in an environment of its own, with the webdataset it works with.

The environment lies in the user's cache folder and is made on first use. It sees the packages of the interpreter that runs the
benchmark, behind its own webdataset: both trainers compute with the same build of torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

PACKAGES = ("webdataset==0.2.86", "braceexpand")
MISSING_AT_TIMES = ("pandas",)  # open_clip's trainer imports it, without asking for it

# `python -m open_clip_train.main` with a folder of model configs known, and the attention switch thrown where asked.
RUNNER = """
import runpy, sys
import open_clip
configs, switch = sys.argv[1:3]
open_clip.add_model_config(configs)
if switch == "math":
    import torch
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
sys.argv = ["open_clip_train.main", *sys.argv[3:]]
runpy.run_module("open_clip_train.main", run_name="__main__")
"""


def folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "mmpretrain" / f"peer-{sys.version_info.major}.{sys.version_info.minor}"


def python() -> Path:
    """The peer's interpreter; its environment is made where it is missing. Raises CalledProcessError where that fails."""
    home = folder()
    found = home / "bin" / "python"
    paths = home / "own-packages.txt"
    site = sysconfig.get_path("purelib")
    if found.exists() and paths.exists() and paths.read_text() == site:
        return found
    print(f"making the peer's environment in {home}", file=sys.stderr)
    shutil.rmtree(home, ignore_errors=True)
    missing = [name for name in MISSING_AT_TIMES if not (Path(site) / name).exists()]
    uv = shutil.which("uv")
    if uv:
        subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(home)], check=True)
        subprocess.run([uv, "pip", "install", "--quiet", "--no-deps", "--python", str(found), *PACKAGES], check=True)
        if missing:
            subprocess.run([uv, "pip", "install", "--quiet", "--python", str(found), *missing], check=True)
    else:
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        subprocess.run([str(found), "-m", "pip", "install", "--quiet", "--no-deps", *PACKAGES], check=True)
        if missing:
            subprocess.run([str(found), "-m", "pip", "install", "--quiet", *missing], check=True)
    own = next((home / "lib").glob("python*/site-packages"))
    (own / "beside.pth").write_text(site + "\n")  # after its own packages, so that its webdataset is the one found
    paths.write_text(site)
    return found
