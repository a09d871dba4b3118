"""Pushes that are stopped anywhere: the Hub has all of it or nothing, and what was to be sent is as it was."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from tests.faults.harness import CODES, SIGNALS, Figures, Server, tree_of
from tests.support.fake_hub import TOKEN, FakeHub

REPO = "me/model"
NAME = "push"


class Pushes:
    """A Hub of this process' own, and a server whose pushes go there."""

    def __init__(self, server: Server, hub: FakeHub) -> None:
        """Push once without a fault, and remember what the Hub has then."""
        self.server, self.hub = server, hub
        self.seconds = self._push()["seconds"]
        self.wanted = self._there()
        assert len(self.wanted) > 5, sorted(self.wanted)

    def _push(self, **fault: object) -> dict[str, Any]:
        self.hub.reset()
        self.hub.create(REPO)
        return self._push_again(**fault)

    def _push_again(self, **fault: object) -> dict[str, Any]:
        words = ["push", "tied", REPO, "--quiet"]
        done = self.server.ask(root=str(self.server.home), arguments=words, **fault)
        self.hub.settle()
        return done

    def _there(self) -> set[str]:
        return set(self.hub.repositories[REPO].files())

    def stop_once(self, draw: random.Random, figures: Figures, action: str) -> None:
        """Stop one push somewhere, look at what is there, and push once more."""
        before = tree_of(self.server.home / "tied")
        after_s = draw.uniform(0, 1.1 * self.seconds)
        done = self._push(signal=int(SIGNALS[action]), after_s=after_s)
        figures.counts["stopped" if done["code"] else "not stopped"] += 1
        there = self._there()
        try:
            assert done["code"] in (0, CODES[action]), f"exit {done['code']}: {done['error'][-600:]}"
            assert there in (self.wanted, {".gitattributes"}), f"neither all nor nothing: {sorted(there)}"
            assert done["code"] or there == self.wanted, "says that it is done"
            figures.counts["whole on the Hub" if there == self.wanted else "nothing on the Hub"] += 1
            again = self._push_again()
            assert again["code"] == 0, f"push again: exit {again['code']}: {again['error'][-600:]}"
            assert self._there() == self.wanted, f"push again: {sorted(self._there())}"
            assert tree_of(self.server.home / "tied") == before, "what was sent is changed"
            assert not self.hub.failures, self.hub.failures
        except AssertionError as error:
            figures.lost.append(f"{NAME}, {action} after {after_s:.3f} s: {error}")


@contextlib.contextmanager
def pushing(home: Path) -> Iterator[Pushes]:
    """Start a Hub and a server, and let them end."""
    with FakeHub() as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(home.with_name("hf"))}
        with mock.patch.dict(os.environ, settings):
            for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
                os.environ.pop(name, None), os.environ.pop(name.lower(), None)
            server = Server(home)
        try:
            yield Pushes(server, hub)
        finally:
            server.close()
