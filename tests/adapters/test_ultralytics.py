"""Detectors go through the trainer of Ultralytics: its average, its checkpoints, its fusion and its export.

A pruned one whole; one that is prepared for int8 with its layers as parts.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchslim as ts

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]

SIZE = 96


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Settings in a folder of their own, no downloads and no installations; the library reads these as it is imported."""
    settings = {
        "YOLO_CONFIG_DIR": str(tmp_path_factory.mktemp("settings")), "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setitem(os.environ, name, value)
        pytest.importorskip("ultralytics")
        yield


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise with a red or a green square, in the layout of the library."""
    from PIL import Image

    root = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(0)
    for split, count in (("train", 32), ("val", 8)):
        images, labels = root / "images" / split, root / "labels" / split
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 60, (SIZE, SIZE, 3), dtype=np.uint8)
            kind, width = int(rng.integers(2)), int(rng.integers(24, 48))
            x, y = (int(place) for place in rng.integers(0, SIZE - width, 2))
            pixels[y : y + width, x : x + width, kind] = 255
            Image.fromarray(pixels).save(images / f"{number}.png")
            box = [(x + width / 2) / SIZE, (y + width / 2) / SIZE, width / SIZE, width / SIZE]
            (labels / f"{number}.txt").write_text(f"{kind} {' '.join(map(str, box))}\n")
    (root / "data.yaml").write_text(
        f"path: {root}\ntrain: images/train\nval: images/val\nnames: {{0: red, 1: green}}\n"
    )
    return root / "data.yaml"


def detector(name: str) -> nn.Module:
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    made: nn.Module = DetectionModel(f"{name}.yaml", nc=2, verbose=False)
    return made.eval()


def pruned(name: str) -> nn.Module:
    return ts.prune.channels(detector(name), (torch.rand(1, 3, SIZE, SIZE),), 0.4)


def prepared(name: str) -> nn.Module:
    """A detector with two layers on the int8 grid, and the first ranges of activations."""
    examples = [(torch.rand(2, 3, SIZE, SIZE),), (torch.rand(1, 3, 128, 160),)]
    model = ts.quantize.prepare(detector(name), examples, part=["model.0", "model.2"], qat=True)
    with torch.no_grad():
        model.train().predict(torch.rand(4, 3, SIZE, SIZE))  # type: ignore[operator]
    return model


def trainer() -> Any:
    """The trainer, but with the weights' own architecture in place of the one of their YAML file."""
    from ultralytics.models.yolo.detect import DetectionTrainer

    class PrunedTrainer(DetectionTrainer):
        def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
            return weights

    return PrunedTrainer


def options(data: Path, folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "data": str(data), "imgsz": SIZE, "batch": 8, "device": "cpu", "workers": 0, "project": str(folder),
        "name": "run", "exist_ok": True, "plots": False, "verbose": False, "amp": False, **more,
    }  # fmt: skip


@torch.no_grad()
def boxes(model: nn.Module, images: Tensor) -> Tensor:
    answer = model.float().eval()(images)
    return answer[0] if isinstance(answer, tuple) else answer  # type: ignore[no-any-return]


def widths(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n", "yolo26n"])
def test_a_pruned_detector_is_trained_saved_fused_and_exported(name: str, shapes: Path, tmp_path: Path) -> None:
    """Costs 15 s."""
    import onnxruntime
    from ultralytics import YOLO

    model = pruned(name)
    record, narrow = ts.surgery(model), widths(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    start = tmp_path / "pruned.pt"
    torch.save({"model": model}, start)
    owner = YOLO(str(start))
    owner.train(trainer=trainer(), epochs=2, **options(shapes, tmp_path))
    trained = owner.model
    assert widths(trained) == narrow
    assert ts.surgery(trained) == record
    assert any(not torch.allclose(value.float(), before[key].float()) for key, value in trained.state_dict().items())
    again = YOLO(str(owner.trainer.best))  # its checkpoint is a pickle of the averaged model
    assert widths(again.model) == narrow
    images = torch.rand(1, 3, SIZE, SIZE)
    expected = boxes(again.model, images)
    torch.testing.assert_close(
        boxes(copy.deepcopy(again.model).fuse(verbose=False), images), expected, rtol=1e-3, atol=1e-2
    )
    file = again.export(format="onnx", imgsz=SIZE, simplify=False)
    session = onnxruntime.InferenceSession(file)
    [answer] = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    np.testing.assert_allclose(answer, expected.numpy(), rtol=1e-3, atol=1e-2)
    rebuilt = ts.prune.apply_surgery(detector(name), record)  # type: ignore[arg-type]
    rebuilt.load_state_dict(again.model.float().state_dict())
    torch.testing.assert_close(boxes(rebuilt, images), expected)


def test_layers_on_the_int8_grid_are_trained_saved_converted_and_deployed(shapes: Path, tmp_path: Path) -> None:
    """Costs 40 s."""
    from ultralytics import YOLO

    model = detector("yolov8n")
    layers = ["model.0", "model.2", "model.12", "model.22.cv2.*", "model.22.cv3.*"]
    examples = [(torch.rand(2, 3, SIZE, SIZE),), (torch.rand(1, 3, 128, 160),)]
    prepared = ts.quantize.prepare(model, examples, part=layers, qat=True)
    with torch.no_grad():
        prepared.train().predict(torch.rand(4, 3, SIZE, SIZE))  # type: ignore[operator]
    before = {key: value.clone() for key, value in prepared.state_dict().items()}
    torch.save({"model": prepared}, tmp_path / "prepared.pt")
    owner = YOLO(str(tmp_path / "prepared.pt"))
    owner.train(trainer=trainer(), epochs=2, **options(shapes, tmp_path))
    again = YOLO(str(owner.trainer.best)).model
    after = again.state_dict()
    assert list(after) == list(before)
    assert any(not torch.allclose(after[key].float(), before[key].float()) for key in before if "weight" in key)
    parts = [module for module in again.modules() if isinstance(module, ts.quantize.Prepared)]
    assert len(parts) == 9
    assert not any(part.training for part in parts)
    images = torch.rand(2, 3, SIZE, SIZE)
    expected = boxes(again, images)
    quantized = ts.quantize.convert(again, checks=None)
    assert ts.quantize.sqnr(expected, boxes(quantized, images)) > 40
    deployed: Any = ts.deploy(quantized, (images,), runtime="eager")
    assert len(deployed.parts) == 9
    assert ts.quantize.sqnr(expected, deployed(images)[0]) > 40
    resumed = YOLO(str(tmp_path / "run" / "weights" / "last.pt"))
    resumed.train(trainer=trainer(), epochs=1, **options(shapes, tmp_path))
    assert list(resumed.model.state_dict()) == list(before)


@pytest.mark.parametrize("make", [pruned, prepared])
def test_training_resumes_from_the_librarys_own_checkpoint(make: Any, shapes: Path, tmp_path: Path) -> None:
    """Costs 10 s each."""
    from ultralytics import YOLO

    model = make("yolov8n")
    torch.save({"model": model}, tmp_path / "start.pt")
    owner = YOLO(str(tmp_path / "start.pt"))

    class Interrupted(Exception):
        pass

    def stop(running: Any) -> None:
        if running.epoch == 1:
            raise Interrupted

    owner.add_callback("on_train_epoch_start", stop)
    with pytest.raises(Interrupted):
        owner.train(trainer=trainer(), epochs=3, **options(shapes, tmp_path))
    last = tmp_path / "run" / "weights" / "last.pt"
    resumed = YOLO(str(last))
    resumed.train(trainer=trainer(), resume=True)
    assert resumed.trainer.epoch == 2
    assert widths(resumed.model) == widths(model)
    parts = [module for module in resumed.model.modules() if isinstance(module, ts.quantize.Prepared)]
    assert len(parts) == (2 if make is prepared else 0)
    if parts:
        images = torch.rand(2, 3, SIZE, SIZE)
        expected = boxes(resumed.model, images)
        quantized = ts.quantize.convert(resumed.model, checks=None)
        assert ts.quantize.sqnr(expected, boxes(quantized, images)) > 40


def test_the_librarys_own_trainer_builds_the_backbone_of_its_yaml_file_again(shapes: Path, tmp_path: Path) -> None:
    """The reason for the class above: when this fails, it is no longer needed. Costs 5 s."""
    from ultralytics import YOLO

    model = pruned("yolov8n")
    torch.save({"model": model}, tmp_path / "pruned.pt")
    owner = YOLO(str(tmp_path / "pruned.pt"))
    owner.train(epochs=1, **options(shapes, tmp_path))
    whole, after = widths(detector("yolov8n")), widths(owner.model)
    backbone = [name for name in whole if int(name.split(".")[1]) < 10]
    assert [after[name] for name in backbone] == [whole[name] for name in backbone]
    assert [after[name] for name in backbone] != [widths(model)[name] for name in backbone]
