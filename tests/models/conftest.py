import pytest
from small_model import build, make_batch


@pytest.fixture
def batch():
    return make_batch()


@pytest.fixture
def model():
    return build().eval()
