"""The judge reads what is true, says "none" where there is nothing to read, and has a second."""

import math

import pytest
import torch

from companion import checkpoints, judge
from companion.judge import HEADS, NON_SCENES, NOTHING, Judge, JudgeConfig
from companion.storybook import (
    COLOURS,
    KINDS,
    POSITIONS,
    Facts,
    Scene,
    Thing,
    parse,
    render,
    sample,
)

SHIPPED = ("judge", "judge-second")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def judges() -> dict[str, Judge]:
    return {name: Judge.from_pretrained(name) for name in SHIPPED}


@pytest.fixture(scope="module")
def exams(judges) -> dict[str, dict]:
    """Scenes of a seed that neither training nor the cards have used."""
    return {name: judge.exam(reader, n=600, seed=31_415) for name, reader in judges.items()}


# ---------------------------------------------------------------- the shipped judges


@pytest.mark.parametrize("name", SHIPPED)
def test_a_judge_reads_fresh_pictures(exams, name):
    exam = exams[name]
    for what in judge.ASKED:
        assert exam[f"clean {what}"]["value"] >= 0.99, what
        for how in ("blurred", "noised", "small"):
            assert exam[f"{how} {what}"]["value"] >= 0.97, (how, what)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("kind", NON_SCENES)
def test_a_judge_knows_what_is_no_scene(exams, name, kind):
    assert exams[name][f"none: {kind}"]["value"] >= 0.95


def test_the_second_judge_agrees(exams):
    first, second = exams.values()
    for question in first:
        assert (
            abs(first[question]["value"] - second[question]["value"]) <= 0.04
            if (question.startswith("none"))
            else abs(first[question]["value"] - second[question]["value"]) <= 0.02
        ), question


def test_the_judges_are_of_two_kinds(judges):
    assert {j.config.architecture for j in judges.values()} == {"convolution", "attention"}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_card_tells_the_truth(name):
    folder = checkpoints.WEIGHTS / name
    card = checkpoints.read_card(folder)
    assert card["sha256"] == checkpoints.sha256(folder / card["file"])
    assert card["parameters"] == sum(p.numel() for p in Judge.from_pretrained(name).parameters())
    assert card["recipe"] == name and card["steps"] > 1000
    assert card["score"]["clean all"]["low"] > 0.97


def test_one_scene_is_the_same_at_every_size(judges):
    scenes = sample(150, seeded(41), held_out=None)
    reader = judges["judge"]
    large = torch.nn.functional.avg_pool2d(render(scenes, 256), 4)
    small = torch.nn.functional.interpolate(render(scenes, 16), scale_factor=4, mode="bicubic")
    for pictures in (large, render(scenes, 64), small):
        right, asked = judge.right_answers(reader.read(pictures), scenes)["all"]
        assert right / asked >= 0.98


def test_a_stream_flowing_through_the_woods_is_seen(judges):
    asked = parse("a stream flowing through the woods")
    scenes = [Scene(sky, "woods", stream=True, seed=i) for i, sky in enumerate(("noon", "night"))]
    for reader in judges.values():
        assert all(asked.holds_for(facts) for facts in reader.read(render(scenes)))


def test_reading_does_not_depend_on_the_batch(judges):
    pictures = render(sample(12, seeded(42), held_out=None))
    for reader in judges.values():
        assert reader.read(pictures) == reader.read(pictures, batch=5)


def test_values_beyond_the_range_are_clipped_and_bad_pictures_refused(judges):
    reader = judges["judge"]
    picture = render(sample(1, seeded(43)))
    assert reader.read(picture + 1e-3) == reader.read(picture)
    with pytest.raises(ValueError, match="NaN or infinite"):
        reader.read(picture * math.nan)
    with pytest.raises(ValueError, match=r"expected \(B, 3, 64, 64\)"):
        reader.read(picture[:, :, :32])
    with pytest.raises(checkpoints.CheckpointError, match="There is no folder"):
        Judge.from_pretrained("no-such-judge")
    with pytest.raises(ValueError, match="unknown judge architecture 'oracle'"):
        JudgeConfig("oracle")


# ---------------------------------------------------------------- questions, answers, marks


def test_labels_say_everything_about_a_scene():
    scene = Scene("rain", "snow", True, (Thing("cat", "white", 0.26), Thing("car", "red", 0.74)))
    row = {name: int(value) for name, value in judge.labels([scene]).items()}
    assert row["kind left"] == KINDS.index("cat") and row["colour left"] == COLOURS.index("white")
    assert row["kind middle"] == NOTHING and row["colour middle"] == -1
    assert (row["kind right"], row["stream"], row["scene"]) == (KINDS.index("car"), 1, 1)


def test_labels_of_a_caption_leave_open_what_it_does_not_say():
    row = {n: int(v) for n, v in judge.labels([parse("a red house on the left")]).items()}
    assert row["kind left"] == KINDS.index("house") and row["colour left"] == COLOURS.index("red")
    assert row["sky"] == row["place"] == row["stream"] == row["kind right"] == -1
    row = {n: int(v) for n, v in judge.labels([parse("a red house at dusk")]).items()}
    assert row["sky"] == 1 and row["kind left"] == row["kind middle"] == -1  # where is not said


def perfect(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """Logits of a judge that knows the truth."""
    answers = judge.labels(scenes)
    return {
        name: 20.0 * torch.nn.functional.one_hot(answers[name].clamp(min=0), n).float()
        for name, n in HEADS.items()
    }


def test_perfect_logits_are_read_as_the_truth():
    scenes = sample(300, seeded(44), held_out=None)
    read = judge.facts_from(perfect(scenes))
    assert read == [scene.facts() for scene in scenes]
    assert all(r == n for r, n in judge.right_answers(read, scenes).values())


def test_of_three_things_the_likeliest_two_are_read():
    logits = perfect([Scene(things=(Thing("cat", "red", 0.26), Thing("car", "blue", 0.74)))])
    logits["kind middle"] = torch.zeros(1, len(KINDS) + 1)
    logits["kind middle"][0, 0] = 0.5  # perhaps a house
    (facts,) = judge.facts_from(logits)
    assert [t.position for t in sorted(facts.things, key=lambda t: t.position)] == ["left", "right"]


def test_marks_count_each_mistake_once():
    scene = Scene("noon", "sea", things=(Thing("cat", "red", 0.5),))
    swapped = Facts("noon", "desert", things=parse("a blue cat in the middle").things)
    marks = judge.right_answers([swapped, None], [scene, scene])
    assert marks == {
        "sky": (1, 2),
        "place": (0, 2),
        "stream": (1, 2),
        "kind": (1, 2),
        "colour": (0, 2),
        "position": (1, 2),
        "all": (0, 2),
    }


def test_confusion_counts_what_was_taken_for_what():
    scene = Scene("noon", "sea", things=(Thing("cat", "red", 0.5),))
    read = [
        Facts("dusk", "sea", things=parse("a red car in the middle").things),
        None,
        scene.facts(),
    ]
    counts, names = judge.confusion(read, [scene] * 3, "kind")
    row = dict(zip(names, counts[KINDS.index("cat")].tolist(), strict=True))
    assert (row["car"], row["none"], row["cat"], sum(row.values())) == (1, 1, 1, 3)
    counts, names = judge.confusion(read, [scene] * 3, "sky")
    assert counts[0].tolist() == [1, 1, 0, 0, 0, 1] and names[-1] == "none"


def test_intervals_are_wilsons():
    z, p, n = 1.959964, 0.9, 50
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    got = judge.interval(45, 50)
    assert got["low"] == pytest.approx(middle - half, abs=1e-6)
    assert got["high"] == pytest.approx(middle + half, abs=1e-6)


# ---------------------------------------------------------------- what it is trained on


def test_blur_spreads_a_point_like_the_bell_curve():
    point = torch.zeros(1, 3, 41, 41)
    point[:, :, 20, 20] = 1.0
    spread = judge.blur(point, 2.0)[0, 0]
    x = torch.arange(41.0) - 20
    assert spread.sum().item() == pytest.approx(1.0, abs=1e-4)
    assert (spread.sum(0) * x**2).sum().item() == pytest.approx(4.0, rel=0.03)


def test_shuffling_keeps_the_pieces_and_moves_some_to_another_row():
    pictures = render(sample(30, seeded(45)))
    for patch in (8, 16, 32):
        mixed = judge.shuffled(pictures, patch, seeded(patch))
        assert torch.equal(mixed.flatten().sort().values, pictures.flatten().sort().values)
        rows = 64 // patch
        for a, b in zip(pictures, mixed, strict=True):
            bands = [x.view(3, rows, patch, 64).permute(1, 0, 2, 3).flatten(1) for x in (a, b)]
            moved = any(
                not torch.equal(p.sort().values, q.sort().values)
                for p, q in zip(*bands, strict=True)
            )
            assert moved


def test_a_training_batch_is_spoiled_in_known_shares():
    scenes = sample(64, seeded(46), held_out=None)
    batch = judge.training_batch(scenes, seeded(47))
    clean = render(scenes)
    same = (batch["pictures"] == clean).flatten(1).all(1)
    assert int(same.sum()) == 32 and int((batch["scene"] == 0).sum()) == 8
    assert not same[batch["scene"] == 0].any()
    assert batch["pictures"].min() >= 0 and batch["pictures"].max() <= 1


def test_blending_never_blends_a_picture_with_itself():
    pictures = render(sample(2, seeded(48)))
    with pytest.raises(ValueError, match="two pictures or more"):
        judge.non_scenes("blended", pictures[:1], seeded(0))
    blend = judge.non_scenes("blended", pictures, seeded(0))
    assert all((blend - p).abs().mean() > 0.02 for p in pictures)


def test_the_loss_asks_nothing_about_what_is_no_scene():
    torch.manual_seed(0)
    reader = Judge(JudgeConfig(width=8, depth=3, features=16))
    scenes = sample(8, seeded(49), held_out=None)
    answers = judge.labels(scenes)
    answers["scene"] = torch.zeros(8, dtype=torch.long)
    pictures = render(scenes)
    total, marks = judge.loss(reader, pictures, answers)
    logits = reader(pictures)["scene"]
    assert total.item() == pytest.approx(
        torch.nn.functional.cross_entropy(logits, answers["scene"]).item(), rel=1e-5
    )
    assert marks["right"] == 0


def test_every_position_has_its_heads():
    assert {name.split()[1] for name in HEADS if " " in name} == set(POSITIONS)
