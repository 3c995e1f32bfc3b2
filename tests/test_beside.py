"""Chapter 15's measurement: counts held to counting by hand, marks to true and false pictures."""

import math
from contextlib import contextmanager
from itertools import combinations

import pytest
import tiny
import torch
from scipy import stats
from torch import nn

from companion import beside, checkpoints, examination, measure, train
from companion.attention import MultiHead
from companion.autoencoder import Autoencoder
from companion.prompts import prompts
from companion.recipes import RECIPES
from companion.recipes.encoded import SIZE
from companion.storybook import Facts, ThingFacts, render
from companion.unet import UNet, UNetConfig


def gen(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- counting by hand -----------------------------------------------------------------------------


@contextmanager
def by_hand(model: nn.Module):
    """Multiply-adds of what happens inside the block, layer by layer, from the shapes alone."""
    found = {"layers": 0, "attention": 0}

    def layer(module: nn.Module, _: tuple, out: torch.Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            each = module.in_channels // module.groups * math.prod(module.kernel_size)
        else:
            each = module.in_features
        found["layers"] += out.numel() * each

    attend = MultiHead.attend

    def counted(self, q, k, v, *rest, **more):
        found["attention"] += 2 * q.shape[0] * q.shape[1] * k.shape[1] * q.shape[2]
        return attend(self, q, k, v, *rest, **more)

    hooks = [
        m.register_forward_hook(layer)
        for m in model.modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MultiHead, "attend", counted)
        yield found
    for hook in hooks:
        hook.remove()


SMALL = UNetConfig(
    block_out_channels=(16, 24), down_block_types=("CrossAttnDownBlock2D",) * 2,
    up_block_types=("CrossAttnUpBlock2D",) * 2, layers_per_block=1, cross_attention_dim=8,
    attention_head_dim=2, norm_num_groups=4,
)  # fmt: skip


def test_a_call_is_counted_as_by_hand():
    for config, side in ((SMALL, 8), (beside.on_pixels(SMALL), 16)):
        model = UNet.fresh(config, gen())
        with torch.no_grad(), by_hand(model) as wanted:
            model(torch.randn(1, config.in_channels, side, side), 5.0, torch.randn(1, 7, 8))
        found = beside.call(config, side, (7, 8))
        assert found == {"all": sum(wanted.values()), "attention": wanted["attention"]}


def test_the_way_back_is_counted_as_by_hand():
    vae = tiny.stable_diffusion().vae
    z = torch.randn(1, 4, 4, 4)
    with torch.no_grad(), by_hand(vae) as wanted:
        vae.decode(z)
    found = beside.counted(beside.meta(beside.Unfold, vae.config), z)
    assert found == {"all": sum(wanted.values()), "attention": wanted["attention"]}


def test_convolutions_grow_as_the_area_and_attention_as_its_square():
    vae = tiny.stable_diffusion().vae.config
    rows = beside.growth(SMALL, vae, (16, 32, 64), (7, 8))
    for a, b in ((16, 32), (32, 64)):
        a, b = rows[str(a)], rows[str(b)]
        plain = [row["pixels"]["all"] - row["pixels"]["attention"] for row in (a, b)]
        assert 3.9 < plain[1] / plain[0] <= 4.0  # what the timestep and the words cost does not
        assert 11 < b["pixels"]["attention"] / a["pixels"]["attention"] < 16
    assert rows["64"]["latents"]["all"] == beside.call(SMALL, 8, (7, 8))["all"]
    # as many places: nothing differs but the channels that go in and come out
    pixels, latents = (beside.call(c, 16, (7, 8))["all"] for c in (beside.on_pixels(SMALL), SMALL))
    assert latents - pixels == 16 * 16 * 9 * 16 * 2


def test_published_configurations_have_the_published_number_of_weights():
    from reference.published import COUNTS

    for kind, config, name in (
        (UNet, beside.SD_UNET, "Stable Diffusion 1.x, U-Net"),
        (Autoencoder, beside.SD_AUTOENCODER, "Stable Diffusion 1.x, autoencoder"),
        (beside.Prior, beside.KARLO_PRIOR, "Karlo, prior"),
        (beside.ADMUNet, beside.KARLO_DECODER, "Karlo, decoder"),
        (beside.ADMUNet, beside.KARLO_UPSAMPLER, "Karlo, upsampler"),
    ):
        weights = sum(p.numel() for p in beside.meta(kind, config).parameters())
        assert weights == COUNTS[name][2]


# --- what training cost ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stable-diffusion", "upsampler-64"])
def test_a_step_is_counted_as_by_hand(name):
    found = beside.training(name)
    card = checkpoints.read_card(checkpoints.WEIGHTS / name)
    recipe = RECIPES[name]
    data = recipe.data(None)
    model, batch = train.build(recipe, data), train.draw(recipe, data, 0)
    wanted = 0
    for share, rows in ((0.8, 40), (0.2, 65)):
        if "states" in batch:
            batch["states"] = torch.zeros(recipe.batch_size, rows, 128)
        with torch.no_grad(), by_hand(model) as counts:
            recipe.loss(model, batch, data)
        wanted += share * sum(counts.values()) / recipe.batch_size
    assert found["forward"] == pytest.approx(wanted, rel=1e-9)
    assert found["trained"] == pytest.approx(3 * wanted * card["pictures"])
    assert found["parameters"] == card["parameters"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "step"),
    [("decoder", 1), *(("stable-diffusion", step) for step in (1, 2, 3, 4, 5, 6))],
)
def test_frozen_networks_are_asked_as_often_as_the_recipe_asks_them(name, step):
    """A step of the first epoch, whose pictures have not been seen before."""
    recipe = RECIPES[name]
    data, texts = recipe.data(None), []
    read = data.clip.read
    data.clip.read = lambda said: texts.append(len(said)) or read(said)
    work = beside.multiply_adds(lambda: train.draw(recipe, data, step))
    each, n = dict(beside.READS[name]), recipe.batch_size
    wanted = sum(beside.reading(what) for what, share in each.items() if share is None)
    if name == "decoder" or texts:
        wanted += beside.reading("CLIP's text tower")
    else:  # CLIP's states need no projection at the end, 128 x 128
        wanted += beside.reading("CLIP's picture tower") - 128 * 128
    assert work == n * wanted


def test_budgets_add_up_by_hand():
    rows = {
        name: {"trained": 10.0 + i, "frozen": float(i)}
        for i, name in enumerate(
            ["clip", "prior", "decoder", "upsampler-64", "language-model", "imagen",
             "imagen-upsampler", "autoencoder", "stable-diffusion", "text-encoder"]
        )
    }  # fmt: skip
    found = beside.budgets(rows)
    alone = {name: row["alone"] for name, row in found["systems"].items()}
    assert alone == {"DALL·E 2": 42, "Imagen": 60, "Stable Diffusion": 50}
    both = {name: row["with shared parts"] for name, row in found["systems"].items()}
    assert both == {"DALL·E 2": 80, "Imagen": 60, "Stable Diffusion": 88}
    assert found["greatest over least"] == {
        "alone": pytest.approx(60 / 42),
        "with shared parts": pytest.approx(88 / 60),
    }


# --- what a picture costs -------------------------------------------------------------------------


def draws(pipe):
    steps = {"DALLE2": (2, 3, 2), "Imagen": (3, 2), "StableDiffusion": 3}[type(pipe).__name__]

    def draw(some, generator):
        return pipe([p.text for p in some], steps=steps, generator=generator, truncate=True)

    return draw


@pytest.fixture
def pipes():
    return {
        "DALL·E 2": tiny.dalle2(second=False),
        "Imagen": tiny.imagen(),
        "Stable Diffusion": tiny.stable_diffusion(),
    }


def test_stages_add_up_and_count_both_halves_of_guidance(pipes):
    wanted = {
        "DALL·E 2": {"text encoder": 2, "text projection": 2, "prior": 4, "decoder": 6,
                     "upsampler": 1},
        "Imagen": {"text encoder": 2, "U-Net": 6, "upsampler": 2},
        "Stable Diffusion": {"text encoder": 2, "U-Net": 6, "autoencoder's decoder": 1},
    }  # fmt: skip
    for name, pipe in pipes.items():
        run = lambda pipe=pipe: draws(pipe)(prompts()[:1], [gen()])  # noqa: E731
        if name == "DALL·E 2":  # another network does the last step: ours is one and the same
            pipe.super_res_last = pipe.super_res_first
            wanted[name]["upsampler"] = 2
        with by_hand(nn.ModuleList(beside.networks(pipe).values())) as counts:
            run()
        found = beside.stages(pipe, run)
        asked = {stage: row["evaluations"] for stage, row in found["stages"].items()}
        assert asked == wanted[name]
        parts = sum(row["multiply_adds"] for row in found["stages"].values())
        rest = 4 * 4 * 4 * 4 if name == FIRST else 0  # the 1 x 1 convolution before the decoder
        assert found["multiply_adds"] == parts + rest
        extra = found["multiply_adds"] - rest - sum(counts.values())
        assert abs(extra) <= 0.02 * parts  # products that are no layer: logits of nothing
        assert beside.weights(pipe) == sum(
            p.numel() for m in beside.networks(pipe).values() for p in m.parameters()
        )


FIRST = beside.FIRST


@pytest.mark.slow  # some seconds on a clock
def test_the_costs_of_a_picture_are_ratios_of_turns(pipes, monkeypatch):
    made = {
        name: beside.Made(type(pipe), (), (), lambda: None, draws) for name, pipe in pipes.items()
    }
    monkeypatch.setattr(beside, "MADE", made)
    pipes["DALL·E 2"].super_res_last = pipes["DALL·E 2"].super_res_first
    found = beside.drawing(pipes, rounds=6)
    assert found[FIRST]["times the first"]["median"] == 1
    for row in found.values():
        assert row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
        assert row["multiply_adds"] > 0 and row["weights"] > 0


# --- what the pictures are worth ------------------------------------------------------------------


def test_a_third_of_the_prompts_in_the_groups_of_all():
    some = beside.asked()
    assert len(some) == 340 == len({p.text for p in some})
    for which, n in beside.SHARES.items():
        mine = [p for p in some if beside.group(p) == which]
        assert mine == [p for p in prompts() if beside.group(p) == which][:n]
    places = [prompts().index(p) for p in some]
    assert places == sorted(places)
    whole = {which: sum(beside.group(p) == which for p in prompts()) for which in beside.SHARES}
    assert all(100 * n == 34 * whole[which] for which, n in beside.SHARES.items())


def test_any_few_pictures_can_be_drawn_again(pipes):
    for pipe in pipes.values():
        all_of_them = beside.pictures(draws(pipe), 1, range(5))
        again = beside.pictures(draws(pipe), 1, [3, 1])
        torch.testing.assert_close(again, all_of_them[[3, 1]], rtol=1e-4, atol=1e-4)
        other = beside.pictures(draws(pipe), 2, [3])
        assert (other - all_of_them[3:4]).abs().max() > 1e-3


def test_intervals_over_seeds_and_over_prompts():
    runs = [{"value": v, "n": 50} for v in (0.5, 0.6, 0.7)]
    found = beside.over(runs)
    low, high = stats.t.interval(0.95, 2, 0.6, stats.sem([0.5, 0.6, 0.7]))
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    low, high = stats.binomtest(30, 50).proportion_ci(0.95, "wilson")
    wanted = {"value": 0.6, "low": low, "high": high, "n": 50}
    assert found["prompts"] == pytest.approx(wanted)
    sure = beside.over([{"value": 1.0, "n": 20}] * 3)
    assert sure["low"] == sure["high"] == 1 and sure["prompts"]["low"] < 0.9


def facts(sky="noon", place="sea", **thing):
    return Facts(sky, place, False, (ThingFacts(**thing),) if thing else ())


def test_pictures_differ_in_what_prompts_leave_open():
    open_sky = next(p for p in prompts() if p.facts.sky is None and len(p.facts.things) == 1
                    and p.facts.things[0].kind and p.facts.things[0].colour is None)  # fmt: skip
    closed = next(p for p in prompts() if p.facts.sky and p.facts.place and not p.facts.things)
    a, b = facts("noon", kind="house", colour="red"), facts("dusk", kind="house", colour="red")
    other = facts("night", kind="house", colour="blue")
    empty = facts("rain")
    for seen, sky, colour in (
        ((a, a, a), 0, 0),
        ((a, b, b), 2 / 3, 0),
        ((a, b, other), 1, 2 / 3),
        ((a, None, other), 1, 1),
        ((a, None, empty), 1, None),  # one picture with a thing: no pair
    ):
        read = [[one, one, a] for one in seen]
        found = beside.differ([open_sky, open_sky, closed], read)
        assert found["sky"]["value"] == pytest.approx(sky) and found["sky"]["n"] == 2
        if colour is None:
            assert "colour" not in found
        else:
            assert found["colour"]["value"] == pytest.approx(colour)
        assert "kind" not in found and ("place" in found) == (open_sky.facts.place is None)


def test_by_lot_is_nearly_one_less_one_over_the_options():
    for what, options in (("sky", 5), ("place", 6), ("kind", 9), ("colour", 8), ("position", 3)):
        assert beside.by_lot()[what] == pytest.approx(1 - 1 / options, abs=0.01)


@pytest.mark.slow  # the judge reads some hundred pictures
def test_true_pictures_get_full_marks_and_noise_none():
    found = beside.worth(beside.anew, (0, 1), 40)
    assert all(row["value"] > 0.9 for k, row in found["marks"].items() if k != "no scene"
               and k != "swapped")  # fmt: skip
    assert found["marks"].get("swapped", {"value": 0})["value"] == 0
    assert found["judges agree on facts"]["value"] > 0.98
    # 40 true pictures laid out anew lie nearer to the true ones than static does
    static = beside.worth(
        lambda some, g: torch.stack([torch.rand(3, SIZE, SIZE, generator=one) for one in g]),
        (0, 1), 40,
    )  # fmt: skip
    assert static["marks"]["no scene"]["value"] == 1 and static["right"] == ["0" * 40] * 2
    assert static["Fréchet distance"]["value"] > 5 * found["Fréchet distance"]["value"]
    assert static["recall"]["value"] < 0.1 < found["recall"]["value"]
    assert found["right"][0].count("1") > 36


def test_gains_are_paired_by_prompt():
    some = beside.asked()
    one = {"right": ["1" * len(some)] * 2}
    half = {"right": ["1" * len(some), "0" * len(some)]}
    found = beside.gains({"a": one, "b": half})
    assert set(found) == {"a less b"} and set(found["a less b"]) == set(beside.GROUPS)
    assert all(row == {"value": 0.5, "low": 0.5, "high": 0.5} for row in found["a less b"].values())
    bits = [int(b) for b in torch.randint(2, (len(some),), generator=gen()).tolist()]
    other = {"right": ["".join(map(str, bits))] * 2}
    found = beside.gains({"a": one, "b": other})["a less b"]["two things"]
    mine = [1 - bit for bit, p in zip(bits, some, strict=True) if beside.group(p) == (2, False)]
    assert found["value"] == pytest.approx(sum(mine) / len(mine))
    assert found["low"] < found["value"] < found["high"]


# --- the stored table -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored():
    return measure.load("side-by-side")


def test_the_stored_table_follows_from_its_own_rows(stored):
    assert stored["budgets"] == beside.budgets(stored["training"])
    systems = {name: stored["worth"][name] for name in beside.MADE}
    n = stored["prompts"]
    assert stored["gains"] == beside.gains(systems, n)
    some = beside.asked()[:n]
    for row in stored["worth"].values():
        assert len(row["right"]) == len(stored["seeds"]) == 3
        for name, which in beside.GROUPS.items():
            places = [i for i, p in enumerate(some) if beside.group(p) == which]
            runs = [sum(run[i] == "1" for i in places) / len(places) for run in row["right"]]
            assert row["marks"][name]["runs"] == pytest.approx(runs)
    for name, row in stored["drawing"].items():
        parts = sum(stage["multiply_adds"] for stage in row["stages"].values())
        assert parts == pytest.approx(row["multiply_adds"], rel=1e-5), name
    for a, b in combinations(beside.MADE, 2):
        assert f"{a} less {b}" in stored["gains"]


@pytest.mark.slow
def test_a_stored_count_and_some_stored_pictures_are_had_again(stored):
    assert stored["training"]["upsampler-64"] == beside.training("upsampler-64")
    made = beside.MADE[FIRST]
    numbers = [0, 1, 2, 3]
    shown = beside.pictures(made.draws(made.opened()), stored["seeds"][0], numbers)
    read = beside.Judge.from_pretrained().read(shown)
    some = [beside.asked()[i] for i in numbers]
    found = "".join(str(int(x)) for x in beside.right(some, read))
    assert found == stored["worth"][FIRST]["right"][0][:4]
    assert render([p.scene for p in some]).shape == shown.shape
    assert examination.TOGETHER >= len(numbers)
