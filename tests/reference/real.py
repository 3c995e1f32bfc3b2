"""Draw from published checkpoints with ours and with the stock pipelines: ``make real``.

Five prompts a system, from the same noise, first by ours, then by stock, so that only one of them
is in memory at a time. Stored under ``book/results/real/``: the pictures side by side, and
``NAME.json`` with the greatest difference, the revision, the hashes of the weights and the date.

Both compute in float32, and stock holds its schedules in float32 too, where ours is float64. For
Karlo this alone makes 0.0003: 1 - ᾱ of the last step is 4.1e-5, its float32 is off by a part in two
thousand, and the clean picture is multiplied by 0.99947 instead of 1.

This is the only part of the project that downloads weights. It asks first, and it says so at once,
before any long work, when it cannot be done.
"""

import argparse
import datetime
import fnmatch
import gc
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from torch import Tensor

OUT = Path(__file__).resolve().parents[2] / "book" / "results" / "real"
PROMPTS = (
    "a stream flowing through the woods",
    "a red house by the sea at dusk",
    "a photograph of an astronaut riding a horse",
    "two yellow mushrooms and a small green boat, watercolour",
    "a red cube on top of a blue cube",
)
WANTED = ("*.json", "*.txt", "*model.safetensors")  # settings, words, full-precision weights


@dataclass(frozen=True)
class Published:
    """A checkpoint on the hub, and what is drawn from it."""

    repository: str
    revision: str | None  # the commit; None: nobody here knows one for sure, so ask for today's
    weights: tuple[str, ...]  # the parts that must come as safetensors
    ignored: tuple[str, ...]  # what is not downloaded
    steps: tuple[int, ...]


KNOWN = {
    "stable-diffusion": Published(
        "CompVis/stable-diffusion-v1-4",
        "133a221b8aa7292a167afc5127cb63fb5005638b",
        ("text_encoder", "unet", "vae"),
        ("safety_checker/*", "feature_extractor/*"),
        (50,),
    ),
    "karlo": Published(
        "kakaobrain/karlo-v1-alpha",
        None,
        ("decoder", "prior", "super_res_first", "super_res_last", "text_encoder", "text_proj"),
        (),
        (25, 25, 7),
    ),
}


def refuse(why: str) -> NoReturn:
    sys.exit(f"error: {why}")


# --- where the weights are -----------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A checkpoint that was found, and has not been fetched yet when it is on the hub."""

    name: str
    folder: Path | None
    repository: str | None
    revision: str | None
    licence: str
    size: int  # bytes

    def fetch(self) -> Path:
        if self.folder is not None:
            return self.folder
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                self.repository,
                revision=self.revision,
                allow_patterns=list(WANTED),
                ignore_patterns=list(KNOWN[self.name].ignored),
            )
        )


def local(name: str, folder: Path) -> Source:
    """A folder on this disk; what is missing in it is said now."""
    if not (folder / "model_index.json").is_file():
        refuse(f"{folder} has no model_index.json, so it is no folder of a whole system.")
    files = [f for f in folder.rglob("*") if f.is_file()]
    whole(name, [f.relative_to(folder).as_posix() for f in files], str(folder))
    size = sum(f.stat().st_size for f in files)
    return Source(name, folder, None, None, "as the folder's own papers say", size)


def on_the_hub(name: str, revision: str | None) -> Source:
    """Ask the hub what there is. Downloads nothing."""
    from huggingface_hub import HfApi

    known = KNOWN[name]
    asked = revision or known.revision
    try:
        info = HfApi().model_info(known.repository, revision=asked, files_metadata=True, timeout=20)
    except Exception as error:  # the hub's client changes the class of its errors now and then
        refuse(
            f"the Hugging Face hub did not answer for {known.repository}"
            f"{f' at revision {asked}' if asked else ''}: {' '.join(str(error).split())}\n"
            "Nothing was downloaded and nothing drawn. With a folder that was downloaded elsewhere:"
            f" python make.py real {name} --folder FOLDER"
        )
    files = {f.rfilename: f.size or 0 for f in info.siblings or []}
    files = {
        f: size
        for f, size in files.items()
        if any(fnmatch.fnmatch(f, w) for w in WANTED)
        and not any(fnmatch.fnmatch(f, w) for w in known.ignored)
    }
    whole(name, files, f"{known.repository} at revision {info.sha}")
    licence = getattr(info.card_data, "license", None) or "not named on its card"
    return Source(name, None, known.repository, info.sha, licence, sum(files.values()))


def whole(name: str, files: Sequence[str] | dict[str, int], where: str) -> None:
    """Refuse a checkpoint whose weights are not all there as safetensors."""
    lacking = [
        part
        for part in KNOWN[name].weights
        if not any(re.fullmatch(rf"{part}/[^/]*model\.safetensors", f) for f in files)
    ]
    if lacking:
        refuse(
            f"{where} has no safetensors for {', '.join(lacking)}, and pickles are not opened here."
            " Another revision may have them (--revision), or convert a download yourself and give"
            " its folder (--folder)."
        )


# --- drawing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How to draw: the same for both sides."""

    steps: tuple[int, ...]
    prompts: tuple[str, ...]
    device: str
    size: int | None = None  # pixels, of Stable Diffusion; None: what it was trained at


Draw = Callable[[str, int], "Tensor"]  # prompt, seed -> (1, 3, H, W) in [0, 1]


def our_stable_diffusion(folder: Path, how: Settings) -> Draw:
    from companion.stable_diffusion import StableDiffusion

    pipe = StableDiffusion.from_pretrained(folder).to(how.device)
    size = how.size or own_size(folder)
    options = {"steps": how.steps[0], "sampler": "ddim", "height": size, "width": size}
    return lambda prompt, seed: pipe(prompt, seed=seed, **options)


def stock_stable_diffusion(folder: Path, how: Settings) -> Draw:
    from reference.systems import pipelines

    s = pipelines()
    pipe = s.StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        **_stock_options(),
    )  # fmt: skip
    pipe.scheduler = s.DDIMScheduler.from_config(pipe.scheduler.config)
    size = how.size or own_size(folder)
    options = {"num_inference_steps": how.steps[0], "height": size, "width": size}
    return _stock(pipe, how, options)


def own_size(folder: Path) -> int:
    """Pixels a side as trained. Trap: stock takes small ones of 2022 for 512."""
    from companion.checkpoints import read_json

    halvings = len(read_json(folder / "vae" / "config.json")["block_out_channels"]) - 1
    return read_json(folder / "unet" / "config.json")["sample_size"] * 2**halvings


def our_karlo(folder: Path, how: Settings) -> Draw:
    from companion.dalle2 import DALLE2

    pipe = DALLE2.from_pretrained(folder).to(how.device)
    return lambda prompt, seed: pipe(prompt, seed=seed, steps=how.steps)


def stock_karlo(folder: Path, how: Settings) -> Draw:
    from reference.systems import pipelines

    pipe = pipelines().UnCLIPPipeline.from_pretrained(folder, **_stock_options())
    names = ("prior", "decoder", "super_res")
    counts = zip(names, how.steps, strict=True)
    return _stock(pipe, how, {f"{n}_num_inference_steps": k for n, k in counts})


def _stock_options() -> dict[str, Any]:
    import torch

    return {"torch_dtype": torch.float32, "local_files_only": True, "use_safetensors": True}


def _stock(pipe: Any, how: Settings, options: dict[str, Any]) -> Draw:
    import torch

    pipe.set_progress_bar_config(disable=True)
    pipe = pipe.to(how.device)

    def draw(prompt: str, seed: int) -> "Tensor":
        generator = torch.Generator().manual_seed(seed)  # on the CPU, as ours
        drawn = pipe(prompt, generator=generator, output_type="np", **options).images
        return torch.from_numpy(drawn).permute(0, 3, 1, 2)  # (1, H, W, 3) -> (1, 3, H, W)

    return draw


SIDES = {
    "stable-diffusion": (our_stable_diffusion, stock_stable_diffusion),
    "karlo": (our_karlo, stock_karlo),
}


def draw_all(open_: Callable, folder: Path, how: Settings, who: str) -> tuple[list, list[float]]:
    """Open a system, draw every prompt (its number is its seed), and let go of the system."""
    from reference.systems import quiet

    pictures, seconds = [], []
    with quiet():
        draw = open_(folder, how)
        for seed, prompt in enumerate(how.prompts):
            started = time.perf_counter()
            pictures.append(draw(prompt, seed).float().cpu())
            seconds.append(time.perf_counter() - started)
            print(f"  {who}: {prompt!r} in {seconds[-1]:.0f} s", flush=True)
    del draw
    gc.collect()
    return pictures, seconds


# --- comparing and storing -----------------------------------------------------------------------


def compare(ours: "Tensor", theirs: "Tensor") -> dict[str, float]:
    """How far two pictures in [0, 1] are apart; a picture that is one colour would prove little."""
    if ours.shape != theirs.shape:
        raise ValueError(f"ours is {tuple(ours.shape)}, stock's {tuple(theirs.shape)}.")
    apart = (ours - theirs).abs()
    levels = ((255 * ours).round() - (255 * theirs).round()).abs()
    return {
        "greatest_difference": apart.max().item(),
        "mean_difference": apart.mean().item(),
        "greatest_levels_of_255": int(levels.max()),
        "share_of_values_with_another_level": (levels > 0).float().mean().item(),
        "standard_deviation_of_the_picture": theirs.std().item(),
    }


def save_pair(path: Path, ours: "Tensor", theirs: "Tensor") -> None:
    """Two pictures (1, 3, H, W) side by side, a white stripe between them."""
    import torch
    from PIL import Image

    stripe = torch.ones(3, ours.shape[2], max(2, ours.shape[3] // 32))
    both = torch.cat([ours[0], stripe, theirs[0]], dim=2).clamp(0, 1)
    pixels = (255 * both).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path, quality=90, method=6)


def run(source: Source, how: Settings, out: Path) -> dict[str, Any]:
    """Fetch, draw by both, compare, store."""
    import torch

    from companion import checkpoints
    from companion.train import hardware

    torch.backends.cudnn.allow_tf32 = False  # float32 means float32 on a GPU too
    folder = source.fetch()
    hashes = {
        path.relative_to(folder).as_posix(): checkpoints.sha256(path)
        for part in KNOWN[source.name].weights
        for path in sorted((folder / part).glob("*model.safetensors"))
    }
    ours, theirs = SIDES[source.name]
    mine, my_seconds = draw_all(ours, folder, how, "ours")
    yours, their_seconds = draw_all(theirs, folder, how, "stock")
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed, prompt in enumerate(how.prompts):
        apart = compare(mine[seed], yours[seed])
        picture = f"{source.name}-{seed + 1}.webp"
        save_pair(out / picture, mine[seed], yours[seed])
        times = {"ours_seconds": my_seconds[seed], "stock_seconds": their_seconds[seed]}
        rows.append({"prompt": prompt, "seed": seed, "picture": picture} | apart | times)
    found = {
        "name": source.name,
        "about": "Pictures from published weights: ours on the left, the stock pipeline's right",
        "date": datetime.date.today().isoformat(),
        "repository": source.repository,
        "revision": source.revision,
        "licence": source.licence,
        "weights": hashes,
        "steps": list(how.steps),
        "size": list(mine[0].shape[2:]),
        "device": hardware(torch.device(how.device)),
        **{n: version(n) for n in ("torch", "diffusers", "transformers")},
        "greatest_difference": max(row["greatest_difference"] for row in rows),
        "rows": rows,
    }
    checkpoints.write_json(out / f"{source.name}.json", found)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make.py real", description=__doc__.splitlines()[0])
    parser.add_argument("systems", nargs="*", metavar="SYSTEM", help=f"{' or '.join(KNOWN)}; both")
    parser.add_argument("--folder", type=Path, help="a downloaded folder instead of the hub")
    parser.add_argument("--revision", help="commit, tag or branch on the hub")
    parser.add_argument("--yes", action="store_true", help="download and draw without asking")
    parser.add_argument("--steps", type=int, nargs="+", help="one number, or three for karlo")
    parser.add_argument("--size", type=int, help="pixels a side, of stable-diffusion")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="draw only the first few")
    parser.add_argument("--device", help="cpu or cuda; cuda where there is one")
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args(arguments)
    names = asked.systems or list(KNOWN)
    if unknown := [name for name in names if name not in KNOWN]:
        parser.error(f"there is no system {unknown[0]!r}; there are: {', '.join(KNOWN)}")
    if (asked.folder or asked.revision or asked.steps) and len(names) != 1:
        parser.error("--folder, --revision and --steps belong to one system: name it.")
    if asked.steps and len(asked.steps) != len(KNOWN[names[0]].steps):
        parser.error(f"{names[0]} takes {len(KNOWN[names[0]].steps)} numbers of steps.")
    if not 1 <= asked.prompts <= len(PROMPTS):
        parser.error(f"--prompts is {asked.prompts}; there are {len(PROMPTS)}.")

    sources = [
        local(name, asked.folder) if asked.folder else on_the_hub(name, asked.revision)
        for name in names
    ]
    for source in sources:
        where = source.folder or f"{source.repository} at revision {source.revision}"
        verb = "reads" if source.folder else "downloads what is not in the cache yet of"
        pin = "" if source.folder or asked.revision or KNOWN[source.name].revision else (
            "\n  no commit is pinned for it: this is today's, and the stored result names it"
        )  # fmt: skip
        print(
            f"{source.name}: {verb} {source.size / 1e9:.2f} GB, {where}{pin}\n"
            f"  licence: {source.licence}. It says what the weights may be used for: read it first."
            f"\n  holds about as much memory as its weights in float32, and draws {asked.prompts}"
            " prompts twice.\n  Nothing looks at what is drawn: the safety checker is left out."
        )
    if not asked.yes:
        try:
            agreed = input("Go on? [y/N] ").strip().lower() in ("y", "yes")
        except EOFError:
            agreed = False
        if not agreed:
            refuse("nothing was downloaded and nothing drawn. With --yes it does not ask.")

    import torch

    device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for source in sources:
        steps = tuple(asked.steps or KNOWN[source.name].steps)
        how = Settings(steps, PROMPTS[: asked.prompts], device, asked.size)
        found = run(source, how, asked.out)
        print(
            f"{source.name}: greatest difference {found['greatest_difference']:.2e} of 1;"
            f" stored in {asked.out / source.name}.json and beside it"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
