"""Outputs, batches and labels that do not fit what looks at them."""

import math

import pytest
import torch

import forgather_fn as ff

VALUES = torch.tensor([1.0, 2.0, 4.0])


class TestSources:
    @pytest.mark.parametrize("number", [2, -1, 0.5, 2**40], ids=str)
    def test_without_a_name_are_refused(self, number):
        loss = ff.losses.by_source(ff.losses.mse, ("code", "prose"))
        batch = {"y": torch.zeros(3), "source": torch.tensor([0, 1, number])}
        with pytest.raises(ValueError, match=r"batch\['source'\] has .* numbers 0 to 1: 'code', 'prose'"):
            loss(VALUES, batch)

    def test_without_a_name_are_passed_over_where_they_do_not_count(self):
        loss = ff.losses.by_source(ff.losses.masked(ff.losses.mse, by="mask"), ("code", "prose"))
        batch = {"y": torch.zeros(3), "source": torch.tensor([0, 1, -1]), "mask": torch.tensor([1, 1, 0])}
        assert {name: float(mean) for name, mean in loss(VALUES, batch).items()} == {
            "loss": 2.5,
            "loss/code": 1.0,
            "loss/prose": 4.0,
        }

    def test_without_a_name_make_nan_where_a_look_would_wait(self, monkeypatch):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        loss = ff.losses.by_source(ff.losses.mse, ("code", "prose"))
        found = loss(VALUES, {"y": torch.zeros(3), "source": torch.tensor([0, 1, 2])})
        assert float(found["loss"]) == 7.0
        assert math.isnan(float(found["loss/code"]))
        assert math.isnan(float(found["loss/prose"]))
