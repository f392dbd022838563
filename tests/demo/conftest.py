from pathlib import Path

import pytest
from assets import smollm2_folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return smollm2_folder()
