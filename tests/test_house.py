"""The house rules: what may import what, how heavy an import is, what may lie in the tree."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPANION = ROOT / "companion"

# Imports go down only: a module imports from its own floor or a lower one. A side door may import
# everything, and only side doors import side doors.
FLOORS = {
    "the foundations": {"errors", "checkpoints", "pretrained"},
    "ground": {
        "storybook", "data", "tokenizer", "schedule", "embeddings", "attention", "resnet",
    },
    "models": {"clip", "unet", "adm", "autoencoder", "prior", "prior_ar", "predecessors"},
    "processes": {"diffusion", "guidance", "samplers"},
    "systems": {
        "preparation", "scheduler", "pipeline", "unclip", "manipulations", "dalle2", "imagen",
        "stable_diffusion",
    },
    "side doors": {
        "__main__", "asking", "bars", "bench", "beside", "changing", "contest", "decoding",
        "doubles", "examination", "exercises", "factors", "guiding", "judge", "looking", "mapping",
        "matching", "measure", "muon", "notebooks", "prompts", "reading", "recipes", "repainting",
        "repeating", "scores", "show", "train", "widgets",
    },
}  # fmt: skip
LEVEL = {room: level for level, rooms in enumerate(FLOORS.values()) for room in rooms}
SIDE_DOORS = FLOORS["side doors"]

# The published implementations are what ours is compared with, so ours must not lean on them.
ORACLES = {"diffusers", "transformers"}
# Costly to import, so only a side door, or a function that needs it, imports one of these.
HEAVY = {
    "IPython", "PIL", "accelerate", "ipywidgets", "matplotlib", "nbclient", "nbformat", "pandas",
    "scipy", "skimage", "sklearn", "tqdm",
}  # fmt: skip


def rooms() -> dict[str, list[Path]]:
    """Module or subpackage of the companion -> its files."""
    found: dict[str, list[Path]] = {}
    for path in sorted(COMPANION.rglob("*.py")):
        parts = path.relative_to(COMPANION).with_suffix("").parts
        found.setdefault(parts[0], []).append(path)
    return found


def imported(path: Path, source: str | None = None) -> set[str]:
    """Every module that a file imports, anywhere in it, by its full name."""
    package = ("companion", *path.relative_to(COMPANION).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(source if source is not None else path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {name} | {f"{name}.{alias.name}" for alias in node.names}
    return found


def wrong_floor(room: str, names: set[str]) -> list[str]:
    """The imports among ``names`` that ``room`` may not have."""
    wrong = []
    for name in sorted(names):
        first, *rest = name.split(".")
        if first in ORACLES:
            wrong.append(name)
        if first != "companion" or not rest or rest[0] == room or rest[0] not in LEVEL:
            continue
        if room not in SIDE_DOORS and LEVEL[rest[0]] > LEVEL[room]:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("room", [room for room in rooms() if room != "__init__"])
def test_imports_go_down_only(room):
    assert room in LEVEL, f"companion.{room} has no floor yet: say in FLOORS where it lives"
    for path in rooms()[room]:
        assert wrong_floor(room, imported(path)) == [], path.name


def test_the_package_itself_imports_nothing():
    assert imported(COMPANION / "__init__.py") == set()


@pytest.mark.parametrize(
    ("room", "source", "wrong"),
    [
        ("schedule", "from companion.clip import CLIP", ["companion.clip", "companion.clip.CLIP"]),
        ("schedule", "from . import samplers", ["companion.samplers"]),
        ("schedule", "def f():\n    from companion import show", ["companion.show"]),
        ("clip", "import companion.train as t", ["companion.train"]),
        ("unet", "from diffusers.models import UNet2DModel", ["diffusers.models"]),
        ("judge", "import transformers", ["transformers"]),
        ("clip", "from companion import schedule, unet", []),
        ("judge", "from companion import train, stable_diffusion", []),
    ],
)
def test_the_walk_sees_a_planted_import(room, source, wrong):
    found = wrong_floor(room, imported(COMPANION / f"{room}.py", source))
    assert [name for name in found if not name.endswith("UNet2DModel")] == wrong


def test_the_table_in_the_readme_names_every_room():
    readme = (ROOT / "README.md").read_text("utf-8")
    table = {
        name
        for line in readme.splitlines()
        if line.startswith("|")
        for name in re.findall(r"`(\w+)`", line.split("|")[2])
    }
    there = {room for room in rooms() if room != "__init__"}
    assert there - table == set(), "rooms that the README's table does not name"
    assert (table & set(LEVEL)) - there == set(), "rooms that the README names and nobody built"


def modules_added(code: str) -> set[str]:
    """Top-level packages that ``code`` loads in a fresh Python that has torch already."""
    script = (
        "import sys, json, torch, numpy, safetensors.torch\n"
        "before = set(sys.modules)\n"
        f"{code}\n"
        "print(json.dumps(sorted({m.split('.')[0] for m in set(sys.modules) - before})))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_importing_the_package_adds_nothing_but_itself():
    assert modules_added("import companion") == {"companion"}


def test_importing_the_house_loads_nothing_heavy():
    """All floors in one Python; the side doors are free to load what they need."""
    names = [room for room in rooms() if room in LEVEL and room not in SIDE_DOORS]
    added = modules_added("\n".join(f"import companion.{name}" for name in names))
    assert added & (HEAVY | ORACLES) == set()


def test_the_heavy_list_would_be_noticed():
    assert "matplotlib" in modules_added("import matplotlib.figure") & HEAVY


# ---------------------------------------------------------------------------------------------
# the tree
# ---------------------------------------------------------------------------------------------


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], capture_output=True, cwd=ROOT)
    if done.returncode:
        pytest.skip("not a git checkout: there is no list of tracked files")
    names = [name for name in done.stdout.decode().split("\0") if name]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


# Written in pieces, so that this file holds none of them.
HOSTS = ["pypi" + ".org", "python" + "hosted.org", "registry.npm" + "js.org",
         "download.py" + "torch.org", "conda.ana" + "conda.org", "deb.deb" + "ian.org"]  # fmt: skip
LEFTOVERS = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X|NotImplemented" + r"Error)\b")
OWN_PATH = re.compile(r"(?<![\w.~:/-])/(?:home|root|Users)/\w+")
# These hold the faults that the checks must find.
FAULTY_ON_PURPOSE = {"tests/test_house.py", "tests/book/test_notebooks.py"}


def faults(text: str) -> list[str]:
    text = re.sub(r"[A-Za-z0-9+/=]{200,}", "", text)  # a picture's base64 spells anything
    found = [host for host in HOSTS if host in text]
    found += [match[0] for match in LEFTOVERS.finditer(text)]
    return found + [match[0] for match in OWN_PATH.finditer(text)]


def test_tracked_files_name_no_registry_no_own_path_and_no_leftovers():
    wrong = {}
    for path in tracked():
        name = path.relative_to(ROOT).as_posix()
        try:
            content = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        if len(ROOT.parts) > 2 and str(ROOT) in content:  # /src alone would be anybody's
            wrong[name] = [str(ROOT)]
        elif name not in FAULTY_ON_PURPOSE and (found := faults(content)):
            wrong[name] = found
    assert wrong == {}


@pytest.mark.parametrize(
    "text",
    [f"https://{HOSTS[0]}/simple", "# TO" + "DO: later", "raise NotImplemented" + "Error",
     "open('/home/ann/x.png')", "cd /Users/ann"],
)  # fmt: skip
def test_planted_faults_are_found(text):
    assert len(faults(text)) == 1


def test_the_tree_is_light():
    sizes = {path.relative_to(ROOT).as_posix(): path.stat().st_size for path in tracked()}
    assert {name: size for name, size in sizes.items() if size > 8_000_000} == {}
    assert sum(sizes.values()) < 60_000_000


def test_code_is_in_house_style():
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "."], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout


# ---------------------------------------------------------------------------------------------
# what several files say, they say alike
# ---------------------------------------------------------------------------------------------


def test_the_project_address_is_the_same_everywhere():
    import tomllib

    import yaml

    from companion import notebooks

    url = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))["repository"]["url"]
    assert url == notebooks.REPOSITORY
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert set(project["urls"].values()) == {url}
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))["repository-code"] == url
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text("utf-8")
        owner = r"github\.com/(noise-to-pictures/[\w-]+)"
        assert set(re.findall(owner, text)) == {url.removeprefix("https://github.com/")}, name


def test_the_first_cell_installs_what_the_companion_needs():
    import tomllib

    from packaging.requirements import Requirement

    from companion.notebooks import FIRST_CELL

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needed = {Requirement(line).name for line in project["dependencies"]} - {"numpy"}
    lines = [line.split() for line in FIRST_CELL.splitlines() if "%pip install" in line]
    assert "--no-deps" in lines[0]
    listed = {word for line in lines[1:] for word in line[2:] if not word.startswith("-")}
    assert listed == needed


def test_every_requirement_is_pinned_to_a_version_that_meets_it():
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    text = (ROOT / "constraints.txt").read_text("utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)  # no address, no tag
    pins = dict(line.split("==") for line in lines)
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    assert len(pins) == len(lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for line in [line for group in groups for line in group]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), line
        assert {s.operator for s in requirement.specifier} <= {">=", "<"}, line


def test_installed_versions_are_the_pinned_ones_or_the_readers_own_torch():
    """A package that the constraints forget would drift; list it (`python make.py pins`)."""
    from importlib.metadata import distributions

    from packaging.utils import canonicalize_name

    text = (ROOT / "constraints.txt").read_text("utf-8")
    pins = {canonicalize_name(name) for name in re.findall(r"(?m)^([\w.-]+)==", text)}
    if not (Path(sys.prefix) / "companion-setup").exists():
        pytest.skip("this environment was not set up by make.py")
    if Path(sys.prefix).parent != ROOT:
        pytest.skip("an environment of the reader's own may hold anything")
    there = {canonicalize_name(dist.metadata["Name"]) for dist in distributions()}
    own = {"pip", "wheel", "noise-to-pictures", "triton"}
    assert {n for n in there - pins - own if not n.startswith(("nvidia-", "cuda-"))} == set()
