"""Who holds a backbone frozen is counted right, also from several threads."""

from __future__ import annotations

import sys
import threading

from torch import nn

from memtune.backbones.freezing import Hold


def test_the_last_to_go_gives_the_backbone_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)).train()
    first, second = Hold(model), Hold(model)
    model.eval()
    first.release(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    second.release(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, True, False, False]
    assert model.training


def test_threads_that_come_and_go() -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(20)]).train()
    thawed: list[str] = []

    def come_and_go() -> None:
        for _ in range(60):
            hold = Hold(model)
            thawed.extend(name for name, parameter in model.named_parameters() if parameter.requires_grad)
            hold.release(model)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=come_and_go) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not thawed
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training
