"""What every method promises, on every family and in every mode that it has; the table is in `contract_cases.py`."""

from __future__ import annotations

import pytest
import torch
from backbone_zoo import BY_NAME, Case, assert_same, snapshot
from contract_cases import FEW, LABELS, ROWS, Row, every, moved, wrapped
from contract_promises import PROMISES, Promise

import memtune
from memtune import MemtuneError
from memtune.methods.registry import method_names

COMPILED = (*FEW, "segformer")


def test_every_method_has_a_row() -> None:
    assert sorted({row.config.method for row in ROWS}) == method_names()


@every()
@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_every_method_keeps_the_contract(promise: Promise, row: Row, case: Case, masked: bool) -> None:
    promise(row, case, masked)


@pytest.mark.slow
@every([(row, *place) for row in ROWS if not row.note for place in row.places() if place[0].name in COMPILED])
def test_compiles_without_a_break_in_the_graph(row: Row, case: Case, masked: bool) -> None:
    model, images = moved(wrapped(row, case, masked)), case.images()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    got, expected = compiled(images, labels=LABELS), model(images, labels=LABELS)
    torch.testing.assert_close((got.loss, got.logits), (expected.loss, expected.logits))


@pytest.mark.parametrize("row", [row for row in ROWS if not row.note], ids=lambda row: row.name)
def test_masked_mode_needs_global_attention(row: Row) -> None:
    backbone = BY_NAME["swin"].build().train()
    before = snapshot(backbone)
    with pytest.raises(MemtuneError, match="masked=True: got SwinModel, whose blocks attend within windows"):
        memtune.wrap(backbone, row.config, num_labels=2, masked=True)
    assert_same(backbone, before)
