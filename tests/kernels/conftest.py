import pytest
from interpreted import kernels_package


@pytest.fixture
def package():
    """`jumplora_kernels`: on the GPU, or interpreted."""
    with kernels_package() as package:
        yield package
