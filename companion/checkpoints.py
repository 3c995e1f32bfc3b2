"""Weights on disk: safetensors in and out, with hashes, configurations and model cards.

A model is a folder::

    config.json         the frozen dataclass that builds it
    model.safetensors   the weights (published folders also say diffusion_pytorch_model.safetensors)
    card.json           where the weights come from, and their sha256
    README.md           the same card as a page (Hugging Face model-card style)

Trained weights above 7.5 MB lie in several files, and ``….safetensors.index.json`` says which
tensor is in which: what Hugging Face calls a sharded checkpoint.

Only safetensors is read. A pickle (``.bin``, ``.ckpt``, ``.pt``) can run any code when it is
opened, so a folder that holds nothing else gets an error that names a safe conversion. Files are
written beside their place and then moved there: a kill leaves the old file or the new one whole.
"""

import dataclasses
import hashlib
import json
import math
import os
import tempfile
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from safetensors.torch import save_file
from torch import nn

PREFERRED = ("model.safetensors", "diffusion_pytorch_model.safetensors")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
PRIVATE = ("architectures", "transformers_version", "torch_dtype", "dtype")
LARGEST = 7_500_000  # bytes of one file; more is stored in parts, as Hugging Face's libraries do
INDEX = ".index.json"  # ends the name of the list that says which tensor lies in which part
DIGEST = "companion.digest"  # key in the safetensors header; see digest()
CARD = (
    "recipe", "about", "parameters", "dtype", "file", "sha256", "seed", "steps", "pictures",
    "minutes", "hardware", "torch", "command", "data", "score", "licence",
)  # fmt: skip
WEIGHTS = Path(__file__).parent / "weights"

T = TypeVar("T")


class CheckpointError(ValueError):
    """A file or folder of weights that cannot be used, and what to do about it."""


# --- writing -----------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on leaving, flush it to disk and move it into place.

    A reader sees the old file or the whole new one. When the block raises, the temporary file goes
    and ``path`` stays as it was. A killed process leaves the temporary file (``.NAME.….part``).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        if os.name == "posix":
            mask = os.umask(0)
            os.umask(mask)
            part.chmod(0o666 & ~mask)  # mkstemp gives 0600, which others could not read
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # Windows cannot open a folder; the move itself is still whole
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8 with plain newlines."""
    with atomic_write(path) as part:
        part.write_bytes(text.encode())


def write_json(path: str | Path, value: object) -> None:
    """Write ``value`` to ``path`` atomically, as JSON (no NaN, which is not JSON)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256(path: str | Path) -> str:
    """The sha256 of a file, in hexadecimal; of weights in parts, that of the one file they make."""
    if Path(path).name.endswith(INDEX):
        tensors, _ = read_tensors(path, verify=False)
        raw = serialise(tensors, metadata=_notes(tensors))
        size = int.from_bytes(raw[:8], "little")
        whole = hashlib.sha256(raw[:8] + _in_order(raw[8 : 8 + size]))
        whole.update(memoryview(raw)[8 + size :])
        return whole.hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(tensors: Mapping[str, torch.Tensor], notes: Mapping[str, str] | None = None) -> str:
    """The sha256 of names, types, shapes, bytes and ``notes``, whatever their order."""
    total = hashlib.sha256()
    for key, note in sorted((notes or {}).items()):
        total.update(json.dumps([key, note]).encode())
    for name in sorted(tensors):
        x = tensors[name]  # one at a time: they may still lie in a file
        total.update(json.dumps([name, str(x.dtype), list(x.shape)]).encode())
        total.update(_bytes(x))
    return total.hexdigest()


def write_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], notes: Mapping[str, str] | None = None
) -> None:
    """Write tensors and text ``notes`` to one safetensors file that carries its own digest.

    It is read back and compared before it takes the place of an older one.
    """
    whole = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    with atomic_write(path) as part:
        save_file(whole, part, metadata=_notes(whole, notes))
        with open(part, "rb+") as file:
            size = int.from_bytes(file.read(8), "little")
            header = _in_order(file.read(size))
            file.seek(8)
            file.write(header)
        read_tensors(part)


def write_parts(
    path: str | Path, tensors: Mapping[str, torch.Tensor], largest: float = math.inf
) -> Path:
    """Write tensors to one file, or to several and an index where they take more bytes.

    Returns:
        The file, or the index: ``NAME.index.json`` beside ``NAME-00001-of-0000n.safetensors``.
    """
    path = Path(path)
    index = path.with_name(path.name + INDEX)
    old = {path, index, *path.parent.glob(f"{path.stem}-*-of-*{path.suffix}")}
    size = {name: x.numel() * x.element_size() for name, x in tensors.items()}
    parts: list[dict[str, torch.Tensor]] = [{}]
    room = largest
    for name, x in tensors.items():
        if size[name] > room and parts[-1]:
            parts, room = [*parts, {}], largest
        parts[-1][name] = x
        room -= size[name]
    if len(parts) == 1:
        write_tensors(path, tensors)
        new = {path}
    else:
        where, n = {}, len(parts)
        for k, part in enumerate(parts):
            file = path.with_name(f"{path.stem}-{k + 1:05}-of-{n:05}{path.suffix}")
            write_tensors(file, part)
            where |= dict.fromkeys(part, file.name)
        total = {"total_size": sum(size.values())}
        write_json(index, {"metadata": total, "weight_map": dict(sorted(where.items()))})
        new = {index, *(path.with_name(name) for name in where.values())}
    for stale in old - new:
        stale.unlink(missing_ok=True)
    return path if len(parts) == 1 else index


def _notes(
    tensors: Mapping[str, torch.Tensor], notes: Mapping[str, str] | None = None
) -> dict[str, str]:
    """What the header says beside the tensors: ``notes``, and the digest of all."""
    header = {"format": "pt", **(notes or {})}
    return {**header, DIGEST: digest(tensors, header)}


def _in_order(header: bytes) -> bytes:
    """The notes first and in order: the library shuffles them, and equal must be equal."""
    parts = json.loads(header)
    notes = {"__metadata__": dict(sorted(parts.pop("__metadata__").items()))}
    text = json.dumps(notes | parts, separators=(",", ":"), ensure_ascii=False)
    return text.encode().ljust(len(header))


def save(
    folder: str | Path,
    model: nn.Module,
    *,
    config: object = None,
    card: Mapping[str, object] | None = None,
    dtype: torch.dtype | None = None,
    filename: str = "model.safetensors",
) -> Path:
    """Write a model as a folder.

    Args:
        folder: Where; made if need be.
        model: The module whose parameters and persistent buffers are stored. Tied weights are
            stored once.
        config: A dataclass instance or a mapping for ``config.json``.
        card: What to say about these weights; ``sha256``, ``parameters``, ``dtype`` and ``file``
            are filled in here. Without it an older card is removed: it spoke of other weights.
        dtype: Storage type of floating-point tensors, such as ``torch.float16``; default: as is.
        filename: Name of the weight file.

    Raises:
        CheckpointError: A weight is NaN or infinite, or does not fit the storage type.
    """
    folder = Path(folder)
    if card is not None:
        for key, value in card.items():
            _plain(f"card entry {key!r}", value)
    tensors = {}
    for name, x in _tensors(model).items():
        x = x.detach()
        stored = x.to(dtype) if dtype is not None and x.is_floating_point() else x
        if x.is_floating_point() and not bool(torch.isfinite(stored).all()):
            why = (
                "is NaN or infinite" if not bool(torch.isfinite(x).all()) else f"overflows {dtype}"
            )
            raise CheckpointError(f"Not saved to {folder}: tensor {name!r} {why}.")
        tensors[name] = stored
    # The old card goes first: killed half-way, the folder has no card rather than a wrong one.
    for stale in ("card.json", "README.md") if card is not None else ("card.json",):
        (folder / stale).unlink(missing_ok=True)
    if config is not None:
        write_json(folder / "config.json", _config_dict(config))
    # In parts only with a card, whose sha256 tells when one of them was altered.
    written = write_parts(folder / filename, tensors, LARGEST if card is not None else math.inf)
    if card is not None:
        kinds = {x.dtype for x in tensors.values() if x.is_floating_point()}
        filled = {
            **card,
            "file": written.name,
            "sha256": sha256(written),
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": ", ".join(sorted(str(k).removeprefix("torch.") for k in kinds)),
        }
        filled = {k: filled[k] for k in (*CARD, *filled) if k in filled}
        write_text(folder / "README.md", card_page(filled))
        write_json(folder / "card.json", filled)
    return folder


# --- reading -----------------------------------------------------------------------------------


def find_folder(folder: str | Path, subfolder: str | None = None) -> Path:
    """The folder, or a clear error when it is not there."""
    path = Path(folder) / subfolder if subfolder else Path(folder)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; expected a folder with config.json and weights.")
    beside = (
        sorted(p.name for p in path.parent.iterdir() if p.is_dir()) if path.parent.is_dir() else []
    )
    near = get_close_matches(path.name, beside, n=1)
    hint = f" Did you mean {path.parent / near[0]}?" if near else " Check the path."
    raise CheckpointError(f"There is no folder {path}.{hint}")


def find_weights(folder_or_file: str | Path) -> Path:
    """The one safetensors file to read, or an error that says why there is none."""
    path = Path(folder_or_file)
    if path.suffix in PICKLES and (path.is_file() or not path.exists()):
        raise CheckpointError(_pickle_message(path, [path.name]))
    if path.is_file():
        return path
    if path.suffix == ".safetensors" and not path.exists():
        raise CheckpointError(f"There is no file {path}. Check the path, or download it again.")
    path = find_folder(path)
    for name in PREFERRED:
        for found in (path / name, path / (name + INDEX)):
            if found.is_file():
                return found
    found = sorted(p.name for p in path.glob("*.safetensors") if not p.name.startswith("."))
    if len(found) == 1:
        return path / found[0]
    if found:
        raise CheckpointError(
            f"{path} holds {len(found)} safetensors files ({', '.join(found[:4])}…) and none named"
            f" {PREFERRED[0]}. Give the path of the one to read."
        )
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise CheckpointError(_pickle_message(path, pickles))
    raise CheckpointError(f"{path} holds no weights: expected {' or '.join(PREFERRED)}.")


def load_state(folder_or_file: str | Path, *, verify: bool = True) -> dict[str, torch.Tensor]:
    """Read all tensors of a safetensors file as they are stored, on the CPU.

    Args:
        folder_or_file: A safetensors file, or a folder that holds one.
        verify: Compare with the sha256 in ``card.json`` beside it and with the file's own digest.

    Raises:
        CheckpointError: Missing, truncated or altered file; a folder of pickles only.
    """
    path = find_weights(folder_or_file)
    tensors, _ = read_tensors(path, verify=verify)
    return tensors


def read_tensors(
    path: str | Path, *, verify: bool = True
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors (copies, the file is free again) and the notes of one safetensors file."""
    path = Path(path)
    carded = verify and _verify_card(path)
    with _open(path) as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        notes = dict(file.metadata() or {})
    if verify and not carded:
        _verify_digest(path, tensors, notes)
    return tensors, {k: v for k, v in notes.items() if k not in (DIGEST, "format")}


def load_into(
    model: nn.Module,
    folder_or_file: str | Path,
    *,
    rename: Callable[[str], str | None] | None = None,
    verify: bool = True,
) -> nn.Module:
    """Fill ``model`` with stored weights, strictly, one tensor at a time.

    The file is memory-mapped and each tensor is converted to the type and device that the model
    has, so the weights are never held twice. A model built under ``torch.device("meta")`` costs no
    memory before, and draws no random numbers.

    Args:
        model: The module; its tensors are overwritten only when every name and shape fits.
        folder_or_file: A safetensors file, or a folder that holds one.
        rename: Turns a name in the file into the model's name (historical spellings); ``None``
            drops the tensor.
        verify: Check hashes first.

    Returns:
        The same model.

    Raises:
        CheckpointError: As for ``load_state``; or names and shapes that do not fit, all listed.
    """
    path = find_weights(folder_or_file)
    carded = verify and _verify_card(path)
    with _open(path) as file:
        keys = list(file.keys())
        metadata = dict(file.metadata() or {})
        if verify and not carded and DIGEST in metadata:
            _verify_digest(path, _Lazy(file, keys), metadata)
        names = {key: rename(key) if rename else key for key in keys}
        source = {name: key for key, name in names.items() if name is not None}
        if len(source) < sum(name is not None for name in names.values()):
            raise CheckpointError(f"{path}: two stored tensors are renamed to one name.")
        shapes = {name: tuple(file.get_slice(key).get_shape()) for name, key in source.items()}
        targets = model.state_dict(keep_vars=True)
        _fits(path, model, targets, shapes)
        fresh: dict[str, torch.Tensor] = {}
        twins = _twins(targets)
        with torch.no_grad():
            for name, key in source.items():
                stored, target = file.get_tensor(key), targets[name]
                if stored.is_floating_point() != target.is_floating_point():
                    raise CheckpointError(
                        f"{path}: {name!r} is stored as {stored.dtype},"
                        f" the model has {target.dtype}."
                    )
                if target.is_meta:
                    value = stored.to(target.dtype, copy=True)
                    if isinstance(target, nn.Parameter):
                        value = nn.Parameter(value, requires_grad=target.requires_grad)
                    fresh.update(dict.fromkeys(twins[id(target)], value))
                else:
                    target.copy_(stored)
        if fresh:
            model.load_state_dict(fresh, strict=False, assign=True)
    hollow = [n for n, x in (*model.named_parameters(), *model.named_buffers()) if x.is_meta]
    if hollow:
        raise CheckpointError(
            f"{path} does not hold {_few(hollow)}, which the model computes when it is built: build"
            ' it on the CPU, not under torch.device("meta").'
        )
    return model


def read_config(
    folder: str | Path,
    config_class: type[T],
    ignore: Iterable[str] = (),
    implemented: Mapping[str, Iterable[object]] | None = None,
) -> T:
    """Build a frozen dataclass from ``config.json``; refuse by name what it does not know.

    Keys that start with ``_`` and those in ``PRIVATE`` say who wrote the file and are skipped.

    Args:
        folder: The model's folder (or the path of a ``.json`` file).
        config_class: The dataclass; lists become tuples, nested dataclasses are read in turn, and
            its own ``__post_init__`` may refuse values with ``ValueError``.
        ignore: More keys to skip: those that change nothing here, whatever their value.
        implemented: Keys that are no field, with the values under which nothing need be done,
            such as ``{"act_fn": ("silu", "swish"), "class_embed_type": (None,)}``.

    Raises:
        CheckpointError: No file, no JSON, an unknown key, a missing one, a wrong type, or a value
            that the model does not implement.
    """
    path = Path(folder)
    path = path if path.suffix == ".json" else find_folder(path) / "config.json"
    return _build(path.name, read_json(path), config_class, {*ignore}, implemented or {}, str(path))


def read_card(folder: str | Path) -> dict[str, object]:
    """The model card of a folder."""
    return read_json(find_folder(folder) / "card.json")


def trained(name: str) -> str:
    """How long shipped weights were trained, on how much and on what, as their card says."""
    folder = WEIGHTS / name
    if not (folder / "card.json").is_file():
        return "weights without a card: an unfinished training"
    card = read_card(folder)
    return (
        f"{card['pictures']:,} pictures in {card['steps']:,} steps,"
        f" {card['minutes']:.0f} minutes on {card['hardware']}"
    )


def read_json(path: str | Path) -> dict[str, object]:
    """A JSON object from a file, or a clear error."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"There is no file {path}.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}). Fetch it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}; expected a JSON object.")
    return value


# --- cards -------------------------------------------------------------------------------------


def card_page(card: Mapping[str, object]) -> str:
    """The README.md of a model folder, written from its card alone."""
    name = str(card.get("recipe", "model"))
    front = ["---", "library_name: companion", "tags:", "- from-noise-to-pictures"]
    if "licence" in card:
        front.insert(1, f"license: {str(card['licence']).lower()}")
    lines = [*front, "---", "", f"# {name}", ""]
    if card.get("about"):
        lines += [str(card["about"]), ""]
    scores = card.get("score") or {}
    if isinstance(scores, Mapping) and scores:
        lines += [
            "## Score",
            "",
            "| measure | value | 95 % interval | samples |",
            "|---|---|---|---|",
        ]
        for key, value in scores.items():
            if isinstance(value, Mapping):
                low, high = value.get("low"), value.get("high")
                interval = "" if low is None or high is None else f"{_show(low)} … {_show(high)}"
                row = f"{_show(value.get('value'))} | {interval} | {_show(value.get('n', ''))}"
            else:
                row = f"{_show(value)} | |"
            lines.append(f"| {key} | {row} |")
        lines.append("")
    lines += ["## How these weights came about", "", "| | |", "|---|---|"]
    for key, value in card.items():
        if key not in ("about", "score", "recipe"):
            lines.append(f"| {key} | {_show(value)} |")
    lines += ["", "The same facts for programs are in `card.json`.", ""]
    return "\n".join(lines)


def check(folder: str | Path | None = None) -> list[str]:
    """List what is wrong with the models under ``folder`` (default: the shipped weights).

    Weights are opened and hashed; cards are compared with the file, with what a card must say and
    with the README; configurations must be JSON; pickles are named. An empty list: all is well.
    """
    root = find_folder(WEIGHTS if folder is None else folder)
    files = sorted(p for p in root.rglob("*") if p.is_file() and not p.name.startswith("."))
    findings = [f"{p}: a pickle; convert it to safetensors" for p in files if p.suffix in PICKLES]
    weights = [p for p in files if p.suffix == ".safetensors" or p.name.endswith(INDEX)]
    if not weights:
        findings.append(f"{root}: no safetensors file in it")
    for path in weights:
        findings += _check_file(path)
    for path in (p for p in files if p.suffix == ".json"):
        try:
            read_json(path)
        except CheckpointError as error:
            findings.append(str(error))
    return findings


def _check_file(path: Path) -> Iterator[str]:
    try:
        _verify_card(path)
        tensors, notes = read_tensors(path, verify=False)
        with _open(path) as file:
            _verify_digest(path, tensors, dict(file.metadata() or {}))
    except CheckpointError as error:
        yield str(error)
        return
    for name, x in tensors.items():
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            yield f"{path}: tensor {name!r} is NaN or infinite"
    if "run" in notes:  # the state of a training run, which is no model yet
        return
    if not (path.parent / "config.json").is_file():
        yield f"{path.parent}: no config.json"
    if not (path.parent / "card.json").is_file():
        yield f"{path.parent}: no card.json, so nothing says where these weights come from"
        return
    card = read_json(path.parent / "card.json")
    if card.get("file", path.name) != path.name:
        return
    lacking = [key for key in CARD if key not in card]
    if lacking:
        yield f"{path.parent / 'card.json'}: says nothing about {', '.join(lacking)}"
    page = path.parent / "README.md"
    if not page.is_file() or page.read_text(encoding="utf-8") != card_page(card):
        yield f"{page}: missing, or not what card.json says"


# --- inside ------------------------------------------------------------------------------------


@contextmanager
def _open(path: Path) -> Iterator[safe_open]:
    """Open a safetensors file, or the parts that an index lists; whatever is wrong with their
    bytes is a CheckpointError."""
    if path.name.endswith(INDEX):
        where = read_json(path).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(n, str) for n in where.values()):
            raise CheckpointError(f"{path} has no weight_map from tensors to files.")
        with ExitStack() as stack:
            names = sorted({*where.values()})
            files = {n: stack.enter_context(_open(path.parent / Path(n).name)) for n in names}
            lacking = [k for k, n in where.items() if k not in files[n].keys()]
            if lacking:
                raise CheckpointError(f"{path}: the files that it lists have no {_few(lacking)}.")
            yield _Parts(where, files)
        return
    try:
        size = path.stat().st_size
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"There is no file {path}. Check the path.") from None
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} ({size:,} bytes) is truncated or altered: not a whole safetensors file"
            f" ({error}). Fetch it again or save it anew."
        ) from None


class _Parts:
    """Several open files that look like one."""

    def __init__(self, where: dict[str, str], files: dict[str, safe_open]) -> None:
        self.where, self.files = where, files

    def keys(self) -> list[str]:
        return list(self.where)

    def get_tensor(self, key: str) -> torch.Tensor:
        return self.files[self.where[key]].get_tensor(key)

    def get_slice(self, key: str) -> object:
        return self.files[self.where[key]].get_slice(key)

    def metadata(self) -> dict[str, str]:
        return {}


class _Lazy(Mapping[str, torch.Tensor]):
    """Tensors of an open file, read one by one."""

    def __init__(self, file: safe_open, keys: list[str]) -> None:
        self.file, self.keys_ = file, keys

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_)

    def __len__(self) -> int:
        return len(self.keys_)


def _verify_card(path: Path) -> bool:
    """Compare a file with the sha256 on the card beside it; False when no card speaks of it."""
    if not (path.parent / "card.json").is_file():
        return False
    card = read_json(path.parent / "card.json")
    if "sha256" not in card or card.get("file", path.name) != path.name:
        return False
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}. Check the path.")
    found = sha256(path)
    if found != card["sha256"]:
        raise CheckpointError(
            f"{path} is truncated or altered: its sha256 is {found[:12]}…, card.json beside it says"
            f" {str(card['sha256'])[:12]}…. Fetch the folder again, or train it anew."
        )
    return True


def _verify_digest(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    """Compare tensors and notes with the digest in the file's own header, where it has one."""
    wanted = metadata.pop(DIGEST, None)
    if wanted is not None and digest(tensors, metadata) != wanted:
        raise CheckpointError(
            f"{path} is altered: its tensors do not match the digest in its header."
            " Fetch it again or save it anew."
        )


def _bytes(x: torch.Tensor) -> memoryview:
    flat = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers; of tied ones, the first name only."""
    seen: set[int] = set()
    named = model.state_dict(keep_vars=True).items()
    return {n: x for n, x in named if not (id(x) in seen or seen.add(id(x)))}


def _twins(targets: Mapping[str, torch.Tensor]) -> dict[int, list[str]]:
    """All names of each tensor of a model: several where weights are tied."""
    names: dict[int, list[str]] = {}
    for name, x in targets.items():
        names.setdefault(id(x), []).append(name)
    return names


def _fits(
    path: Path,
    model: nn.Module,
    targets: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Raise one error that lists missing, unexpected and misshapen tensors."""
    present = {id(targets[name]) for name in shapes if name in targets}
    missing = [name for name, x in targets.items() if id(x) not in present]
    unexpected = [name for name in shapes if name not in targets]
    misshapen = [
        f"{name!r} {shape}, the model has {tuple(targets[name].shape)}"
        for name, shape in shapes.items()
        if name in targets and tuple(targets[name].shape) != shape
    ]
    wrong = []
    if missing:
        wrong.append(f"missing {_few(missing)}")
    if unexpected:
        wrong.append(f"unexpected {_few(unexpected)}")
    if misshapen:
        wrong.append(f"misshapen {_few(misshapen, quote=False)}")
    if wrong:
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__}: {'; '.join(wrong)}."
            " Build the model with the config.json of the same folder."
        )


def _few(names: list[str], quote: bool = True, n: int = 4) -> str:
    shown = ", ".join(repr(x) if quote else x for x in names[:n])
    return shown if len(names) <= n else f"{shown} … ({len(names)} in all)"


def _pickle_message(path: Path, names: list[str]) -> str:
    return (
        f"{path} has its weights as a pickle only ({', '.join(names[:3])}). Opening a pickle can"
        " run any code, so companion reads safetensors only. Look for a safetensors file of the"
        ' same model; or, if you trust the source, convert it: tensors = torch.load("FILE",'
        " weights_only=True), then safetensors.torch.save_file(tensors,"
        ' "model.safetensors") in the same folder.'
    )


def _config_dict(config: object) -> dict[str, object]:
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.asdict(config)
    if isinstance(config, Mapping):
        return dict(config)
    raise TypeError(
        f"config is {type(config).__name__}; expected a dataclass instance or a mapping."
    )


def _build(
    where: str,
    values: Mapping[str, object],
    config_class: type[T],
    ignore: set[str],
    implemented: Mapping[str, Iterable[object]],
    path: str,
) -> T:
    hints = typing.get_type_hints(config_class)
    fields = {f.name: f for f in dataclasses.fields(config_class) if f.init}
    found: dict[str, object] = {}
    for key, value in values.items():
        if key in fields:
            found[key] = _convert(f"{where}: {key}", value, hints[key], ignore, implemented, path)
        elif key in implemented:
            if not any(_same(value, allowed) for allowed in implemented[key]):
                allowed = " or ".join(json.dumps(a) for a in implemented[key])
                raise CheckpointError(
                    f"{path}: {key} is {json.dumps(value)}; this model implements only {allowed}."
                )
        elif not (key.startswith("_") or key in PRIVATE or key in ignore):
            near = get_close_matches(key, fields, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise CheckpointError(
                f"{path}: {config_class.__name__} has no setting {key!r}"
                f" (here {json.dumps(value)[:60]}), so it cannot promise the same numbers.{hint}"
            )
    lacking = [
        name
        for name, f in fields.items()
        if name not in found
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if lacking:
        raise CheckpointError(f"{path}: {config_class.__name__} needs {_few(lacking)}.")
    try:
        return config_class(**found)
    except CheckpointError:
        raise
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _same(a: object, b: object) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _convert(
    where: str,
    value: object,
    hint: object,
    ignore: set[str],
    implemented: Mapping[str, Iterable[object]],
    path: str,
) -> object:
    """A JSON value as the annotated type, or an error."""

    def go(inner: object, to: object) -> object:
        return _convert(where, inner, to, ignore, implemented, path)

    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is typing.Any or hint is object:
        return value
    if origin in (typing.Union, types.UnionType):
        for option in args:
            with suppress(CheckpointError):
                return go(value, option)
    elif origin is typing.Literal:
        for option in args:
            if _same(value, option):
                return option
        allowed = " or ".join(json.dumps(a) for a in args)
        raise CheckpointError(
            f"{path}: {where.split(': ')[-1]} is {json.dumps(value)};"
            f" this model implements only {allowed}."
        )
    elif dataclasses.is_dataclass(hint):
        if isinstance(value, Mapping):
            return _build(where, value, hint, ignore, implemented, path)
    elif origin in (tuple, list) or hint in (tuple, list):
        if isinstance(value, list):
            if not args:
                return tuple(value) if (origin or hint) is tuple else value
            if origin is tuple and args[-1] is not Ellipsis:
                if len(value) == len(args):
                    return tuple(map(go, value, args))
            else:
                inner = (go(v, args[0]) for v in value)
                return tuple(inner) if origin is tuple else list(inner)
    elif origin is dict or hint is dict:
        if isinstance(value, dict):
            return value
    elif hint is type(None):
        if value is None:
            return None
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif (
        isinstance(hint, type)
        and isinstance(value, hint)
        and (hint is bool or value is not True and value is not False)
    ):
        return value
    name = getattr(hint, "__name__", None) if origin is None else str(hint).replace("typing.", "")
    raise CheckpointError(
        f"{path}: {where.split(': ')[-1]} is {json.dumps(value)[:60]}; expected {name or hint}."
    )


def _plain(where: str, value: object) -> None:
    """Refuse what cannot be written as JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}; a card holds finite numbers only.")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _plain(f"{where}, {key!r}", inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _plain(where, inner)
    elif not isinstance(value, (str, int, float, bool, type(None))):
        raise TypeError(f"{where} is {type(value).__name__}; a card holds plain JSON values only.")


def _show(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {_show(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_show, value))
    return str(value).replace("|", "\\|").replace("\n", " ")
