"""What several files of tests of adapters share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.adapted import Saved


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Saved]:
    """Return what makes, once, a trained and saved adapter of a method on a saved base model."""
    # here, since tests that have no adapters need not wait for PEFT
    import torch
    from peft import get_peft_model

    from tests.support.adapted import Saved, base_model, config_for, load_base, logits_of, train

    home = tmp_path_factory.mktemp("adapters")
    made: dict[tuple[str, str], Saved] = {}

    def make(method: str, family: str) -> Saved:
        if (method, family) not in made:
            base = home / family
            if not base.exists():
                base_model(family).save_pretrained(base)
            model = load_base(base, family)
            before = logits_of(model)
            torch.manual_seed(3)
            model = get_peft_model(model, config_for(method))
            train(model)
            directory = home / f"{method}-{family}"
            model.save_pretrained(directory)
            made[method, family] = Saved(directory, base, before, logits_of(model), model)
        return made[method, family]

    return make
