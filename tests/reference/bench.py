"""Ours against diffusers': ``make bench``, after the table of ``companion.bench``.

Same weights in the same memory, same inputs, same process, one turn each in alternating order. A
ratio is theirs over ours, so above 1 ours is faster or smaller. Each has an interval
(``companion.bench.spread``). Nothing fails here: the last column compares the interval's lower end
with what the house asks for.

Sizes: the book's models, and Stable Diffusion 1.x as published, with random weights. A pass of that
one takes seconds, so a plain run does 30 pairs of it at 256×256 pixels and 6 at the full 512×512;
``--whole`` does 30 there too, which takes an hour or more.
"""

import argparse
import datetime
import functools
import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from companion import bench, checkpoints
from companion.adm import CROSS, PLAIN, ADMConfig, ADMUNet
from companion.autoencoder import Autoencoder, AutoencoderConfig
from companion.clip import (
    CLIPText,
    CLIPTextConfig,
    CLIPTextProjected,
    CLIPVisionConfig,
    CLIPVisionProjected,
)
from companion.dalle2 import DALLE2
from companion.prior import Prior, PriorConfig, TextProjection, TextProjectionConfig
from companion.scheduler import Scheduler
from companion.stable_diffusion import StableDiffusion
from companion.tokenizer import Tokenizer
from companion.train import hardware
from companion.unet import UNet, UNetConfig
from reference import published, systems
from reference.oracle import stock
from reference.test_life_size import fill

STORED = Path(__file__).resolve().parents[2] / "book" / "results" / "bench.json"
BOOK, LIFE = "book size", "Stable Diffusion 1.x size"
SHOWN = {BOOK: "the book's models", LIFE: "Stable Diffusion 1.x, random weights"}
BAR = {BOOK: 1.0, LIFE: 0.97}  # what the interval's lower end must reach
AIM = {BOOK: 1.3}  # and what would be fine to reach
PROMPT = "a red house by the sea at dusk"


class Two(NamedTuple):
    """One job, done by ours and by the stock library's."""

    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor]


@dataclass(frozen=True)
class Subject:
    """One row: what is done, at which size, and how many pairs a plain and a whole run do."""

    build: Callable[[], Two]
    size: str
    what: str
    pairs: int = 30
    whole: int = 30
    share: bool = False  # whether to compare with a matrix product


SUBJECTS: dict[str, Subject] = {}


def subject(name: str, size: str, what: str, **options: Any) -> Callable:
    """Register a function that builds both sides."""

    def register(build: Callable[[], Two]) -> Callable[[], Two]:
        SUBJECTS[name] = Subject(build, size, what, **options)
        return build

    return register


# --- models, and stock's on the same memory ------------------------------------------------------


def twins(ours: nn.Module, theirs: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Fill ours with random weights, and let the stock model use the same memory."""
    fill(ours.eval())
    theirs.eval().load_state_dict(ours.state_dict(), strict=True, assign=True)
    return ours, theirs


def _plain(config: dict) -> dict:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}


def text(kind: type, config: dict) -> tuple[nn.Module, nn.Module]:
    """A text encoder, by transformers' class of the same name."""
    ours = kind(CLIPTextConfig(**config))
    theirs = getattr(stock(), kind.published)(stock().CLIPTextConfig(**config))
    if kind is CLIPText:  # transformers 5 leaves the prefix of published files out
        twins(ours, nn.ModuleDict({"text_model": theirs}))
    else:
        twins(ours, theirs)
    return ours, theirs


def unet(config: dict) -> tuple[nn.Module, nn.Module]:
    """Stable Diffusion's U-Net, made without memory of its own where it can be."""
    with torch.device("meta"):
        ours = UNet(UNetConfig(**_plain(config)))
        theirs = stock().UNet2DConditionModel(**config)
    return twins(ours.to_empty(device="cpu"), theirs)


def adm(config: dict) -> tuple[nn.Module, nn.Module]:
    ours = ADMUNet(ADMConfig(**config))
    return twins(ours, getattr(stock(), ours.published)(**config))


def autoencoder(config: dict) -> tuple[nn.Module, nn.Module]:
    ours = Autoencoder(AutoencoderConfig(**_plain(config)))
    return twins(ours, stock().AutoencoderKL(**config))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def ids(config: dict, batch: int) -> Tensor:
    """Texts of different lengths, padded with the end token, which has the highest number."""
    context, words = config["max_position_embeddings"], config["vocab_size"]
    found = torch.randint(
        0, words - 2, (batch, context), generator=torch.Generator().manual_seed(1)
    )
    found[:, 0] = words - 2
    for row in range(batch):
        found[row, (row + 1) * context // (batch + 1) :] = words - 1
    return found


# --- book size -----------------------------------------------------------------------------------

WIDE, WORDS = 128, 32  # width of CLIP and of the text's states; tokens
BOOK_TEXT = {
    "vocab_size": 560, "hidden_size": WIDE, "intermediate_size": 4 * WIDE, "projection_dim": WIDE,
    "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": WORDS,
    "hidden_act": "quick_gelu", "bos_token_id": 558, "eos_token_id": 559,
}  # fmt: skip
BOOK_VISION = {
    "image_size": 64, "patch_size": 8, "hidden_size": WIDE, "intermediate_size": 4 * WIDE,
    "projection_dim": WIDE, "num_hidden_layers": 4, "num_attention_heads": 4,
}  # fmt: skip
BOOK_UNET = {
    "in_channels": 4, "out_channels": 4, "block_out_channels": (64, 96, 128),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3, "layers_per_block": 1,
    "cross_attention_dim": WIDE, "attention_head_dim": 4, "norm_num_groups": 32, "sample_size": 8,
}  # fmt: skip
BOOK_DECODER = {
    "in_channels": 3, "out_channels": 6, "block_out_channels": (48, 96, 128),
    "down_block_types": (PLAIN[0], CROSS[0], CROSS[0]),
    "up_block_types": (CROSS[1], CROSS[1], PLAIN[1]),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "layers_per_block": 1,
    "attention_head_dim": 32, "cross_attention_dim": WIDE, "class_embed_type": "identity",
    "resnet_time_scale_shift": "scale_shift", "norm_num_groups": 16, "sample_size": 16,
}  # fmt: skip
BOOK_UPSAMPLER = {
    "in_channels": 6, "out_channels": 3, "block_out_channels": (32, 64, 96),
    "down_block_types": (PLAIN[0],) * 3, "up_block_types": (PLAIN[1],) * 3,
    "layers_per_block": 1, "add_attention": False, "norm_num_groups": 16, "sample_size": 64,
}  # fmt: skip
BOOK_PRIOR = {
    "num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 4, "embedding_dim": WIDE,
    "num_embeddings": WORDS,
}  # fmt: skip
BOOK_PROJECTION = {
    "time_embed_dim": 4 * 48, "cross_attention_dim": WIDE, "clip_embeddings_dim": WIDE,
}  # fmt: skip
BOOK_AUTOENCODER = {
    "block_out_channels": (32, 64, 96, 96), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 1, "latent_channels": 4,
    "norm_num_groups": 16, "sample_size": 64,
}  # fmt: skip


@subject("unet", BOOK, "U-Net, a step: 2 latents of 8×8×4, 32 tokens", share=True)
def book_unet() -> Two:
    return step(*unet(BOOK_UNET), 2, 8, WORDS)


@subject("decoder", BOOK, "DALL·E 2's decoder, a step: 2 pictures of 16×16, 36 tokens")
def book_decoder() -> Two:
    ours, theirs = adm(BOOK_DECODER)
    x, t, context = noise(2, 3, 16, 16), torch.tensor([500, 500]), noise(2, WORDS + 4, WIDE)
    mask, embedding = torch.arange(WORDS + 4).expand(2, -1) < 20, noise(2, 4 * 48)
    return Two(
        lambda: ours(x, t, context, embedding, mask),
        lambda: theirs(
            x, t, context, class_labels=embedding, attention_mask=mask, return_dict=False
        )[0],
    )


@subject("upsampler", BOOK, "DALL·E 2's upsampler, a step: 1 picture of 64×64")
def book_upsampler() -> Two:
    ours, theirs = adm(BOOK_UPSAMPLER)
    x, t = noise(1, 6, 64, 64), torch.tensor([500])
    return Two(lambda: ours(x, t), lambda: theirs(x, t, return_dict=False)[0])


@subject("prior", BOOK, "DALL·E 2's prior, a step: 2 embeddings of width 128")
def book_prior() -> Two:
    ours, theirs = twins(Prior(PriorConfig(**BOOK_PRIOR)), stock().PriorTransformer(**BOOK_PRIOR))
    x, t, states = noise(2, WIDE), torch.tensor([500, 500]), noise(2, WORDS, WIDE)
    mask = torch.arange(WORDS).expand(2, -1) < 20
    return Two(
        lambda: ours(x, t, x, states, mask),
        lambda: theirs(x, t, x, states, mask, return_dict=False)[0],
    )


@subject("text", BOOK, "CLIP's text tower: 2 texts of 32 tokens")
def book_text() -> Two:
    ours, theirs = text(CLIPTextProjected, BOOK_TEXT)
    texts = ids(BOOK_TEXT, 2)
    return Two(lambda: ours(texts).embedding, lambda: theirs(texts).text_embeds)


@subject("vision", BOOK, "CLIP's picture tower: 2 pictures of 64×64")
def book_vision() -> Two:
    s = stock()
    ours, theirs = twins(
        CLIPVisionProjected(CLIPVisionConfig(**BOOK_VISION)),
        s.CLIPVisionModelWithProjection(s.CLIPVisionConfig(**BOOK_VISION)),
    )
    pixels = noise(2, 3, 64, 64)
    return Two(lambda: ours(pixels).embedding, lambda: theirs(pixels).image_embeds)


@subject("autoencoder", BOOK, "Autoencoder, decoding: 1 latent of 8×8×4")
def book_autoencoder() -> Two:
    return decoding(*autoencoder(BOOK_AUTOENCODER), 8)


@subject("picture", BOOK, "Stable Diffusion, a picture: 64×64, 20 steps, guided")
def book_picture() -> Two:
    parts = text(CLIPText, BOOK_TEXT), unet(BOOK_UNET), autoencoder(BOOK_AUTOENCODER)
    return stable_diffusion(*parts, WORDS, 64, 20)


@subject("dalle2", BOOK, "DALL·E 2, a picture: 16×16, then 64×64, 10 + 10 + 4 steps, guided")
def book_dalle2() -> Two:
    s = systems.pipelines()
    networks = {
        "text_encoder": text(CLIPTextProjected, BOOK_TEXT),
        "prior": twins(Prior(PriorConfig(**BOOK_PRIOR)), s.PriorTransformer(**BOOK_PRIOR)),
        "text_proj": twins(
            TextProjection(TextProjectionConfig(**BOOK_PROJECTION)),
            s.UnCLIPTextProjModel(**BOOK_PROJECTION),
        ),
        "decoder": adm(BOOK_DECODER),
        "super_res_first": adm(BOOK_UPSAMPLER),
        "super_res_last": adm(BOOK_UPSAMPLER),
    }
    ours, theirs = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, config in systems.KARLO_SCHEDULERS.items():
            checkpoints.write_json(Path(folder) / name / "scheduler_config.json", config)
            ours[name] = Scheduler.from_pretrained(folder, name)
            theirs[name] = s.UnCLIPScheduler.from_config(config)
        ours["tokenizer"], theirs["tokenizer"] = tokenizers(WORDS, "!", folder)
    for name, (a, b) in networks.items():
        ours[name], theirs[name] = a, b
    mine = DALLE2(**ours)
    with systems.quiet():
        yours = s.UnCLIPPipeline(**theirs)
    yours.set_progress_bar_config(disable=True)

    def stock_draws() -> Tensor:
        drawn = yours(
            PROMPT, prior_num_inference_steps=10, decoder_num_inference_steps=10,
            super_res_num_inference_steps=4, generator=torch.Generator().manual_seed(1),
            output_type="np",
        ).images  # fmt: skip
        return torch.from_numpy(drawn).permute(0, 3, 1, 2)  # "pt" would be an array all the same

    return Two(lambda: mine(PROMPT, steps=(10, 10, 4), seed=1), stock_draws)


# --- Stable Diffusion's own size -----------------------------------------------------------------


@functools.cache
def life_unet() -> tuple[nn.Module, nn.Module]:
    """3.4 GB, so made once for all its rows; ``run`` lets it go."""
    known = UNetConfig.__dataclass_fields__
    return unet({k: v for k, v in published.SD_UNET.items() if k in known})


@functools.cache
def life_text() -> tuple[nn.Module, nn.Module]:
    known = CLIPTextConfig.__dataclass_fields__
    return text(CLIPText, {k: v for k, v in published.SD_TEXT.items() if k in known})


@functools.cache
def life_autoencoder() -> tuple[nn.Module, nn.Module]:
    known = AutoencoderConfig.__dataclass_fields__
    return autoencoder({k: v for k, v in published.SD_AUTOENCODER.items() if k in known})


@subject("life-text", LIFE, "Text encoder: 2 texts of 77 tokens")
def life_text_rows() -> Two:
    ours, theirs = life_text()
    texts = ids({"max_position_embeddings": 77, "vocab_size": 49408}, 2)
    return Two(lambda: ours(texts).states, lambda: theirs(texts).last_hidden_state)


@subject("life-unet-256", LIFE, "U-Net, a step: 1 latent of 32×32×4 (256×256)", share=True)
def life_unet_256() -> Two:
    return step(*life_unet(), 1, 32, 77)


@subject(
    "life-unet-512",
    LIFE,
    "U-Net, a step: 1 latent of 64×64×4 (512×512)",
    pairs=6,
    share=True,
)
def life_unet_512() -> Two:
    return step(*life_unet(), 1, 64, 77)


@subject("life-autoencoder-128", LIFE, "Autoencoder, decoding: 128×128 pixels", pairs=6)
def life_autoencoder_128() -> Two:
    return decoding(*life_autoencoder(), 16)


@subject("life-autoencoder-512", LIFE, "Autoencoder, decoding: 512×512 pixels", pairs=0)
def life_autoencoder_512() -> Two:
    return decoding(*life_autoencoder(), 64)


@subject("life-picture-128", LIFE, "A picture: 128×128, 2 steps, guided", pairs=6)
def life_picture_128() -> Two:
    return stable_diffusion(life_text(), life_unet(), life_autoencoder(), 77, 128, 2)


@subject("life-picture-512", LIFE, "A picture: 512×512, 2 steps, guided", pairs=0)
def life_picture_512() -> Two:
    return stable_diffusion(life_text(), life_unet(), life_autoencoder(), 77, 512, 2)


# --- what both sizes share -----------------------------------------------------------------------


def step(ours: nn.Module, theirs: nn.Module, batch: int, side: int, tokens: int) -> Two:
    """One pass of Stable Diffusion's U-Net; a guided step is a batch of two."""
    x, t = noise(batch, 4, side, side), torch.tensor([500] * batch)
    context = noise(batch, tokens, ours.config.cross_attention_dim)
    return Two(lambda: ours(x, t, context), lambda: theirs(x, t, context, return_dict=False)[0])


def decoding(ours: nn.Module, theirs: nn.Module, side: int) -> Two:
    z = noise(1, 4, side, side)
    return Two(lambda: ours.decode(z), lambda: theirs.decode(z, return_dict=False)[0])


def tokenizers(context: int, pad: str, folder: str) -> tuple[Tokenizer, Any]:
    words = Tokenizer.train(systems.CAPTIONS, size=560, context=context, pad=pad)
    words.save_pretrained(Path(folder) / "tokenizer")
    with systems.quiet():
        return words, systems.pipelines().CLIPTokenizer.from_pretrained(f"{folder}/tokenizer")


def stable_diffusion(
    encoders: tuple[nn.Module, nn.Module],
    unets: tuple[nn.Module, nn.Module],
    autoencoders: tuple[nn.Module, nn.Module],
    context: int,
    size: int,
    steps: int,
) -> Two:
    """A picture by each whole system, from the same noise, with DDIM."""
    s = systems.pipelines()
    with tempfile.TemporaryDirectory() as folder:
        words, their_words = tokenizers(context, "<|endoftext|>", folder)
        checkpoints.write_json(Path(folder) / "scheduler_config.json", systems.SD_SCHEDULER)
        scheduler = Scheduler.from_pretrained(folder)
    mine = StableDiffusion(
        scheduler=scheduler, tokenizer=words, text_encoder=encoders[0], unet=unets[0],
        vae=autoencoders[0],
    )  # fmt: skip
    with systems.quiet():
        yours = s.StableDiffusionPipeline(
            scheduler=s.DDIMScheduler.from_config(systems.SD_SCHEDULER), tokenizer=their_words,
            text_encoder=encoders[1], unet=unets[1], vae=autoencoders[1], safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    yours.set_progress_bar_config(disable=True)
    start = noise(1, 4, size // 8, size // 8)
    return Two(
        lambda: mine(PROMPT, steps=steps, sampler="ddim", latents=start, height=size, width=size),
        lambda: yours(
            PROMPT, num_inference_steps=steps, latents=start, height=size, width=size,
            output_type="pt",
        ).images,
    )  # fmt: skip


# --- measuring -----------------------------------------------------------------------------------


@torch.no_grad()
def measure(name: str, pairs: int) -> dict[str, Any]:
    """Everything about one row, as plain numbers for the stored file."""
    entry = SUBJECTS[name]
    two = entry.build()
    a, b = two.ours(), two.theirs()
    multiply, work = bench.product()
    runs = [two.ours, two.theirs, multiply][: 3 if entry.share else 2]
    ours, theirs, *products = bench.in_turn(runs, pairs)
    row: dict[str, Any] = {
        "name": name,
        "size": entry.size,
        "what": entry.what,
        "pairs": pairs,
        "ours_seconds": bench.spread([one.cpu for one in ours])._asdict(),
        "ratio": compare([x.cpu for x in ours], [y.cpu for y in theirs])._asdict(),
        "ratio_by_the_clock": compare([x.wall for x in ours], [y.wall for y in theirs])._asdict(),
        "greatest_difference": (a - b).abs().max().item(),
        "greatest_value": b.abs().max().item(),
    }
    held = [x.memory for x in ours], [y.memory for y in theirs]
    if all(map(all, held)):  # the system tells, and there was something to hold
        row["ours_bytes"] = bench.spread(held[0])._asdict()
        row["memory_ratio"] = compare(*held)._asdict()
    if products:
        row["flops"] = bench.flops(two.ours)
        speeds = [work / one.cpu for one in products[0]]
        shares = [row["flops"] / x.cpu / peak for x, peak in zip(ours, speeds, strict=True)]
        row["product_flops_a_second"] = bench.spread(speeds)._asdict()
        row["share_of_product"] = bench.spread(shares)._asdict()
    return row


def compare(ours: Sequence[float], theirs: Sequence[float]) -> bench.Spread:
    """How many times ours' cost theirs is, pair by pair."""
    return bench.spread([b / a for a, b in zip(ours, theirs, strict=True)])


def rows(pairs: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """Measure; Stable Diffusion's weights are made once for all its rows, and then let go."""
    for name, count in pairs.items():
        yield measure(name, count)
        gc.collect()
    for made in (life_unet, life_text, life_autoencoder):
        made.cache_clear()


# --- telling -------------------------------------------------------------------------------------

HEAD = (
    f"{'':<66}{'ours':>10}  {'theirs / ours: processor time':<31}{'clock':<7}"
    f"{'ours holds; theirs / ours':<28}{'differ by':>10}  low end"
)


def line(row: dict[str, Any]) -> str:
    """One row of the printed table."""
    r, clock = row["ratio"], row["ratio_by_the_clock"]["median"]
    took = row["ours_seconds"]["median"]
    bars = [(BAR[row["size"]], "bar"), (AIM.get(row["size"]), "aim")]
    held = "not measured"
    if "memory_ratio" in row:
        m = row["memory_ratio"]
        held = f"{row['ours_bytes']['median'] / 1e6:.1f} MB  "
        held += f"{m['median']:.2f} [{m['low']:.2f}, {m['high']:.2f}]"
    text = f"{row['what']:<66}"
    text += f"{took * 1e3:>7.1f} ms  " if took < 1 else f"{took:>8.2f} s  "
    interval = f"{r['median']:.2f} [{r['low']:.2f}, {r['high']:.2f}] of {row['pairs']}"
    text += f"{interval:<31}{clock:<7.2f}{held:<28}{row['greatest_difference']:>10.1e}  "
    text += ", ".join(
        f"{name} {value} {'met' if r['low'] >= value else 'missed'}"
        for value, name in bars
        if value
    )
    if "share_of_product" in row:
        share, speed = row["share_of_product"], row["product_flops_a_second"]["median"]
        text += (
            f"\n    {row['flops'] / 1e9:.2f} GFLOP at {share['median']:.0%}"
            f" [{share['low']:.0%}, {share['high']:.0%}] of a matrix product's"
            f" {speed / 1e9:.0f} GFLOP/s"
        )
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make.py bench", description=__doc__.splitlines()[0])
    known = [*bench.BENCHMARKS, *SUBJECTS]
    parser.add_argument("names", nargs="*", metavar="ROW", help=", ".join(known))
    parser.add_argument("--whole", action="store_true", help="30 pairs at 512×512 pixels too")
    parser.add_argument("--store", action="store_true", help=f"write book/results/{STORED.name}")
    asked = parser.parse_args(arguments)
    if unknown := [name for name in asked.names if name not in known]:
        parser.error(f"there is no row {unknown[0]!r}; there are: {', '.join(known)}")
    if asked.store and asked.names:
        parser.error("--store writes all rows; name none.")
    own = [name for name in asked.names if name in bench.BENCHMARKS]
    if own or not asked.names:
        bench.main(own)
        print()
    names = [name for name in asked.names or SUBJECTS if name in SUBJECTS]
    counts = {name: SUBJECTS[name].pairs for name in names}
    if asked.whole or asked.names:  # what is named is done, however long it takes
        counts = {n: SUBJECTS[n].whole if asked.whole else k or 6 for n, k in counts.items()}
    counts = {name: pairs for name, pairs in counts.items() if pairs}
    if not counts:
        return 0
    libraries = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    busy = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    print(
        f"theirs: {', '.join(f'{name} {number}' for name, number in libraries.items())}. Median of"
        " pairs in alternating\norder, and its interval of 95 % or a little more. Processor time"
        " decides: the clock also\ncounts waiting for other programs"
        + (f" ({busy} want to run now, on {os.cpu_count()} cores)." if busy is not None else ".")
    )
    print(HEAD)
    found, size = [], None
    with systems.quiet():  # the stock pipelines warn of much
        for row in rows(counts):
            if row["size"] != size:
                size = row["size"]
                print(f"{size} ({SHOWN[size]})")
            print(line(row), flush=True)
            found.append(row)
    if asked.store:
        head = {
            "name": "bench",
            "about": "Time and memory of ours and of the stock libraries, ratios theirs / ours",
            "command": "python make.py bench --store" + (" --whole" if asked.whole else ""),
            "date": datetime.date.today().isoformat(),
            "machine": hardware(torch.device("cpu")),
            "load": busy,
            **libraries,
        }
        checkpoints.write_json(STORED, head | {"rows": found})
        print(f"Written: {STORED}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
