"""Chapter 13's measurements: true pictures get full marks, and each part is held to another way."""

import numpy as np
import pytest
import torch

from companion import checkpoints, examination, repainting, samplers
from companion.autoencoder import Autoencoder
from companion.changing import apart
from companion.clip import CLIP
from companion.diffusion import GaussianMixture
from companion.preparation import Preparation
from companion.recipes.autoencoder import mean_interval, round_trip
from companion.repainting import (
    TASKS,
    Brightness,
    apart_outside,
    drawn,
    half,
    jobs,
    obeyed,
    ratio_of_spreads,
    rendered,
    slope,
    spaced,
    spread_left,
    told_otherwise,
)
from companion.schedule import Schedule
from companion.stable_diffusion import StableDiffusion, own_parts
from companion.storybook import Facts, Scene, Thing, ThingFacts, is_held_out, parse, write
from companion.tokenizer import Tokenizer
from companion.unet import UNet, UNetConfig


def gen(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipe(tiny_weights) -> StableDiffusion:
    """The shipped autoencoder, a tiny CLIP and a random U-Net: pictures of 64 x 64 of nothing."""
    clip = tiny_weights / "clip"
    config = UNetConfig(
        sample_size=8, block_out_channels=(8, 8), cross_attention_dim=32, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), layers_per_block=1,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=4,
    )  # fmt: skip
    unet = UNet.fresh(config, gen(0)).eval()
    for p in unet.parameters():
        if not p.any():
            p.data = 0.1 * torch.randn(p.shape, generator=gen(1))
    parts = own_parts(
        CLIP.from_pretrained(clip),
        Tokenizer.from_pretrained(clip),
        Preparation.from_pretrained(clip),
        Autoencoder.from_pretrained(checkpoints.WEIGHTS / "autoencoder"),
        unet,
    )
    return StableDiffusion(**parts)


@pytest.fixture
def measured(pipe, monkeypatch):
    """What the measurements open, and few steps."""
    monkeypatch.setattr(repainting, "stable_diffusion", lambda: pipe)
    monkeypatch.setattr(repainting, "SD_STEPS", 2)
    return monkeypatch


# --- drawing in parts -----------------------------------------------------------------------------


def test_parts_are_what_the_system_draws(pipe, monkeypatch):
    monkeypatch.setattr(repainting, "TOGETHER", 2)
    monkeypatch.setattr(repainting, "SD_STEPS", 3)
    texts, given = ["a red house", "the sea", "at night"], torch.rand(3, 3, 64, 64, generator=gen())
    mask = half("left").expand(3, -1, -1, -1)
    g, how = gen(5), {"steps": 3, "sampler": "dpmpp_2m", "guidance_scale": 4.0}
    wanted = [
        pipe(texts[i : i + 2], generator=g, image=given[i : i + 2], mask=mask[i : i + 2],
             strength=1.0, **how)
        for i in (0, 2)
    ]  # fmt: skip
    got = drawn(pipe, texts, seed=5, image=given, mask=mask, strength=1.0)
    assert torch.equal(got, torch.cat(wanted))
    # pasting afterwards is the system's own pasting
    g = gen(5)
    pasted = pipe(
        texts[:2], generator=g, image=given[:2], mask=mask[:2], strength=1.0, paste=True, **how
    )
    assert torch.equal(pasted, torch.where(mask[:2] > 0, got[:2], given[:2]))
    seen = drawn(pipe, [""] * 3, seed=5, image_prompt=given, guidance_scale=1.0)
    g, how = gen(5), how | {"guidance_scale": 1.0}
    wanted = [pipe(image_prompt=given[i : i + 2], generator=g, **how) for i in (0, 2)]
    assert torch.equal(seen, torch.cat(wanted)) and apart(seen, got).min() > 1e-3


def test_the_examination_asks_the_same_door(pipe, monkeypatch):
    from companion.prompts import prompts

    asked = prompts()[:2]
    draw = examination.stable_diffusion_draws(pipe, steps=2)
    texts = [p.text for p in asked]
    how = {"steps": 2, "sampler": "dpmpp_2m", "guidance_scale": 4.0, "truncate": True}
    assert torch.equal(draw(asked, gen()), pipe(texts, generator=gen(), **how))
    true = rendered([p.scene for p in asked])
    back = examination.stable_diffusion_unfolds(pipe)(asked, gen())
    assert torch.equal(back, round_trip(pipe.vae, true))
    monkeypatch.setattr(examination, "SD_STEPS", 2)
    seen = examination.stable_diffusion_returns(pipe)(asked, gen())
    del how["truncate"]
    assert torch.equal(seen, pipe(image_prompt=true, generator=gen(), **how))


# --- scenes and marks -----------------------------------------------------------------------------


def test_pairs_differ_in_something():
    pairs = told_otherwise(30, 5)
    assert len(pairs) == 30 and all(a.facts() != b.facts() for a, b in pairs)
    assert pairs == told_otherwise(40, 5)[:30]


def test_a_half_is_made_of_whole_places_of_the_latent():
    left, right = half("left"), half("right")
    for mask in (left, right):
        small = mask.view(8, 8, 8, 8).permute(0, 2, 1, 3).flatten(2)  # 8 x 8 places of 8 x 8 pixels
        assert (small.amin(2) == small.amax(2)).all()
    assert not (left * right).any() and torch.equal(left, right.flip(3))
    assert (left + right)[:, :, 8:].all() and not (left + right)[:, :, :8].any()


@pytest.mark.parametrize("task", TASKS)
def test_a_job_stays_inside_its_half(task):
    """The two true pictures differ where the mask is, and hardly anywhere else."""
    todo = jobs(40, task, 7)
    befores, afters, sides = zip(*todo, strict=True)
    masks = torch.cat([half(where) for where in sides])
    a, b = rendered(befores), rendered(afters)
    outside = apart_outside(a, b, masks)
    inside = apart_outside(a, b, 1 - masks)
    assert set(sides) == {"left", "right"}
    assert outside.max() < 0.02 and inside.min() > 0.04
    for before, after, where in todo:
        assert not is_held_out(after) and parse(write(after.facts())) == after.facts()
        kept = [t for t in before.things if t in after.things]
        assert len(kept) == (task == "add")
        new = [t for t in after.things if t not in before.things]
        assert [t.position for t in new] == ([] if task == "remove" else [where])
        assert all(n.kind != t.kind and n.colour != t.colour for n in new for t in before.things)


BEFORE = Scene("dusk", "snow", things=(Thing("cat", "red", x=0.26),), seed=4)
ADDED = Scene("dusk", "snow", things=(*BEFORE.things, Thing("car", "blue", x=0.74)), seed=4)


@pytest.mark.parametrize(
    ("seen", "wanted"),
    [
        (ADDED.facts(), (True, True)),
        (BEFORE.facts(), (False, True)),
        (None, (False, False)),
        (Facts("noon", "snow", things=ADDED.facts().things), (True, False)),
        (Facts("dusk", "snow", True, ADDED.facts().things), (True, False)),
        (Facts("dusk", "snow", things=(ThingFacts("car", "blue", "right"),)), (True, False)),
        (
            Facts("dusk", "snow", things=(ThingFacts("cat", "red", "left"),
                                          ThingFacts("car", "red", "right"))),
            (False, True),
        ),
    ],
)  # fmt: skip
def test_obeyed_inside_and_kept_outside(seen, wanted):
    assert obeyed(seen, BEFORE, ADDED, "right") == wanted


def test_what_is_removed_may_not_have_moved_to_the_middle():
    empty = Scene("dusk", "snow", seed=4)
    assert obeyed(empty.facts(), BEFORE, empty, "left") == (True, True)
    moved = Facts("dusk", "snow", things=(ThingFacts("cat", "red", "middle"),))
    assert obeyed(moved, BEFORE, empty, "left") == (False, True)


def test_differences_outside_are_counted_outside_only():
    x, y = torch.rand(2, 3, 3, 64, 64, generator=gen())
    masks = torch.cat([half("left"), half("right"), half("left")])
    got = apart_outside(x, y, masks)
    for i in range(3):
        kept = np.broadcast_to(masks[i].numpy() == 0, (3, 64, 64))
        wanted = np.sqrt(((x[i] - y[i]).numpy()[kept] ** 2).mean())
        assert got[i].item() == pytest.approx(wanted, rel=1e-5)


# --- the measurements, with answers that are known ------------------------------------------------


def test_strengths_are_ordered_as_they_should(measured):
    """At 0.3 the picture comes back, at 1 the words' own: whatever lies between is counted."""
    pairs = told_otherwise(6, repainting.STARTED_SEED)

    def ideal(pipe, texts, *, image, strength):
        return image if strength < 0.5 else rendered([b for _, b in pairs])

    measured.setattr(repainting, "drawn", ideal)
    found = repainting.image_to_image(n=6, strengths=(0.3, 1.0))
    assert [write(b.facts()) for _, b in pairs]  # what ``ideal`` was told
    low, high = found["rows"]["0.3"], found["rows"]["1"]
    assert low["of a"]["value"] == 1 and low["of b"]["value"] == 0
    assert high["of a"]["value"] == 0 and high["of b"]["value"] == 1
    assert low["distance"]["value"] == 0 < found["rows"]["round trip"]["distance"]["value"] < 0.1
    for what in ("of a", "of b"):
        assert found["least step"][what]["value"] == pytest.approx(1)
        assert found["steps"][what] == [found["least step"][what]]
    mean = high["distance"]["value"]
    assert found["least step"]["distance"]["value"] == pytest.approx(mean, rel=1e-5)


def test_a_wrong_order_is_a_negative_step(measured):
    pairs = told_otherwise(4, repainting.STARTED_SEED)
    measured.setattr(
        repainting,
        "drawn",
        lambda pipe, texts, *, image, strength: (
            image if strength == 0.6 else rendered([b for _, b in pairs])
        ),
    )
    found = repainting.image_to_image(n=4, strengths=(0.2, 0.6, 1.0))
    assert all(step["value"] < 0 for step in found["least step"].values())


def test_repainting_the_truth_is_right_everywhere(measured, pipe):
    by_text = {}
    for number, task in enumerate(TASKS):
        for _, after, _ in jobs(4, task, repainting.REPAINTED_SEED + 10 * number):
            by_text[write(after.facts())] = after

    def ideal(pipe, texts, **given):
        return rendered([by_text[text] for text in texts])

    measured.setattr(repainting, "drawn", ideal)
    found = repainting.inpainting(n=4)
    for way in ("repainted", "repainted, pasted", "the prompt alone", "true pictures"):
        assert found["rows"][f"all, {way}"]["both"]["n"] == 12
        for what in ("inside", "outside", "both"):
            assert found["rows"][f"all, {way}"][what]["value"] == 1, (way, what)
    assert found["moved outside"]["repainted, pasted"]["value"] == 0
    assert 0 < found["moved outside"]["repainted"]["value"] < 0.02
    assert 0.005 < found["moved outside"]["round trip"]["value"] < 0.1
    assert found["moved outside"]["repainted, from the round trip"]["value"] > 0.005


def test_a_picture_for_words_is_marked_fact_by_fact(measured):
    how = []

    def ideal(pipe, texts, **given):
        how.append(given)
        return given.get("image_prompt", torch.rand(len(texts), 3, 64, 64, generator=gen()))

    measured.setattr(repainting, "drawn", ideal)
    found = repainting.image_prompt(n=6, scales=(1.0, 3.0))["rows"]
    assert [h.get("guidance_scale") for h in how] == [1.0, 3.0, None]
    for name in ("the picture", "the picture for words, s = 3"):
        assert found[name]["facts"]["value"] == found[name]["all"]["value"] == 1
        assert found[name]["distance"]["value"] == 0
    assert found["its full caption"]["all"]["value"] == 0


def test_avoided_skies_are_counted(measured):
    asked = []

    def ideal(pipe, texts, *, negative_prompt):
        asked.append((texts, negative_prompt))
        sky = "noon" if negative_prompt != write(Facts(sky="noon")) else "rain"
        return rendered([Scene(sky, "desert", things=(Thing("cat", "red"),), seed=2)] * len(texts))

    measured.setattr(repainting, "drawn", ideal)
    found = repainting.negative_prompts(n=5)
    assert [said for _, said in asked] == [None, *(write(Facts(sky=s)) for s in repainting.SKIES)]
    for text in asked[0][0]:
        facts = parse(text)
        assert facts.sky is facts.place is None and len(facts.things) == 1
    assert found["rows"]["noon"]["skies"]["noon"]["value"] == 0
    assert found["rows"]["noon"]["skies"]["rain"]["value"] == 1
    assert found["rows"]["none"]["skies"]["noon"]["value"] == 1
    assert found["avoided skies"]["value"] == 0 and found["avoided skies"]["n"] == 25


@pytest.mark.slow
def test_what_is_left_of_the_measurements_runs_on_a_system_that_draws_nothing(measured):
    walks = {"dpmpp_2m": (2,), "ddim": (2, 3)}
    found = repainting.latent_steps(n=4, walks=walks)
    last = found["rows"]["ddim, 3 steps"]
    assert found["compared with"] == "ddim, 3 steps" and last["distance"]["value"] == 0
    assert last["more wholly right"] == {"value": 0, "low": 0, "high": 0}
    assert found["rows"]["dpmpp_2m, 2 steps"]["distance"]["value"] > 0
    found = repainting.mid_grey(n=6, pushed=4, pushes=(-8.0, 8.0), known=60)
    assert found["rows"]["trailing"]["sqrt abar at the start"] == pytest.approx(0.0683, abs=1e-4)
    assert found["rows"]["leading"]["sqrt abar at the start"] > 0.068
    assert set(found["pushed"]) == {"-8", "8"}


# --- brightness -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def light(pipe) -> Brightness:
    return Brightness(pipe, 150)


def test_brightness_tells_night_from_noon(light, pipe):
    skies = {
        sky: light.of(pipe, rendered([Scene(sky, place, seed=i) for i in range(4)
                                      for place in ("meadow", "desert", "woods")]))
        for sky in ("night", "noon")
    }  # fmt: skip
    assert skies["night"].max() < skies["noon"].min()
    assert light.direction.norm().item() == pytest.approx(1)
    assert light.night < light.known.mean() < light.noon
    x = torch.randn(2, 4, 8, 8, generator=gen())
    moved = x + 0.3 * light.direction.view(1, 4, 1, 1)
    torch.testing.assert_close(light(moved) - light(x), torch.full((2,), 0.3))


@pytest.mark.parametrize("places", [64, 1024])
@pytest.mark.parametrize("first", [999, 960])
def test_the_spread_that_is_left_is_that_of_an_exact_walk(places, first):
    """The mean of N places, times sqrt(N), is one number with noise of variance 1: walk it."""
    schedule, spread = Schedule.scaled_linear(), 0.6
    one = torch.ones(1, dtype=torch.float64)
    world = GaussianMixture(0 * one[:, None], spread * places**0.5 * one, one)
    steps = torch.linspace(first, 0, 400).round().unique().flip(0).long()
    x = torch.tensor([[1.0]], dtype=torch.float64)  # linear: one start tells of all
    end = samplers.ddim(lambda x, t: world.denoise(x, t, schedule), x, steps, schedule)
    wanted = end.item() / (spread * places**0.5)
    abar = schedule.alphas_cumprod[first].item()
    assert spread_left(abar, spread, places) == pytest.approx(wanted, rel=0.02)


def test_without_a_signal_nothing_is_lost():
    assert spread_left(0.0, 0.7, 4096) == 1
    assert spread_left(0.0047, 0.7, 64) > 0.9 > 0.4 > spread_left(0.0047, 0.7, 4096)


def test_other_spacings_start_elsewhere(pipe):
    starts = {
        s: spaced(pipe, s).scheduler.timesteps("ddim", 25, steps_offset=1)[0].item()
        for s in ("leading", "trailing")
    }
    assert starts == {"leading": 961, "trailing": 999}
    same = {"prompt": "a cat", "steps": 4, "seed": 1}
    a, b = (spaced(pipe, s)(**same) for s in ("leading", "trailing"))
    assert torch.equal(a, pipe(**same)) and apart(a, b).item() > 1e-4


def test_slopes_and_spreads_are_numpys():
    x = torch.randn(80, generator=gen())
    y = 0.7 * x + 0.2 * torch.randn(80, generator=gen(4))
    found = slope(x, y)
    assert found["value"] == pytest.approx(np.polyfit(x.numpy(), y.numpy(), 1)[0], rel=1e-4)
    assert found["low"] < 0.7 < found["high"] and found["high"] - found["low"] < 0.15
    ratio = ratio_of_spreads(0.5 * x, x)
    assert ratio["value"] == pytest.approx(0.5, rel=1e-6) and ratio["low"] < 0.5 < ratio["high"]
    assert mean_interval(x)["low"] < x.mean() < mean_interval(x)["high"]
