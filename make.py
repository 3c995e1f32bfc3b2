#!/usr/bin/env python3
"""Every command of this project, on any system: ``python make.py TARGET``.

``make TARGET`` does the same where make is installed. The only need is Python 3.11 or newer: each
target first sets up what is missing (once, in ``.venv``), and after that nothing uses a network.

Settings, all optional, read from the environment:

    COMPANION_VENV    folder of the virtual environment (default ``.venv``), or ``active`` to
                      install into the virtual or conda environment that runs this file
    COMPANION_JOBS    processes that run tests (default 2)
    OMP_NUM_THREADS   threads of one process (default 1 while testing)
    PIP_...           pip's own settings: which index, which wheels, which certificates
"""

# Old Pythons must be able to read this file far enough to say that they are too old.
import sys

if sys.version_info < (3, 11):
    sys.exit(
        "This project needs Python 3.11 or newer, and this is Python %d.%d (%s).\n"
        "If a newer one is installed, name it: make book PYTHON=python3.12, or\n"
        "python3.12 make.py book." % (sys.version_info[0], sys.version_info[1], sys.executable)
    )

import functools
import hashlib
import http.server
import importlib.util
import json
import os
import re
import shutil
import subprocess
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent
BOOK = ROOT / "book"
BUILD = ROOT / "_build"
BEGIN, ELSEWHERE = "# everywhere", "# only on some systems"  # the two parts of constraints.txt
PAGES = "tests/book/test_pages.py"  # looks at the built pages, so it runs after the build


# ---------------------------------------------------------------------------------------------
# running things
# ---------------------------------------------------------------------------------------------


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def environment(**extra: str) -> dict[str, str]:
    """The reader's environment, and where it does not set them: UTF-8, our own settings' folders.

    So a matplotlib style or an IPython start-up file of the reader's changes no stored output.
    """
    own = {"MPLCONFIGDIR": str(home() / "matplotlib"), "IPYTHONDIR": str(home() / "ipython")}
    # glibc keeps freed memory for the next tensor, which saves a fifth of the time of a training
    own |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
    return {"PYTHONUTF8": "1", **own, **extra, **os.environ}


def run(command: list, *, env: dict[str, str] | None = None, cut: bool = False) -> int:
    """Run ``command`` in the checkout and return its exit status.

    With ``cut`` it runs in a network namespace of its own that reaches nothing but itself.
    """
    command = [str(part) for part in command]
    if cut:
        command = [*NAMESPACE, *command]
    try:
        return subprocess.run(command, cwd=ROOT, env=env or environment()).returncode
    except KeyboardInterrupt:
        return 130


def need(status: int, message: str) -> None:
    if status:
        sys.exit(f"\n{message}")


# ---------------------------------------------------------------------------------------------
# setting up
# ---------------------------------------------------------------------------------------------


def home() -> Path:
    """The folder of the virtual environment in use."""
    chosen = os.environ.get("COMPANION_VENV", ".venv")
    if chosen != "active":
        return ROOT / chosen
    if sys.prefix == sys.base_prefix and not (Path(sys.prefix) / "conda-meta").is_dir():
        sys.exit(
            "COMPANION_VENV=active installs into the environment that runs make.py, but "
            f"{sys.executable} is\nnot in a virtual or conda environment. Activate one first, or "
            "unset COMPANION_VENV to use .venv."
        )
    return Path(sys.prefix)


def interpreter() -> Path:
    if os.environ.get("COMPANION_VENV") == "active":
        return Path(sys.executable)
    return home() / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def create() -> None:
    """Make the virtual environment, or mend one that was left half made."""
    folder, fresh = home(), not home().exists()
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        sys.exit(
            f"This Python ({sys.executable}) cannot make virtual environments: its parts 'venv' "
            "and 'ensurepip'\nare missing. On Debian and Ubuntu: apt install python3-venv. Or "
            "activate an environment of your own\nand set COMPANION_VENV=active."
        )
    say(f"making the virtual environment {folder}")
    status = run([sys.executable, "-m", "venv", folder])
    if status and fresh:
        shutil.rmtree(folder, ignore_errors=True)
    need(status, f"The virtual environment {folder} could not be made: see the message above.")


def installed_torch(python: Path) -> str | None:
    """The version of torch that is there already, local tag included (``2.13.0+cu130``)."""
    code = "from importlib.metadata import version; print(version('torch'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or None


def constraints(python: Path) -> Path:
    """``constraints.txt``, except that an installed torch that is new enough stays as it is."""
    path, torch = ROOT / "constraints.txt", installed_torch(python)
    if torch is None:
        return path
    found = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    oldest = tuple(int(part) for part in found[1].split("."))
    release = re.match(r"\d+(?:\.\d+)*", torch)[0]
    if tuple(int(part) for part in release.split(".")) < oldest:
        return path
    own = home() / "companion-constraints.txt"
    text = re.sub(r"(?m)^torch==.*$", f"torch=={torch}", path.read_text("utf-8"))
    own.write_text(text, "utf-8")
    return own


def setup() -> Path:
    """Install everything once; return the environment's Python.

    Runs again only when the requirements or ``constraints.txt`` changed, or the checkout moved.
    """
    python, stamp = interpreter(), home() / "companion-setup"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    needs = [project["build-system"], project["project"], project["tool"]["setuptools"]]
    parts = [json.dumps(needs), (ROOT / "constraints.txt").read_text("utf-8"), str(ROOT)]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    if python.exists() and stamp.exists() and stamp.read_text() == key:
        return python

    started = time.monotonic()
    ready = (
        python.exists()
        and not subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode
    )
    if not ready:
        create()
    minimum = "import sys; sys.exit(sys.version_info < (3, 11))"
    need(
        run([python, "-c", minimum]),
        f"The environment {home()} has a Python older than 3.11. Delete that folder and try again.",
    )
    say("installing the companion, the book's tools and the test tools (once; some minutes)")
    stamp.unlink(missing_ok=True)
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    pip += ["--constraint", constraints(python)]
    if os.environ.get("CI"):
        pip += ["--progress-bar", "off"]
    # The build tool comes first and is used in place: an isolated build would fetch its own,
    # unpinned.
    failed = (
        "The set-up did not finish: pip's message is above. Behind a mirror or a proxy, pip's own\n"
        "settings apply (PIP_INDEX_URL, PIP_PROXY, ...). Trying again goes on where it stopped."
    )
    need(run([*pip, "setuptools"]), failed)
    extras = ".[book,oracles,test]"
    need(run([*pip, "--no-build-isolation", "--editable", extras]), failed)
    stamp.write_text(key)
    # matplotlib makes a list of fonts on its first import, and says so in whatever notebook it is.
    run([python, "-c", "import matplotlib.font_manager"])
    say(f"set up in {time.monotonic() - started:.0f} s")
    return python


# ---------------------------------------------------------------------------------------------
# cutting the network off
# ---------------------------------------------------------------------------------------------

# The command runs as `unshare -rn python make.py inside COMMAND`, in a network namespace that
# holds only a loopback device, which `inside` switches on.
NAMESPACE = ["unshare", "-rn", sys.executable, str(ROOT / "make.py"), "inside"]


def inside(*command: str) -> None:
    """Switch the loopback device on, then become ``command`` (used by the tests, on Linux)."""
    import fcntl
    import socket
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as device:
        up_and_running = 0x1 | 0x40  # IFF_UP | IFF_RUNNING
        request = struct.pack("16sH14s", b"lo", up_and_running, b"")
        fcntl.ioctl(device, 0x8914, request)  # SIOCSIFFLAGS
    os.execvp(command[0], command)


def can_cut() -> bool:
    if not sys.platform.startswith("linux") or shutil.which("unshare") is None:
        return False
    return subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0


# ---------------------------------------------------------------------------------------------
# the parts of the targets
# ---------------------------------------------------------------------------------------------


def chapters(names: tuple[str, ...]) -> list[Path]:
    """Notebooks by number (``02``) or file name; all, and the template, when nothing is named."""
    every = sorted(BOOK.glob("*.ipynb")) + sorted(BOOK.glob("templates/*.ipynb"))
    chosen = []
    for name in names:
        number = f"{int(name):02d}" if name.isdigit() else None
        found = [
            path
            for path in every
            if (number and path.name.startswith(f"{number}-"))
            or name in (path.name, path.stem, f"book/{path.name}")
        ]
        if not found:
            there = ", ".join(path.name for path in every) or "none yet"
            sys.exit(f"There is no chapter {name!r}. Chapters: {there}.")
        chosen += found
    return chosen or every


def folder_hash(*names: str) -> str:
    """A hash of the named files and of all files below the named folders."""
    digest = hashlib.sha256()
    for name in names:
        top = ROOT / name
        files = sorted(top.rglob("*")) if top.is_dir() else [top]
        for path in files:
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(path.relative_to(ROOT).as_posix().encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def guard(python: Path, paths: list[Path] | None = None, *, cut: bool = False) -> int:
    """Refuse notebooks that are stale, crashed, out of order or unreadable."""
    return run([python, "-m", "companion.notebooks", "check", *(paths or [])], cut=cut)


def build(python: Path, *, cut: bool = False) -> int:
    """Build the pages into ``_build/html``; any warning is a failure."""
    # Sphinx rebuilds a page when the page changed. What shapes every page it does not watch.
    key = folder_hash(
        "_config.yml", "_toc.yml", "_ext", "book/_assets", "book/figures", "book/results",
        "book/references.bib", "constraints.txt",
    )  # fmt: skip
    stamp = BUILD / "inputs"
    if not stamp.exists() or stamp.read_text() != key:
        shutil.rmtree(BUILD, ignore_errors=True)
    command = [python, "-c", "from jupyter_book.cli.main import main; main()"]
    command += ["build", ".", "-W", "-n", "--keep-going"]
    status = run(command, cut=cut)
    if status:
        # A page that warned counts as read: the next build would skip it, and pass.
        shutil.rmtree(BUILD / ".doctrees", ignore_errors=True)
        stamp.unlink(missing_ok=True)
    else:
        stamp.write_text(key)
    return status


def pytest(python: Path, *arguments: object, cut: bool = False, spread: bool = True) -> int:
    command = [python, "-m", "pytest", "--durations=10", "--durations-min=1"]
    if spread:
        command += ["-n", os.environ.get("COMPANION_JOBS", "2"), "--dist", "loadfile"]
    env = environment(OMP_NUM_THREADS="1", PYTHONHASHSEED="0", HF_HUB_OFFLINE="1")
    env["COMPANION_NETWORK"] = "cut" if cut else "left"
    return run([*command, *arguments], env=env, cut=cut)


def nbval(python: Path, paths: list[Path], *, cut: bool = False, spread: bool = True) -> int:
    """Run the chapters again and compare every output with the stored one."""
    if not paths:
        return 0
    options = ["--nbval", "--nbval-current-env", "-p", "no:cacheprovider"]
    options += ["--nbval-sanitize-with", "tests/book/sanitize.cfg"]
    return pytest(python, *options, *paths, cut=cut, spread=spread)


def stages(steps: dict) -> None:
    """Run every step, say what each took, and fail if one failed."""
    rows, failed = [], False
    for name, step in steps.items():
        say(name)
        started = time.monotonic()
        status = step()
        rows.append((name, time.monotonic() - started, status))
        failed = failed or bool(status)
        if status == 130:  # Ctrl-C
            break
    say("summary")
    for name, seconds, status in rows:
        print(f"{name:<48}{seconds:>7.0f} s   {'FAILED' if status else 'passed'}")
    sys.exit(1 if failed else 0)


# ---------------------------------------------------------------------------------------------
# the targets
# ---------------------------------------------------------------------------------------------


def book() -> None:
    """Set up and build the rendered book into _build/html."""
    python, started = setup(), time.monotonic()
    need(guard(python), "The notebooks above need work (often: `make notebooks`). Nothing built.")
    need(build(python), "The book did not build cleanly: the warnings above count as errors.")
    say(f"built in {time.monotonic() - started:.0f} s: _build/html/index.html (or: make read)")


def test(*arguments: str) -> None:
    """Set up and run every test. --long adds those of over a minute each."""
    if unknown := set(arguments) - {"--long"}:
        sys.exit(f"make test knows only --long, not {' '.join(sorted(unknown))}.")
    python = setup()
    cut = can_cut()
    print(f"Network while testing: {'cut off' if cut else 'left on (unshare does not work here)'}.")
    chosen = [] if "--long" in arguments else ["-m", "not long"]
    pages = {}
    if (ROOT / PAGES).exists():
        pages["the built pages, in a browser"] = lambda: pytest(
            python, PAGES, *chosen, cut=cut, spread=False
        )
    stages(
        {
            "unit tests": lambda: pytest(python, "tests", f"--ignore={PAGES}", *chosen, cut=cut),
            "the notebooks, run again and compared": lambda: nbval(python, chapters(()), cut=cut),
            "the book": lambda: guard(python, cut=cut) or build(python, cut=cut),
            **pages,
        }
    )


def check(*names: str) -> None:
    """One chapter: its guard, its stored outputs, its tests and its page (CHAPTER=02)."""
    if not names:
        sys.exit("Which chapter? For example: make check CHAPTER=02, or python make.py check 02.")
    python, paths = setup(), chapters(names)
    own = " or ".join(path.stem.replace("-", "_") for path in paths)
    same = " or ".join(path.stem for path in paths)

    def some(*arguments: object) -> int:
        status = pytest(python, *arguments, "-k", f"{own} or {same}", spread=False)
        return 0 if status == 5 else status  # 5: no test bears the chapter's name

    pages = {}
    if (ROOT / PAGES).exists():
        pages["its page, in a browser"] = lambda: some(PAGES)
    stages(
        {
            "the guard": lambda: guard(python, paths),
            "its outputs, run again and compared": lambda: nbval(python, paths, spread=False),
            "its tests": lambda: some("tests", f"--ignore={PAGES}"),
            "the book": lambda: build(python),
            **pages,
        }
    )


def notebooks(*names: str) -> None:
    """Run the chapters (or those named: CHAPTER=02) in fresh kernels and store the outputs."""
    python, paths = setup(), chapters(names)
    sys.exit(run([python, "-m", "companion.notebooks", "run", *paths]))


def lab(*arguments: str) -> None:
    """JupyterLab on the chapters."""
    first = next(iter(chapters(())), None)
    where = f"/lab/tree/book/{first.name}" if first else "/lab/tree/book"
    command = [setup(), "-m", "jupyterlab", f"--ServerApp.root_dir={ROOT}"]
    sys.exit(run([*command, f"--LabApp.default_url={where}", *arguments]))


class Pages(http.server.SimpleHTTPRequestHandler):
    """Serves the built book; knows its file types whatever the system's own table says."""

    extensions_map = {
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        ".css": "text/css",
        ".js": "text/javascript",
        ".json": "application/json",
        ".svg": "image/svg+xml",
        ".webp": "image/webp",
        ".woff2": "font/woff2",
    }

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


def read(port: str = "8000") -> None:
    """Serve the built book on this machine only (python make.py read 8123 for another port)."""
    if not (BUILD / "html" / "index.html").exists():
        book()
    handler = functools.partial(Pages, directory=str(BUILD / "html"))
    for number in range(int(port), int(port) + 20):
        try:
            server = http.server.ThreadingHTTPServer(("127.0.0.1", number), handler)
        except OSError:  # taken
            continue
        with server:
            say(f"the book: http://127.0.0.1:{number}/   (Ctrl-C ends it)")
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                return
    sys.exit(f"No free port from {port} on.")


def reference(module: str, *arguments: str) -> None:
    """Run a command that needs the published libraries; it lives beside the tests."""
    env = environment(OMP_NUM_THREADS="1")
    paths = [str(ROOT / "tests"), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    sys.exit(run([setup(), "-m", f"reference.{module}", *arguments], env=env))


def bench(*arguments: str) -> None:
    """Measure speeds and memory, ours against diffusers' (--help: what else it can do)."""
    reference("bench", *arguments)


def scores() -> None:
    """Print every bar that the machines are held to: found, interval, pass or missed."""
    sys.exit(run([setup(), "-m", "companion", "scores"], env=environment()))


def real(*arguments: str) -> None:
    """Draw from published checkpoints with ours and diffusers', after asking (--help)."""
    reference("real", *arguments)


def clean() -> None:
    """Remove the built book and all caches. The environment in .venv stays."""
    for name in ("_build", ".pytest_cache", ".hypothesis", ".ruff_cache"):
        shutil.rmtree(ROOT / name, ignore_errors=True)
    for top in ("companion", "tests", "book", "_ext"):
        for name in ("__pycache__", ".ipynb_checkpoints"):
            for folder in list((ROOT / top).rglob(name)):
                shutil.rmtree(folder, ignore_errors=True)


def pins() -> None:
    """Write constraints.txt anew from the versions that are installed now."""
    freeze = [setup(), "-m", "pip", "list", "--format=freeze", "--exclude-editable"]
    lines = subprocess.run(freeze, capture_output=True, text=True, check=True).stdout.splitlines()
    # no local tags (torch 2.13.0+cpu is torch 2.13.0 to all other builds), and pip stays as it is
    lines = [re.sub(r"\+.*$", "", line) for line in lines if not re.match(r"(pip|wheel)==", line)]
    path = ROOT / "constraints.txt"
    head, _, rest = path.read_text("utf-8").partition(BEGIN)
    _, _, elsewhere = rest.partition(ELSEWHERE)
    body = "\n".join(sorted(lines, key=str.lower))
    path.write_text(f"{head}{BEGIN}\n{body}\n\n{ELSEWHERE}{elsewhere}", "utf-8")


def usage() -> str:
    lines = ["python make.py TARGET   (or: make TARGET)", ""]
    lines += [f"  {name:<11}{target.__doc__.splitlines()[0]}" for name, target in TARGETS.items()]
    return "\n".join(lines)


TARGETS = {
    target.__name__: target
    for target in (book, test, read, lab, notebooks, check, bench, scores, real, setup, pins, clean)
}


def main(arguments: list[str]) -> None:
    name, *rest = arguments or ["help"]
    if name in ("help", "-h", "--help"):
        print(usage())
        return
    if name == "inside":
        inside(*rest)
    if name not in TARGETS:
        sys.exit(f"There is no target {name!r}.\n\n{usage()}")
    target = TARGETS[name]
    # `make check CHAPTER='02 03'` and `python make.py check 02 03` mean the same.
    if name in ("check", "notebooks"):
        rest = rest or os.environ.get("CHAPTER", "").split()
    try:
        target(*rest)
    except TypeError as error:
        if "positional argument" not in str(error):
            raise
        sys.exit(f"make {name} takes no {' '.join(rest)!r}.\n\n{usage()}")


if __name__ == "__main__":
    main(sys.argv[1:])
