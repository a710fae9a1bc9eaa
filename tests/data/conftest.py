import pytest
from mimic_layout import MimicFolder


@pytest.fixture
def mimic(tmp_path):
    """An empty layout to add studies to."""
    return MimicFolder(tmp_path / "mimic")


@pytest.fixture
def small_mimic(mimic):
    """Six readable studies: four for training, one to validate, one to test."""
    for number, split in enumerate(["train"] * 4 + ["validate", "test"]):
        mimic.add_study(f"1000003{number}", f"5041426{number}", f"{number}a2b-c{number}", split)
    return mimic
