from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mpma_train.data.names import CHEXPERT_LABELS
from mpma_train.data.prepare import SYNTHETIC_PAIRS
from mpma_train.data.synthetic.images import draw
from mpma_train.data.synthetic.reports import ZONE_WORDS, write_report
from mpma_train.data.synthetic.scene import (
    COMBINATION_SHARES,
    NO_FINDING,
    SINGLE_SHARES,
    Finding,
    Scene,
    sample_build,
    sample_scene,
)
from mpma_train.data.synthetic.write import SPLIT_SHARES, plan_studies

# i2r_r@5 that `make pretrain` is to reach, as the README says.
RETRIEVAL_GOAL = 0.40


def scenes(count: int) -> list[Scene]:
    made = []
    for number in range(count):
        rng = np.random.default_rng([1, number])
        made.append(sample_scene(rng, sample_build(rng)))
    return made


def test_plan_deals_patients_to_one_split_each_with_the_asked_shares():
    studies = plan_studies(SYNTHETIC_PAIRS, 0)
    images, per_patient, splits = Counter(), Counter(), {}
    for study in studies:
        images[study["split"]] += study["images"]
        per_patient[study["patient"]] += study["images"]
        assert splits.setdefault(study["patient"], study["split"]) == study["split"]
    assert sum(images.values()) == SYNTHETIC_PAIRS
    # A patient is not cut in two: each bound between splits is off by less than one patient.
    largest = max(per_patient.values())
    for name, share in SPLIT_SHARES.items():
        assert abs(images[name] - share * SYNTHETIC_PAIRS) < largest
    assert 1 < largest and max(study["images"] for study in studies) == 2


def test_names_alone_do_not_find_the_pair():
    # Expected R@5 of a ranking that knows the finding names only, ties in random order, among the
    # held-out pairs: of n pairs with the same names, 5 of n (or all) are found.
    held_out = round(SPLIT_SHARES["test"] * SYNTHETIC_PAIRS)
    counts = Counter(frozenset(scene.labels) for scene in scenes(held_out))
    names = {
        *(frozenset([name]) for name in SINGLE_SHARES),
        *(frozenset(names) for names in COMBINATION_SHARES),
    }
    assert set(counts) == names
    # Every combination is common enough for all five places: none is found by its name alone.
    assert sum(min(5, count) for count in counts.values()) == 5 * len(names)
    assert 5 * len(names) / held_out < RETRIEVAL_GOAL


def test_reports_state_what_the_scene_holds_and_labels_follow():
    for number, scene in enumerate(scenes(300)):
        sections, labels = write_report(scene, np.random.default_rng(number))
        text = " ".join(" ".join(part) for part in sections.values()).lower()
        for finding in scene.findings:
            assert labels[finding.label] == 1.0
            assert finding.side in text
            zones = ZONE_WORDS.get(finding.zone, (finding.zone,))
            assert any(word in text for word in zones)
        opposite = {"left": "right", "right": "left"}
        sides = {finding.side for finding in scene.findings} & set(opposite)
        if len(sides) == 1 and len(scene.findings) == 1 and scene.findings[0].zone in ZONE_WORDS:
            (side,) = sides
            zone = ZONE_WORDS[scene.findings[0].zone]
            assert not any(f"{opposite[side]} {word}" in text for word in zone)
        assert labels.get(NO_FINDING) == (None if scene.findings else 1.0)
        assert set(labels) <= set(CHEXPERT_LABELS)
        assert all(labels[name] == 1.0 for name in scene.labels)


def test_reports_vary_in_words_and_have_a_report_s_length():
    texts = []
    for number, scene in enumerate(scenes(300)):
        sections, _ = write_report(scene, np.random.default_rng(number))
        texts.append(" ".join(" ".join(part) for part in sections.values()))
    lengths = [len(text.split()) for text in texts]
    assert len(set(texts)) == 300
    assert 20 <= np.percentile(lengths, 10) and np.percentile(lengths, 90) <= 65


def pair_of_images(**change):
    """The same picture with and without one finding: same random numbers, other scene."""
    base = dict(view="PA", heart_ratio=0.42, inspiration="normal", rotation="")
    build = sample_build(np.random.default_rng(2))
    without = Scene((), build, elevated_diaphragm="", **base)
    with_one = Scene((Finding(**change),), build, elevated_diaphragm="", **base)
    plain, _ = draw(without, np.random.default_rng(9))
    shown, masks = draw(with_one, np.random.default_rng(9))
    return plain, shown, masks[0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("label", ["Lung Lesion", "Lung Opacity", "Atelectasis"])
def test_finding_is_drawn_on_the_patient_s_side(label, side):
    _, shown, mask = pair_of_images(label=label, side=side, zone="mid", size="large")
    columns = np.flatnonzero(mask.any(axis=0)) / shown.shape[1]
    # The patient faces the reader: the patient's left is at the right of the image.
    assert (columns.mean() > 0.5) == (side == "left")


def test_zones_lie_above_each_other_and_sizes_grow():
    def mask(zone, size):
        return pair_of_images(label="Lung Lesion", side="right", zone=zone, size=size)[2]

    heights = [np.flatnonzero(mask(zone, "small").any(axis=1)).mean() for zone in ZONE_WORDS]
    assert heights == sorted(heights) and heights[2] - heights[0] > 30
    areas = [mask("mid", size).sum() for size in ("small", "moderate", "large")]
    assert areas[1] > 1.5 * areas[0] and areas[2] > 1.5 * areas[1]


def test_smallest_finding_shows_at_64_pixels():
    _, _, mask = pair_of_images(label="Lung Lesion", side="left", zone="upper", size="small")
    small = Image.fromarray(mask.astype(np.uint8) * 255).resize((64, 64), Image.Resampling.BOX)
    assert np.asarray(small).max() > 200
