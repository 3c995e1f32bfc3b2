"""``python -m companion``: train a network of the book, measure, check folders of weights.

torch is imported by the commands alone, so that ``--help`` answers at once.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import NoReturn


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 when all went well; 2 for bad input, said in one line; 1 otherwise.
    """
    logging.basicConfig(format="%(message)s")  # what the library has to say goes to stderr
    parser = _parser()
    chosen = parser.parse_args(arguments)  # exits with 2 and one line of its own
    try:
        return chosen.run(chosen)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        sys.stderr.close()
        return 1
    except (ValueError, TypeError, OSError) as error:
        return _bad_input(error)
    except RuntimeError as error:
        from companion.train import TrainingError

        if not isinstance(error, TrainingError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1


def _bad_input(error: Exception) -> int:
    """One line for what the reader can put right; a fault of ours keeps its traceback."""
    if isinstance(error, TypeError) and not _from_check(error):
        raise error
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _from_check(error: Exception) -> bool:
    from companion import errors

    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_filename == errors.__file__


class _Parser(argparse.ArgumentParser):
    """argparse, with one line for an error rather than the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m companion",
        description="From Noise to Pictures: train the book's networks, measure and check them.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = commands.add_parser(
        "train",
        help="train a network from its recipe",
        description="Train a network from its recipe. The run lies in runs/RECIPE: state to resume"
        " from, log, sample pictures, and in the end final/, the folder with the trained weights.",
        epilog="Several GPUs: accelerate launch -m companion train RECIPE. Several CPU processes:"
        " torchrun --nproc-per-node 2 -m companion train RECIPE --device cpu. Ctrl-C"
        " saves and stops; --resume goes on as if nothing had happened.",
    )
    train.set_defaults(run=_train)
    train.add_argument("recipe", metavar="RECIPE", help="its name; --list shows all", nargs="?")
    train.add_argument("--list", action="store_true", help="list the recipes and stop")
    train.add_argument(
        "--data",
        metavar="FOLDER",
        help="train on your own pictures: images and metadata.jsonl with file_name and text",
    )
    train.add_argument("--out", metavar="FOLDER", help="folder of the run (default: runs/RECIPE)")
    train.add_argument("--resume", action="store_true", help="continue the run in that folder")
    train.add_argument("--steps", type=int, metavar="N", help="instead of the recipe's")
    train.add_argument("--batch-size", type=int, metavar="N", help="instead of the recipe's")
    train.add_argument("--seed", type=int, metavar="N", help="instead of the recipe's")
    train.add_argument(
        "--precision",
        default="fp32",
        choices=("fp32", "bf16", "fp16"),
        help="fp32 (default), or mixed precision",
    )
    train.add_argument("--threads", type=int, metavar="N", help="CPU threads for the network")
    train.add_argument(
        "--workers", type=int, metavar="N", default=1, help="threads that draw batches (default: 1)"
    )
    train.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda", "mps"),
        help="auto (default) takes a GPU where there is one",
    )
    train.add_argument("--save-every", type=int, metavar="N", help="steps between checkpoints")
    train.add_argument("--quiet", action="store_true", help="no progress bar")

    measure = commands.add_parser(
        "measure",
        help="measure what takes too long for a notebook",
        description="Run a measurement on one thread and write its results, with seeds, intervals,"
        " machine and the hashes of the weights used, to book/results/NAME.json.",
    )
    measure.set_defaults(run=_measure)
    measure.add_argument("name", metavar="NAME", nargs="?", help="--list shows all")
    measure.add_argument("--list", action="store_true", help="list the measurements and stop")
    measure.add_argument("--out", metavar="FILE", help="write there instead")

    scores = commands.add_parser(
        "scores",
        help="every bar that the book's machines are held to, and what was found",
        description="Print every bar with what was found, its 95 % interval, and pass or MISSED,"
        " from the cards of the shipped weights and the stored measurements. Exit status 1 when"
        " one was not measured, or with other weights than the shipped ones.",
    )
    scores.set_defaults(run=_scores)

    draw = commands.add_parser(
        "draw",
        help="draw a picture from words",
        description="Draw from words: with the book's own systems, or with a folder in a published"
        " layout, Stable Diffusion's or Karlo's (DALL·E 2). The seed is printed, so that a picture"
        " can be drawn again.",
    )
    draw.set_defaults(run=_draw)
    draw.add_argument("prompt", metavar="PROMPT", help="what to draw, in quotes")
    draw.add_argument(
        "--model",
        metavar="MODEL",
        required=True,
        help="stable-diffusion, dalle2 or imagen, the book's own; or a folder; or a hub id",
    )
    draw.add_argument("--out", metavar="FILE", default="picture.png", help="a .png (picture.png)")
    draw.add_argument("--seed", type=int, metavar="N", help="default: a new one each time")
    draw.add_argument(
        "--steps",
        metavar="N",
        help="50; for DALL·E 2 a number each for prior, decoder and upsampler: 25,25,7",
    )
    draw.add_argument("--sampler", metavar="NAME", help="ddim, euler, heun, dpmpp_2m or ddpm")
    draw.add_argument(
        "--guidance",
        type=float,
        metavar="S",
        help="how literally to take the words (3 to 5 for the book's own, 7.5 or 8 for others)",
    )
    draw.add_argument("--negative", metavar="TEXT", help="what to move away from")
    draw.add_argument("--height", type=int, metavar="PIXELS", help="default: the model's own")
    draw.add_argument("--width", type=int, metavar="PIXELS", help="likewise")
    draw.add_argument(
        "--count",
        type=int,
        default=1,
        metavar="N",
        help="a grid of N pictures, with the seeds that follow",
    )
    draw.add_argument("--truncate", action="store_true", help="cut a prompt that is too long")
    draw.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda", "mps"),
        help="auto (default) takes a GPU where there is one",
    )
    draw.add_argument("--quiet", action="store_true", help="no progress bar")

    check = commands.add_parser(
        "check",
        help="check folders of weights: whole, unaltered, with a true card",
        description="Check every model below a folder: weights whole and as their card says, cards"
        " complete, no pickles. A whole system (a folder with model_index.json) is opened part by"
        " part instead: files, shapes, configurations, and whether the parts fit each other."
        " Exit status 1 when something is wrong.",
    )
    check.set_defaults(run=_check)
    check.add_argument(
        "folder", metavar="FOLDER", nargs="?", help="default: the weights shipped with companion"
    )
    return parser


def _train(chosen: argparse.Namespace) -> int:
    from companion import errors
    from companion.recipes import RECIPES
    from companion.train import keep_memory, train

    if chosen.list:
        for recipe in RECIPES.values():
            print(f"{recipe.name:24} {recipe.minutes:>6g} min  {recipe.about}")
        return 0
    errors.expect(chosen.recipe is not None, "which recipe? One of: " + ", ".join(RECIPES))
    errors.one_of("the recipe", chosen.recipe, RECIPES)
    keep_memory()
    result = train(
        RECIPES[chosen.recipe],
        chosen.out,
        data=chosen.data,
        resume=chosen.resume,
        steps=chosen.steps,
        batch_size=chosen.batch_size,
        seed=chosen.seed,
        precision=chosen.precision,
        threads=chosen.threads,
        workers=chosen.workers,
        device=chosen.device,
        save_every=chosen.save_every,
        quiet=chosen.quiet,
    )
    if result.main:
        print(result.message)
    return 0 if result.finished else 1


def _measure(chosen: argparse.Namespace) -> int:
    from companion import errors
    from companion.measure import measure, measurements
    from companion.train import keep_memory

    if chosen.list:
        for name, entry in measurements().items():
            print(f"{name:24} {entry.minutes:>6g} min  {entry.about}")
        return 0
    errors.expect(chosen.name is not None, "measure what? One of: " + ", ".join(measurements()))
    keep_memory()
    print(f"Written: {measure(chosen.name, chosen.out)}")
    return 0


def _scores(chosen: argparse.Namespace) -> int:
    from companion.bars import lines

    found = lines()
    print("        ch.", *found, sep="\n")
    passed = [line.passed for line in found]
    lacking = sum(line.found is None for line in found)
    print(
        f"{passed.count(True)} passed, {passed.count(False)} missed,"
        f" {passed.count(None) - lacking} without a promise, {lacking} not measured"
    )
    return 1 if lacking else 0


def _draw(chosen: argparse.Namespace) -> int:
    from pathlib import Path

    import torch
    from tqdm import tqdm

    from companion import errors

    out = Path(chosen.out)
    errors.expect(out.suffix == ".png", f"--out is {out}; expected a name that ends in .png.")
    errors.number("--count", chosen.count, low=1, integer=True)
    seed = torch.Generator().seed() % 2**32 if chosen.seed is None else chosen.seed
    errors.number("--seed", seed, low=0, high=2**62, integer=True)
    kind, root = _system(chosen.model)
    options = {"negative_prompt": chosen.negative, "sampler": chosen.sampler}
    options |= {"height": chosen.height, "width": chosen.width, "truncate": chosen.truncate}
    if root == "storybook":
        options |= kind.asked_with
    if chosen.guidance is not None:
        options["guidance_scale"] = chosen.guidance
    own = kind.storybook() if root == "storybook" else None
    usual = kind.usual_steps(own or kind.listed(root))
    try:
        steps = [int(n) for n in chosen.steps.split(",")] if chosen.steps else [*usual.values()]
    except ValueError:
        raise ValueError(f"--steps is {chosen.steps!r}; expected whole numbers.") from None
    errors.expect(
        len(steps) == len(usual),
        f"--steps has {len(steps)} numbers; {kind.__name__} takes {len(usual)}, for"
        f" {', '.join(usual)}.",
    )
    pipe = (kind(**own) if own else kind.from_pretrained(root)).to(_device(chosen.device))
    stages = (name for name, n in zip(usual, steps, strict=True) for _ in range(n))
    with tqdm(total=sum(steps), disable=chosen.quiet, unit="step") as bar:

        def tell(*_: object) -> None:
            bar.set_description(next(stages, None), refresh=False)
            bar.update()

        pictures = pipe(
            chosen.prompt,
            steps=steps if len(steps) > 1 else steps[0],
            num_images_per_prompt=chosen.count,
            generator=[torch.Generator().manual_seed(seed + i) for i in range(chosen.count)],
            callback=tell,
            **options,
        )
    _write_png(out, pictures.cpu())
    upto = f" to {seed + chosen.count - 1}" if chosen.count > 1 else ""
    print(f"{out}: {chosen.prompt!r}, seed {seed}{upto}")
    return 0


def _write_png(path, pictures) -> None:
    """Pictures (B, 3, H, W) in [0, 1] as one file, in about as many rows as columns."""
    import math

    import torch
    from PIL import Image

    from companion.checkpoints import atomic_write

    columns = math.ceil(len(pictures) ** 0.5)
    rows = math.ceil(len(pictures) / columns)
    blank = torch.ones(rows * columns - len(pictures), *pictures.shape[1:])
    tiles = torch.cat([pictures.float(), blank]).unflatten(0, (rows, columns))
    whole = tiles.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (rows*H, columns*W, 3)
    with atomic_write(path) as part:
        Image.fromarray((whole * 255).round().byte().numpy()).save(part, format="PNG")


def _device(name: str) -> str:
    import torch

    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"


def _system(model: str) -> tuple:
    """The class that opens a model, by its model_index.json, and what it takes for it."""
    import companion
    from companion.checkpoints import CheckpointError, read_json
    from companion.pretrained import locate

    kinds = [getattr(companion, name) for name in companion._SYSTEMS]
    for kind in kinds:
        if model == kind.shipped:
            return kind, "storybook"
    root = locate(model)
    name = read_json(root / "model_index.json").get("_class_name")
    for kind in kinds:
        if name in kind.opens:
            return kind, root
    known = ", ".join(name for kind in kinds for name in kind.opens)
    raise CheckpointError(
        f"{root / 'model_index.json'}: _class_name is {name!r}; expected one of {known}."
    )


def _check(chosen: argparse.Namespace) -> int:
    from pathlib import Path

    from companion.checkpoints import WEIGHTS, check

    if chosen.folder and (Path(chosen.folder) / "model_index.json").exists():
        findings = _system(chosen.folder)[0].check(chosen.folder)
    else:
        findings = check(chosen.folder)
    for finding in findings:
        print(finding)
    where = chosen.folder or WEIGHTS
    print(f"{where}: {len(findings)} findings" if findings else f"{where}: all is well")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
