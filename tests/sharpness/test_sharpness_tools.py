"""Pictures of the loss."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from runs import assert_identical, snapshot
from safetensors.torch import save_file
from test_sharpness import SAMPLES, Exact, mean_loss, trainer_of
from tiny import Net, make_data, make_model
from torch import nn

from hf_gnp import plot_loss_surface
from hf_gnp.sharpness.loss import sample_loss
from hf_gnp.sharpness.pictures import draw_slices
from hf_gnp.sharpness.surface import filter_normalized_


def saved(folder, model):
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def shifted(model, by):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by)
    return model


def assert_is_picture(path, least_width):
    with Image.open(path) as image:
        assert image.width >= least_width
        assert len(np.unique(np.asarray(image.convert("L")))) > 20  # axes, text and curves, not one colour


def test_line_between_two_checkpoints(tmp_path):
    data = make_data("net", size=SAMPLES)
    folders = [saved(tmp_path / "one", Net()), saved(tmp_path / "two", shifted(Net(), 0.1))]
    trainer = trainer_of(tmp_path, shifted(Net(), -0.3))
    before = snapshot(trainer.model)
    result = plot_loss_surface(trainer, tmp_path / "line.png", folders, directions="line", points=7)
    assert_identical(snapshot(trainer.model), before)
    # From -1/4 to 5/4 in 7 points: the second is 0 and the last but one 1.
    (line,) = result["slices"]
    for share, value in zip(result["axes"][0], line["losses"], strict=True):
        expected = mean_loss(shifted(Net(), 0.1 * share), data).item()
        assert value == pytest.approx(expected, rel=1e-5)  # fp32
    assert line["distance"] == pytest.approx(0.1 * sum(p.numel() for p in Net().parameters()) ** 0.5, rel=1e-5)
    assert json.loads((tmp_path / "line.json").read_text()) == result
    assert_is_picture(tmp_path / "line.png", 500)


@pytest.mark.parametrize("dimensions", [1, 2])
@pytest.mark.parametrize("directions", ["filters", "eigenvectors"])
def test_slices_around_checkpoints(tmp_path, directions, dimensions):
    data = make_data("net", size=SAMPLES)
    models = [Net(), shifted(Net(), 0.1)]
    folders = [saved(tmp_path / str(i), model) for i, model in enumerate(models)]
    # With seed 0 Lanczos meets the third eigenvalue before the second, to within the tolerance of pictures.
    options = {"directions": directions, "dimensions": dimensions, "points": 5, "distance": 0.02, "seed": 1}
    result = plot_loss_surface(trainer_of(tmp_path, Net()), tmp_path / "s.png", folders, **options)
    for item, model in zip(result["slices"], models, strict=True):
        losses = np.array(item["losses"])
        assert losses.shape == (5,) * dimensions
        centre = losses[(2,) * dimensions]
        assert centre == pytest.approx(mean_loss(model, data).item(), rel=1e-5)
        if directions == "eigenvectors":
            exact = Exact(model, data)
            assert item["eigenvalues"] == pytest.approx(exact.top(dimensions), rel=1e-2)  # the tolerance of pictures
            # Around 0, up and down together, the linear part cancels and λ x² is left: third order in x², and fp32.
            first = losses if dimensions == 1 else losses[:, 2]
            assert first[0] + first[4] - 2 * centre == pytest.approx(
                item["eigenvalues"][0] * 0.02**2, rel=0.05, abs=1e-6
            )
    assert "20 samples" not in result["caption"] and "Net" in result["caption"]
    assert_is_picture(tmp_path / "s.png", 500)


def test_filters_are_as_long_as_those_of_the_weights(tmp_path):
    model = Net(lambda: nn.Unflatten(1, (1, 7)), lambda: nn.Conv1d(1, 2, 3), nn.Flatten, lambda: nn.Linear(10, 7))
    with sample_loss(trainer_of(tmp_path, model), seed=0) as loss:
        direction = filter_normalized_(loss.vectors.random(0), loss)
        parts = loss.vectors.parts(direction)
    for parameter, part in zip(model.parameters(), parts, strict=True):
        if parameter.ndim > 1:
            assert torch.allclose(part.flatten(1).norm(dim=1), parameter.flatten(1).norm(dim=1), rtol=1e-5)
        else:
            assert not part.any()


def test_pictures_refuse_what_they_cannot_draw(tmp_path):
    trainer = trainer_of(tmp_path, Net())
    for options, message in (
        ({"directions": "up"}, "directions"),
        ({"dimensions": 3}, "dimensions"),
        ({"directions": "line"}, "two ends"),
        ({"checkpoints": [tmp_path]}, "has not all weights of Net"),
    ):
        with pytest.raises(ValueError, match=message):
            plot_loss_surface(trainer, tmp_path / "s.png", **options)


def test_checkpoint_of_other_modules_is_refused(tmp_path):
    """`from_pretrained` would draw random weights for the head."""
    model = make_model("vit")
    model.classifier = nn.Sequential(nn.Dropout(), model.classifier)
    trainer = trainer_of(tmp_path, model, "vit")
    trainer.save_model(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"such as classifier\.1\.bias"):
        plot_loss_surface(trainer, tmp_path / "s.png", [tmp_path / "saved"])


@pytest.mark.parametrize("losses", [[[1.0, 1.0], [1.0, 1.0]], [[math.nan, math.inf], [math.nan, math.nan]]])
def test_flat_map(tmp_path, losses):
    slices = [{"checkpoint": "x", "losses": losses}]
    draw_slices({"slices": slices, "axes": 2 * [[0, 1]], "units": ["", ""], "caption": ""}, tmp_path / "map.png")
    assert_is_picture(tmp_path / "map.png", 500)
