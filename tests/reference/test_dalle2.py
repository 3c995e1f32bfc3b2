"""DALL·E 2 against the stock unCLIP pipelines: same folder, same noise, every step, float64."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from scipy.spatial import geometric_slerp

import companion
from companion.adm import ADMUNet
from companion.checkpoints import CheckpointError
from companion.clip import normalise
from companion.dalle2 import DALLE2
from companion.schedule import Schedule
from companion.scheduler import Scheduler
from reference.oracle import TOLERANCE, distance
from reference.systems import (
    CAPTIONS,
    KARLO,
    KARLO_EYE,
    KARLO_SCHEDULERS,
    build,
    corrupt,
    exact,
    karlo,
    perturb,
    pipelines,
    quiet,
    write_json,
    write_karlo,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # the stock pipelines are deprecated, and say so
STEPS = (4, 4, 3)


@pytest.fixture(scope="module")
def s():
    return pipelines()


@pytest.fixture(scope="module")
def parts():
    return karlo()


@pytest.fixture(scope="module")
def folders(s, parts, tmp_path_factory):
    return {
        name: write_karlo(tmp_path_factory.mktemp(name), parts, name == "images")
        for name in ("texts", "images")
    }


@pytest.fixture(scope="module")
def ours(folders):
    return {n: DALLE2.from_pretrained(f, dtype=torch.float64) for n, f in folders.items()}


def opened(s, folder, kind="UnCLIPPipeline"):
    with quiet():
        cls = getattr(s, kind)
        return exact(cls.from_pretrained(folder, torch_dtype=torch.float64, local_files_only=True))


@pytest.fixture(scope="module")
def theirs(s, folders):
    return {
        "texts": opened(s, folders["texts"]),
        "images": opened(s, folders["images"], "UnCLIPImageVariationPipeline"),
    }


def gen(seed=3):
    return torch.Generator().manual_seed(seed)


def picture(seed: int, n: int = 1, size: int = 28) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=gen(seed), dtype=torch.float64)


def run_stock(pipe, steps=STEPS, **options):
    """What every step of every walk starts from, where the last one ends, and the picture."""
    states, ends = [], []
    schedulers = {id(x): x for n in KARLO_SCHEDULERS if (x := getattr(pipe, n, None))}
    for scheduler in schedulers.values():

        def record(output, timestep, sample, step=scheduler.step, **more):
            out = step(output, timestep, sample, **more)
            states.append((sample, out.pred_original_sample))
            ends.append(out.prev_sample)
            return out

        scheduler.step = record
    names = ("prior", "decoder", "super_res")[-len(steps) :]
    counts = {f"{n}_num_inference_steps": k for n, k in zip(names, steps, strict=True)}
    try:
        with quiet():
            out = pipe(output_type="np", **counts, **options)
    finally:
        for scheduler in schedulers.values():
            del scheduler.step
    return states, ends[-1], torch.from_numpy(out.images).permute(0, 3, 1, 2)


def run_ours(draw, pipe, *args, steps=STEPS, **options):
    states, ends, large = [], [], pipe.draw_large

    def record(*args):
        ends.append(large(*args))
        return ends[-1]

    pipe.draw_large = record
    try:
        out = draw(*args, steps=steps, callback=lambda i, t, *seen: states.append(seen), **options)
    finally:
        del pipe.draw_large
    return states, ends[-1], out


def same(ours, theirs, unclipped=False) -> None:
    assert len(ours[0]) == len(theirs[0])
    for i, (a, b) in enumerate(zip(ours[0], theirs[0], strict=True)):
        assert distance(a[0], b[0]) < TOLERANCE, f"before step {i}"
        assert distance(a[1], b[1]) < TOLERANCE, f"clean picture of step {i}"
    assert distance(ours[1], theirs[1]) < TOLERANCE, "unclamped"
    assert (ours[2] - theirs[2]).abs().max() < 1e-6, "picture (stock's is float32)"
    # Networks that know nothing push many pixels to the scheduler's limit, -1 or 1; see the test
    # without limits for what is behind them.
    unclamped = theirs[1]
    assert unclamped.std() > 0.05 and (unclipped or (unclamped.abs() >= 1).double().mean() < 0.4)


# --- words to pictures ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_images_per_prompt": 2},
        {"guidance_scale": 1.0},
        {"prior_guidance_scale": 1.0},
        {"guidance_scale": 1.0, "prior_guidance_scale": 1.0},
        {"guidance_scale": 3.5, "prior_guidance_scale": 2.0, "steps": (5, 2, 4)},
    ],
    ids=str,
)
def test_words_to_pictures(theirs, ours, how):
    a = run_ours(ours["texts"], ours["texts"], CAPTIONS[:2], generator=gen(), **how)
    how = {k.replace("guidance", "decoder_guidance") if k == "guidance_scale" else k: v
           for k, v in how.items()}  # fmt: skip
    same(a, run_stock(theirs["texts"], prompt=CAPTIONS[:2], generator=gen(), **how))


def test_nothing_hides_behind_the_limits(s, folders, tmp_path):
    """The same without clipping, so that every value of every network counts."""
    shutil.copytree(folders["texts"], tmp_path / "x")
    for name, config in KARLO_SCHEDULERS.items():
        path = tmp_path / "x" / name / "scheduler_config.json"
        write_json(path, config | {"clip_sample": False})
    mine = DALLE2.from_pretrained(tmp_path / "x", dtype=torch.float64)
    a = run_ours(mine, mine, CAPTIONS[:2], generator=gen())
    b = run_stock(opened(s, tmp_path / "x"), prompt=CAPTIONS[:2], generator=gen())
    same(a, b, unclipped=True)
    assert max(x.abs().max() for _, x in b[0]) > 10, "else there were no limits to lift"


def test_one_prompt_and_given_latents(theirs, ours):
    shapes = ((1, 24), (1, 3, 16, 16), (1, 3, 32, 32))
    z = [torch.randn(n, generator=gen(i), dtype=torch.float64) for i, n in enumerate(shapes)]
    a = run_ours(ours["texts"], ours["texts"], CAPTIONS[0], generator=gen(), latents=z)
    b = run_stock(
        theirs["texts"], prompt=CAPTIONS[0], generator=gen(), prior_latents=z[0],
        decoder_latents=z[1], super_res_latents=z[2],
    )  # fmt: skip
    same(a, b)


def test_a_generator_each(theirs, ours):
    how = {"generator": [gen(), gen(4)]}
    a = run_ours(ours["texts"], ours["texts"], CAPTIONS[:2], **how)
    how = {"generator": [gen(), gen(4)]}
    same(a, run_stock(theirs["texts"], prompt=CAPTIONS[:2], **how))
    alone = run_ours(ours["texts"], ours["texts"], CAPTIONS[1], generator=[gen(4)])
    assert distance(a[2][1:], alone[2]) < TOLERANCE


def test_more_candidates_fit_the_words_better(ours):
    """The embedding that goes on is the best of those drawn, by its dot product with the text's."""
    pipe = ours["texts"]
    words, null = pipe.encode_prompts(CAPTIONS[:2]), pipe.encode_prompts(["", ""])
    walk = pipe._plan(("prior",), (4,), None, None, None, None)[0]
    one = pipe.draw_embedding(words, null, walk, 4.0, 1, gen())
    z = torch.randn(10, 24, generator=gen(7), dtype=torch.float64)
    drawn = []
    best = pipe.draw_embedding(
        words, null, walk._replace(latents=z), 4.0, 5, gen(), lambda i, t, x, x0: drawn.append(x0)
    )
    assert best.shape == one.shape == (2, 24)
    every = pipe.prior.restore(drawn[-1]).unflatten(0, (2, 5))  # the last step goes to x0 itself
    fits = torch.einsum("bkd,bd->bk", every, words.embedding)
    assert torch.allclose((best * words.embedding).sum(1), fits.max(dim=1).values)
    assert (fits.max(dim=1).values > fits[:, 0]).any(), "else there was nothing to choose"


@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun", "dpmpp_2m"])
def test_other_samplers_draw_something_else_from_the_same_noise(ours, sampler):
    usual = ours["texts"](CAPTIONS[0], steps=(6, 6, 4), seed=1)
    other = ours["texts"](CAPTIONS[0], steps=(6, 6, 4), seed=1, sampler=sampler)
    assert other.shape == usual.shape and torch.isfinite(other).all()
    assert distance(other, usual) > 1e-3


def test_sizes_follow_the_upsampler(ours):
    x = ours["texts"](CAPTIONS[0], steps=(2, 2, 2), seed=1, height=64, width=48)
    assert x.shape == (1, 3, 64, 48)


def test_a_negative_prompt_stands_where_nothing_stood(ours):
    how = {"steps": (2, 2, 2), "seed": 1}
    plain = ours["texts"](CAPTIONS[0], **how)
    assert torch.equal(ours["texts"](CAPTIONS[0], negative_prompt="", **how), plain)
    assert distance(ours["texts"](CAPTIONS[0], negative_prompt="snow", **how), plain) > 1e-4


# --- pictures to pictures ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", [{}, {"num_images_per_prompt": 2}, {"guidance_scale": 1.0}], ids=str
)
def test_variations(theirs, ours, how):
    pipe, image = ours["images"], picture(1, 2)
    a = run_ours(pipe.variations, pipe, image, steps=(4, 3), generator=gen(), **how)
    how = {k.replace("guidance", "decoder_guidance"): v for k, v in how.items()}
    # Given a tensor, stock takes it for what its feature extractor would have made of a picture.
    b = run_stock(theirs["images"], (4, 3), image=normalise(image), generator=gen(), **how)
    same(a, b)


def test_pictures_of_another_size_are_scaled(ours):
    pipe = ours["images"]
    smooth = torch.linspace(0, 1, 56, dtype=torch.float64).expand(1, 3, 56, 56).contiguous()
    there = torch.nn.functional.interpolate(smooth, (28, 28), mode="area")
    apart = (pipe.encode_image(smooth) - pipe.encode_image(there)).abs().max()
    assert apart < 0.05 * pipe.encode_image(there).abs().max()
    with pytest.raises(ValueError, match="image has shape"):
        pipe.variations(picture(1)[:, :, :20])


def test_pictures_are_prepared_as_stock_prepares_them(s, ours):
    """Stock takes bytes and rounds to bytes after scaling: half a level, at most one."""
    size = 50
    wave = torch.linspace(0, 9, size).sin()
    picture = ((wave[:, None] * wave + torch.arange(3.0)[:, None, None] / 3 + 1) * 80).byte()
    theirs = s.CLIPImageProcessor(**KARLO_EYE)(images=picture.numpy(), return_tensors="pt")
    mine = ours["images"].feature_extractor(picture[None] / 255, 28)
    apart = (mine - theirs.pixel_values).abs().max().item()
    assert apart < 1.01 / 255 / 0.2613, f"{apart * 255 * 0.2613:.2f} levels"
    assert mine.std() > 0.5


# --- between pictures, and told in words ---------------------------------------------------------


@torch.no_grad()
def decoder_by_hand(pipe, z, scale):
    """What stock's own modules say of the noise in small pictures, at places z, told nothing."""
    n = len(z)
    pooled, states, mask = pipe._encode_prompt([""] * n, "cpu", 1, scale > 1)
    context, added = pipe.text_proj(
        image_embeddings=z, prompt_embeds=pooled, text_encoder_hidden_states=states,
        do_classifier_free_guidance=scale > 1,
    )  # fmt: skip
    mask = torch.nn.functional.pad(mask, (4, 0), value=True)

    @torch.no_grad()
    def noise_in(x, t):
        answer = pipe.decoder(
            torch.cat([x] * (2 if scale > 1 else 1)), t, encoder_hidden_states=context,
            class_labels=added, attention_mask=mask,
        ).sample[:, :3]  # fmt: skip
        if scale > 1:
            null, given = answer.chunk(2)
            answer = null + scale * (given - null)
        return answer

    return noise_in


ABAR = Schedule.cosine().alphas_cumprod


def ddim_by_hand(noise_in, x, timesteps):
    """DDIM eq. 12 with eta 0 and clean pictures clipped, as ADM's code steps."""
    for t, after in zip(timesteps, [*timesteps[1:], None], strict=True):
        a, b = ABAR[t], torch.tensor(1.0) if after is None else ABAR[after]
        clean = ((x - (1 - a).sqrt() * noise_in(x, t)) / a.sqrt()).clamp(-1, 1)
        x = b.sqrt() * clean + (1 - b).sqrt() * (x - a.sqrt() * clean) / (1 - a).sqrt()
    return x


@torch.no_grad()
def enlarge_by_hand(pipe, small, noise, timesteps):
    blurred = torch.nn.functional.interpolate(
        small.clamp(-1, 1), (32, 32), mode="bicubic", align_corners=False, antialias=True
    )

    def noise_in(x, t):
        unet = pipe.super_res_last if t == timesteps[-1] else pipe.super_res_first
        return unet(torch.cat([x, blurred], 1), t).sample

    return ddim_by_hand(noise_in, noise, timesteps)


def places(pipe, pictures):
    with torch.no_grad():
        return pipe.image_encoder(normalise(pictures)).image_embeds


def turned(a, b, shares):
    """scipy's arc between directions; lengths in a straight line."""
    lengths = [x.norm().item() for x in (a, b)]
    arc = geometric_slerp(*(x.numpy()[0] / n for x, n in zip((a, b), lengths, strict=True)), shares)
    return torch.from_numpy(arc * [[(1 - s) * lengths[0] + s * lengths[1]] for s in shares])


def test_interpolation_by_stocks_modules(theirs, ours):
    mine, stock = ours["images"], theirs["images"]
    a, b = picture(1), picture(2)
    got = run_ours(mine.interpolate, mine, a, b, 3, steps=(4, 3), guidance_scale=2.0, seed=3)
    g = gen()
    noise = [torch.randn(1, 3, n, n, generator=g, dtype=torch.float64) for n in (16, 32)]
    z = turned(places(stock, a), places(stock, b), [0, 0.5, 1])
    x = noise[0].expand(3, -1, -1, -1)
    x = ddim_by_hand(decoder_by_hand(stock, z, 2.0), x, [999, 666, 333, 0])
    x = enlarge_by_hand(stock, x, noise[1].expand(3, -1, -1, -1), [999, 500, 0])
    assert distance(got[1], x) < TOLERANCE
    assert distance(got[1][0], got[1][2]) > 1e-3, "two pictures, two places"


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_inversion_by_stocks_modules(theirs, ours, scale):
    """From the clean end: each step asks where it comes from, then where that leads."""
    image = picture(1, 2)
    z, x_T = ours["images"].invert(image, steps=4, guidance_scale=scale)
    assert distance(z, places(theirs["images"], image)) < TOLERANCE
    noise_in = decoder_by_hand(theirs["images"], z, scale)
    x = torch.nn.functional.interpolate(
        image, (16, 16), mode="bicubic", align_corners=False, antialias=True
    )
    x = 2 * x.clamp(0, 1) - 1
    before = torch.tensor(1.0)
    for t in (0, 250, 500, 750):
        guess = x
        for _ in range(2):
            noise = noise_in(guess, t)
            clean = (x - (1 - before).sqrt() * noise) / before.sqrt()
            guess = ABAR[t].sqrt() * clean + (1 - ABAR[t]).sqrt() * noise
        x, before = guess, ABAR[t]
    assert distance(x_T, x) < TOLERANCE


def test_text_diffs_by_stocks_modules(theirs, ours):
    mine, stock = ours["images"], theirs["images"]
    image, x_T = picture(1), torch.randn(1, 3, 16, 16, generator=gen(9), dtype=torch.float64)
    got = run_ours(
        mine.text_diff, mine, image, *CAPTIONS[:2], 3, theta=0.4, steps=(4, 3), seed=3,
        latents=(x_T, None),
    )  # fmt: skip
    with torch.no_grad(), quiet():
        said = [stock._encode_prompt([c], "cpu", 1, False)[0] for c in CAPTIONS[:2]]
    change = said[1] / said[1].norm() - said[0] / said[0].norm()
    z = places(stock, image)
    z = turned(z, change / change.norm() * z.norm(), [0, 0.2, 0.4])
    x = x_T.expand(3, -1, -1, -1)
    x = ddim_by_hand(decoder_by_hand(stock, z, 1.0), x, [750, 500, 250, 0])
    noise = torch.randn(1, 3, 32, 32, generator=gen(), dtype=torch.float64)
    x = enlarge_by_hand(stock, x, noise.expand(3, -1, -1, -1), [999, 500, 0])
    assert distance(got[1], x) < TOLERANCE
    assert distance(got[1][0], got[1][2]) > 1e-3, "the words moved it"


# --- one folder for everything -------------------------------------------------------------------


SECOND = {"clip_sample_range": 0.9}  # a scheduler of its own; and the first upsampler clips nothing


@pytest.fixture(scope="module")
def whole(s, ours, tmp_path_factory):
    """Words and pictures in, and a second upsampler, in one folder that we wrote."""
    config = KARLO["super_res_first"] | {"block_out_channels": [32, 64], "sample_size": 64}
    config |= {
        "down_block_types": ["ResnetDownsampleBlock2D"] * 2,
        "up_block_types": ["ResnetUpsampleBlock2D"] * 2,
    }
    second = build(s.UNet2DModel, config, 19)
    folder = tmp_path_factory.mktemp("second")
    with quiet():
        second.save_pretrained(folder)
    eye = ("image_encoder", "feature_extractor")
    parts = {n: getattr(ours["texts"], n) for n in DALLE2.parts if n not in eye}
    for name, change in (("", {"clip_sample": False}), ("_second", SECOND)):
        where = folder / f"super_res{name}_scheduler"
        config = KARLO_SCHEDULERS["super_res_scheduler"] | change
        write_json(where / "scheduler_config.json", config)
        parts[where.name] = Scheduler.from_pretrained(where)
    parts |= {n: getattr(ours["images"], n) for n in eye}
    parts["super_res_second"] = ADMUNet.from_pretrained(folder, dtype=torch.float64)
    root = DALLE2(**parts).save_pretrained(tmp_path_factory.mktemp("whole"))
    return root, DALLE2.from_pretrained(root, dtype=torch.float64), second


def test_one_folder_opens_in_both_stock_pipelines(s, whole):
    """Each takes what it knows and draws what ours draws, without the second upsampler."""
    root, mine, _ = whole
    index = json.loads((root / "model_index.json").read_text())
    assert index["_class_name"] == "UnCLIPPipeline"
    assert index["super_res_second"] == ["diffusers", "UNet2DModel"]
    assert DALLE2.check(root) == []
    short = DALLE2(**{n: getattr(mine, n) for n in DALLE2.parts if "second" not in n})
    b = run_stock(opened(s, root), prompt=CAPTIONS[0], generator=gen())
    same(run_ours(short, short, CAPTIONS[0], generator=gen()), b, unclipped=True)
    pipe = opened(s, root, "UnCLIPImageVariationPipeline")
    b = run_stock(pipe, (4, 3), image=normalise(picture(1)), generator=gen())
    a = run_ours(short.variations, short, picture(1), steps=(4, 3), generator=gen())
    same(a, b, unclipped=True)


@torch.no_grad()
def test_the_second_upsampler_by_stocks_modules(s, whole):
    _, mine, second = whole
    walks, large = [], mine.draw_large
    mine.draw_large = lambda *a, **k: walks.append(large(*a, **k)) or walks[-1]
    x = torch.randn(1, 3, 64, 64, generator=gen(9), dtype=torch.float64)
    how = {"steps": (2, 2, 3, 4), "generator": gen(), "latents": (None, None, None, x)}
    try:
        drawn = mine(CAPTIONS[0], **how)
        other = mine.variations(picture(1), steps=(2, 2, 2), seed=1)
    finally:
        del mine.draw_large
    assert [w.shape[-1] for w in walks] == [32, 64, 32, 64] and other.shape == (1, 3, 64, 64)

    blurred = torch.nn.functional.interpolate(
        walks[0].clamp(-1, 1), (64, 64), mode="bicubic", align_corners=False, antialias=True
    )
    assert walks[0].abs().max() > 1, "else nothing is clamped in between"
    scheduler = s.UnCLIPScheduler.from_config(KARLO_SCHEDULERS["super_res_scheduler"] | SECOND)
    exact(SimpleNamespace(super_res_scheduler=scheduler, set_progress_bar_config=lambda **_: None))
    scheduler.set_timesteps(4)
    g = gen()  # as far as the three walks before have drawn: a start, and all steps but the last
    for shape, steps in (((1, 24), 2), ((1, 3, 16, 16), 2), ((1, 3, 32, 32), 3)):
        for _ in range(steps):
            torch.randn(shape, generator=g, dtype=torch.float64)
    steps = scheduler.timesteps.tolist()
    for t, after in zip(steps, [*steps[1:], None], strict=True):
        answer = second(torch.cat([x, blurred], 1), t).sample
        x = scheduler.step(answer, t, x, prev_timestep=after, generator=g).prev_sample
    assert distance(walks[1], x) < TOLERANCE
    assert distance(drawn, (x / 2 + 0.5).clamp(0, 1)) < TOLERANCE


def test_the_second_upsampler_moves_the_picture(whole):
    root, mine, _ = whole
    how = {"steps": (2, 2, 2, 2), "seed": 1}
    before = mine(CAPTIONS[0], **how)
    other = DALLE2.from_pretrained(root, dtype=torch.float64)
    perturb(other.super_res_second)
    assert (other(CAPTIONS[0], **how) - before).abs().max() > 1e-6
    assert mine(CAPTIONS[0], height=32, width=96, **how).shape == (1, 3, 32, 96)
    with pytest.raises(ValueError, match="4 values, for prior, decoder, upsampler, second ups"):
        mine(CAPTIONS[0], steps=(2, 2, 2))
    with pytest.raises(ValueError, match="height is 40; .* at 16/64, 32/64, 64/64 of it"):
        mine(CAPTIONS[0], height=40)


@pytest.mark.parametrize(("what", "said"), [("no folder", "There is no folder"),
                                            ("pickle", "as a pickle only")])  # fmt: skip
@pytest.mark.parametrize("part", ["super_res_second", "image_encoder"])
def test_parts_that_stock_overlooks_are_missed_here(whole, tmp_path, what, said, part):
    folder = corrupt(whole[0], tmp_path / "x", what, part)
    with pytest.raises(CheckpointError, match=said) as error:
        DALLE2.from_pretrained(folder)
    assert str(folder / part) in str(error.value) and len(DALLE2.check(folder)) == 1


def test_a_second_upsampler_of_another_kind_is_refused(whole):
    parts = {n: getattr(whole[1], n) for n in DALLE2.parts}
    with pytest.raises(ValueError, match="an upsampler has 3 channels in and 6 out; expected 6"):
        DALLE2(**parts | {"super_res_second": parts["decoder"]})
    with pytest.raises(ValueError, match="super_res_second and super_res_second_scheduler go"):
        DALLE2(**parts | {"super_res_second_scheduler": None})


# --- each part counts ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    ["text_encoder", "prior", "text_proj", "decoder", "super_res_first", "super_res_last"],
)
def test_every_part_moves_the_picture(folders, ours, part):
    how = {"steps": (3, 3, 3), "seed": 1}
    before = ours["texts"](CAPTIONS[0], **how)
    other = DALLE2.from_pretrained(folders["texts"], dtype=torch.float64)
    assert torch.equal(other(CAPTIONS[0], **how), before)
    perturb(getattr(other, part))
    assert (other(CAPTIONS[0], **how) - before).abs().max() > 1e-6


def test_the_picture_encoder_moves_the_variation(folders, ours):
    how = {"steps": (3, 3), "seed": 1}
    before = ours["images"].variations(picture(1), **how)
    other = DALLE2.from_pretrained(folders["images"], dtype=torch.float64)
    perturb(other.image_encoder)
    assert (other.variations(picture(1), **how) - before).abs().max() > 1e-6


# --- folders -------------------------------------------------------------------------------------


def test_stock_opens_what_we_save_and_draws_the_same(s, ours, tmp_path):
    folder = ours["texts"].save_pretrained(tmp_path / "texts")
    pipe = opened(s, folder)
    b = run_stock(pipe, prompt=CAPTIONS[:2], generator=gen())
    same(run_ours(ours["texts"], ours["texts"], CAPTIONS[:2], generator=gen()), b)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["text_proj"] == ["unclip", "UnCLIPTextProjModel"], "Karlo's spelling"
    folder = ours["images"].save_pretrained(tmp_path / "images")
    pipe = opened(s, folder, "UnCLIPImageVariationPipeline")
    b = run_stock(pipe, (4, 3), image=normalise(picture(1)), generator=gen())
    mine = ours["images"]
    same(run_ours(mine.variations, mine, picture(1), steps=(4, 3), generator=gen()), b)


def test_we_open_what_stock_saves_today(theirs, ours, tmp_path):
    with quiet():
        theirs["texts"].save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    mine = DALLE2.from_pretrained(tmp_path, dtype=torch.float64)
    b = run_stock(theirs["texts"], prompt=CAPTIONS[0], generator=gen())
    same(run_ours(mine, mine, CAPTIONS[0], generator=gen()), b)
    assert index["text_proj"][1] == "UnCLIPTextProjModel"


def test_exported_where_readers_look_for_it():
    assert companion.DALLE2 is DALLE2


@pytest.fixture(scope="module")
def saved(ours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return ours["texts"].save_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("part", ["prior", "decoder", "text_proj", "super_res_last"])
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("no weights", "holds no weights"),
        ("no config", "There is no file .*config.json"),
        ("no folder", "There is no folder"),
        ("truncated", "truncated or altered"),
        ("altered", "altered"),
        ("shape", "misshapen"),
        ("pickle", "as a pickle only"),
        ("setting", "has no setting 'some_new_setting'"),
    ],
)
def test_spoilt_folders_are_refused(saved, tmp_path, what, said, part):
    folder = corrupt(saved, tmp_path / "x", what, part)
    with pytest.raises(CheckpointError, match=said) as error:
        DALLE2.from_pretrained(folder)
    assert str(folder / part) in str(error.value)
    findings = DALLE2.check(folder)
    assert len(findings) == 1 and str(folder / part) in findings[0]


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("decoder_scheduler", {"variance_type": "fixed_small_log"}, "learned_range needs twice"),
        ("decoder_scheduler", {"variance_type": "learned"}, "variance_type"),
        ("prior_scheduler", {"_class_name": "DEISMultistepScheduler"}, "DEISMultistepScheduler"),
        ("super_res_scheduler", {"beta_schedule": "sigmoid"}, "beta_schedule"),
    ],
)
def test_schedulers_that_do_not_fit_are_refused(saved, tmp_path, part, change, said):
    shutil.copytree(saved, folder := tmp_path / "x")
    write_json(folder / part / "scheduler_config.json", KARLO_SCHEDULERS[part] | change)
    with pytest.raises(ValueError, match=said):
        DALLE2.from_pretrained(folder)
    assert len(DALLE2.check(folder)) == 1


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"steps": (4, 4)}, "expected 3 values, for prior, decoder, upsampler"),
        ({"steps": 4}, "expected 3 values"),
        ({"steps": (4, 1, 3)}, "steps is 1"),
        ({"candidates": 0}, "candidates is 0"),
        ({"sampler": "dpm"}, "sampler is 'dpm'"),
        ({"latents": [None]}, "latents is"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"height": 40}, "height is 40"),
        ({"prompt": " ".join(CAPTIONS)}, "truncate=True"),
        ({"seed": 1, "generator": gen()}, "both given"),
        ({"guidance_scale": 1.0, "prior_guidance_scale": 1.0, "negative_prompt": "x"}, "nothing"),
    ],
    ids=lambda x: x if isinstance(x, str) else ", ".join(x),  # the same in every process
)
def test_bad_requests_are_refused_before_any_work(ours, monkeypatch, how, said):
    def no_work(*_args, **_options):
        raise AssertionError("the prior was asked")

    monkeypatch.setattr(ours["texts"].prior, "forward", no_work)
    with pytest.raises(ValueError, match=said):
        ours["texts"](**{"prompt": CAPTIONS[0], "steps": STEPS} | how)


def test_each_folder_draws_what_it_can(ours):
    with pytest.raises(ValueError, match="no prior"):
        ours["images"](CAPTIONS[0])
    with pytest.raises(ValueError, match="no image_encoder"):
        ours["texts"].variations(picture(1))
