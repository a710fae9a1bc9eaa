import numpy as np
import pytest

from mpma_train.data.sampler import StudySampler, cyclic_partners

STUDIES = ["a", "a", "b", "c", "c", "c", "d", "e"]


def epoch_of(sampler, epoch):
    sampler.epoch = epoch
    return list(sampler)


def test_every_study_once_in_every_epoch():
    sampler = StudySampler(STUDIES, seed=0)
    for epoch in range(20):
        keys = epoch_of(sampler, epoch)
        assert {key // len(STUDIES) for key in keys} == {epoch}
        assert sorted(STUDIES[key % len(STUDIES)] for key in keys) == ["a", "b", "c", "d", "e"]
    assert len(sampler) == 5


def test_order_is_a_function_of_seed_and_epoch_alone():
    one, two = StudySampler(STUDIES, seed=3), StudySampler(STUDIES, seed=3)
    for epoch in range(3):
        epoch_of(one, epoch)
    assert epoch_of(one, 3) == epoch_of(two, 3)
    assert epoch_of(one, 3) != epoch_of(StudySampler(STUDIES, seed=4), 3)
    orders = {tuple(key % len(STUDIES) for key in epoch_of(one, epoch)) for epoch in range(10)}
    assert len(orders) > 5


def test_every_image_of_a_study_is_shown():
    sampler = StudySampler(STUDIES, seed=0)
    shown = {key % len(STUDIES) for epoch in range(40) for key in epoch_of(sampler, epoch)}
    assert shown == set(range(len(STUDIES)))


def test_an_epoch_that_has_begun_keeps_its_number():
    sampler = StudySampler(STUDIES, seed=0)
    iterator = iter(sampler)
    keys = [next(iterator)]
    sampler.epoch = 7
    assert [*keys, *iterator] == epoch_of(StudySampler(STUDIES, seed=0), 0)


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_pairs_give_every_study_another_ones_report(seed):
    partners = cyclic_partners(STUDIES, seed)
    given = [STUDIES[i] for i in partners]
    assert all(own != other for own, other in zip(STUDIES, given, strict=True))
    # One study's images share one report, and every study's report is given to exactly one study.
    assert len({(own, other) for own, other in zip(STUDIES, given, strict=True)}) == 5
    assert set(given) == set(STUDIES)
    np.testing.assert_array_equal(partners, cyclic_partners(STUDIES, seed))


def test_shuffled_pairs_need_two_studies():
    with pytest.raises(ValueError, match="shuffle_pairs needs at least two studies"):
        cyclic_partners(["a", "a"], 0)
