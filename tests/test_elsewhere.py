"""Where the companion meets other places: no network at all, and a notebook service without it."""

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from companion.notebooks import FIRST_CELL, REPOSITORY

ROOT = Path(__file__).resolve().parents[1]
SAID = ("companion", "torch", "results")
REACH = """
import socket
with socket.create_server(("127.0.0.1", 0)) as server:
    socket.create_connection(server.getsockname()).close()  # what kernels and page tests need
try:
    socket.create_connection(("192.0.2.1", 80), timeout=2)
except OSError as error:
    print(error.errno)
"""


def test_the_tests_run_with_the_network_cut_off():
    """``make test`` runs all of them in a namespace that has no way out, where the system can."""
    import errno

    if os.environ.get("COMPANION_NETWORK") == "cut":
        command = []  # we are inside
    else:
        command = ["unshare", "-rn", sys.executable, str(ROOT / "make.py"), "inside"]
        if shutil.which("unshare") is None or subprocess.run([*command, "true"]).returncode:
            pytest.skip("this system cannot cut the network off (unshare -rn does not work)")
    done = subprocess.run(
        [*command, sys.executable, "-c", REACH], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == errno.ENETUNREACH


def test_every_interface_but_loopback_is_gone():
    if os.environ.get("COMPANION_NETWORK") != "cut":
        pytest.skip("the network is left on: run by `make test` on a system that can cut it off")
    assert [name for _, name in socket.if_nameindex()] == ["lo"]


@pytest.mark.slow  # makes an environment and installs into it
def test_the_first_cell_adds_the_companion_and_leaves_torch(tmp_path):
    """An environment like Colab's, with torch and no companion, before and after the cell."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout: there is nothing to install from")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    python = tmp_path / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    # Our packages are its packages, all but the companion: a path in PYTHONPATH brings modules
    # and their metadata, and not the link to this checkout.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    env |= {
        "PYTHONPATH": sysconfig.get_path("purelib"),
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads this as --no-build-isolation
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "GIT_CONFIG_COUNT": "1",  # a container may run as another user than the checkout's
        "GIT_CONFIG_KEY_0": "safe.directory",
        "GIT_CONFIG_VALUE_0": "*",
    }
    missing = subprocess.run([python, "-c", "import companion"], cwd=tmp_path, env=env)
    assert missing.returncode == 1
    said = "import torch; print('companion', companion.__file__); print('torch', torch.__file__)\n"
    said += "from companion import measure\n"
    stored = {path.stem for path in (ROOT / "book" / "results").glob("*.json")}
    said += f"for name in measure.measurements().keys() & {sorted(stored)}: measure.load(name)\n"
    said += "print('results', measure.INSTALLED)\n"
    cell = FIRST_CELL.replace(REPOSITORY, ROOT.as_uri())
    assert cell != FIRST_CELL
    (tmp_path / "cell.ipy").write_text(f"{cell}\n{said}", encoding="utf-8")

    def run() -> dict[str, Path]:
        done = subprocess.run(
            [python, "-m", "IPython", "--no-banner", "--colors=NoColor", "cell.ipy"],
            cwd=tmp_path, env=env, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
        return {line[0]: Path(line[1]) for line in lines if line[0] in SAID}

    import torch

    for _ in range(2):
        found = run()
        assert found["companion"].is_relative_to(tmp_path / "env")
        assert found["torch"] == Path(torch.__file__)
        assert found["results"].is_relative_to(tmp_path / "env")
    assert any(found["companion"].parent.glob("fonts/*.ttf"))  # data travels with the package
