"""What channels were removed is saved and done again: on a fresh instance, in a fresh process, round after round."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchslim as ts
from tests.support import models, toy
from tests.support.deployment_models import Conv, fresh_python, trained_conv
from torchslim.core.files import digest, sha256
from torchslim.core.isolation import copy_model
from torchslim.core.step import Inputs
from torchslim.errors import ArtifactError, PruneError
from torchslim.prune.structured.record import replay

FINE: dict[str, Any] = {"round_to": 1, "min_channels": 1}


def pictures(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def conv() -> nn.Module:
    """The architecture, with other weights at each call."""
    return Conv().eval()


def last_channels() -> nn.Module:
    return trained_conv().to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


TOKENS = torch.arange(8).reshape(2, 4)
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], Inputs]] = {
    "batch norm": (trained_conv, conv, (pictures(),)),
    "training": (toy.model, toy.Net, (toy.images(2, 0)[0],)),
    "lstm": (models.Recurrent, models.Recurrent, (torch.randn(2, 4, 5),)),
    "tied": (models.Tied, models.Tied, (TOKENS,)),
    "attention": (models.Encoder, models.Encoder, {"tokens": TOKENS}),
    "channels last": (last_channels, conv, (pictures(),)),
    "half": (lambda: trained_conv().half(), conv, (pictures().half(),)),
    "bfloat16": (lambda: trained_conv().bfloat16(), conv, (pictures().bfloat16(),)),
    "double": (lambda: trained_conv().double(), conv, (pictures().double(),)),
}


def run(model: nn.Module, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        answer: Tensor = model.eval()(**inputs) if isinstance(inputs, dict) else model.eval()(*inputs)
    return answer


@pytest.fixture(scope="module")
def pruned() -> nn.Module:
    return ts.prune.channels(trained_conv(), (pictures(),), 0.5, **FINE)


@pytest.fixture
def saved(pruned: nn.Module, tmp_path: Path) -> Path:
    return ts.save(pruned, tmp_path / "saved")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_pruned_module_comes_back_bit_for_bit_with_its_record(name: str, tmp_path: Path) -> None:
    make, factory, inputs = MODELS[name]
    shrunk = ts.prune.channels(make(), inputs, 0.5, **FINE)
    folder = ts.save(shrunk, tmp_path / "a")
    assert json.loads((folder / "surgery.json").read_text()) == ts.surgery(shrunk)
    loaded = ts.load_module(folder, factory)
    assert ts.surgery(loaded) == ts.surgery(shrunk)
    assert loaded is not shrunk
    mine, theirs = shrunk.state_dict(), loaded.state_dict()
    assert list(mine) == list(theirs)
    for key, value in mine.items():
        assert (value.dtype, value.shape) == (theirs[key].dtype, theirs[key].shape)
        assert torch.equal(value, theirs[key])
        if min(value.shape, default=1) > 1:  # where a size is 1 its stride means nothing
            assert value.stride() == theirs[key].stride()
    assert torch.equal(run(loaded, inputs), run(shrunk, inputs))
    if name == "tied":
        assert loaded.head.weight is loaded.embed.weight
    if name == "lstm":  # an attribute that torch's kernel reads
        assert loaded.lstm.hidden_size == loaded.lstm.weight_hh_l0.shape[1] < 6


FRESH = """
import sys, torch, torchslim as ts
from safetensors.torch import load_file
from tests.prune.test_surgery import MODELS, run
torch.set_num_threads(int(sys.argv[1]))  # bitwise the same only on as many threads
folder = sys.argv[2]
for name in sys.argv[3:]:
    kept = torch.load(f"{folder}/{name}.pt", weights_only=True)
    loaded = ts.load_module(f"{folder}/{name}", MODELS[name][1])
    assert torch.equal(run(loaded, MODELS[name][2] if kept["inputs"] is None else kept["inputs"]), kept["outputs"]), name
    again = ts.load_module(f"{folder}/{name}", MODELS[name][1])
    again.load_state_dict(kept["state"])
    raw = load_file(f"{folder}/{name}/weights.safetensors")
    assert all(torch.equal(raw[key], value) for key, value in kept["state"].items() if key in raw)
    answer = ts.load(f"{folder}/{name}")(*kept["inputs"])
    print(name, torch.equal(answer, kept["program"]))
"""


@pytest.mark.slow
def test_a_fresh_process_loads_weights_module_and_program(tmp_path: Path) -> None:
    names = ["batch norm", "lstm", "tied", "bfloat16"]
    for name in names:
        make, _, inputs = MODELS[name]
        shrunk = ts.prune.channels(make(), inputs, 0.5, **FINE)
        folder = ts.save(shrunk, tmp_path / name, example_inputs=inputs)
        assert (folder / "model.pt2").is_file()
        kept = {"inputs": inputs, "outputs": run(shrunk, inputs), "state": shrunk.state_dict(),
                "program": ts.load(folder)(*inputs)}  # fmt: skip
        torch.save(kept, tmp_path / f"{name}.pt")
    done = fresh_python(FRESH, str(torch.get_num_threads()), tmp_path, *names)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == [f"{name} True" for name in names]


def test_rounds_compose_and_replay_from_the_first_factory(pruned: nn.Module, tmp_path: Path) -> None:
    loaded = ts.load_module(ts.save(pruned, tmp_path / "once"), conv)
    twice = ts.prune.channels(loaded, (pictures(),), 0.4, **FINE)
    record = ts.surgery(twice)
    assert record is not None
    assert len(record["rounds"]) == 2
    assert record["rounds"][:1] == ts.surgery(pruned)["rounds"]  # type: ignore[index]
    assert len(ts.surgery(loaded)["rounds"]) == 1, "the loaded model is left as it was"  # type: ignore[index]
    folder = ts.save(twice, tmp_path / "twice")
    for factory in (conv, lambda: copy.deepcopy(pruned), lambda: copy.deepcopy(twice)):
        again = ts.load_module(folder, factory)
        assert ts.surgery(again) == record
        assert torch.equal(run(again, (pictures(5),)), run(twice, (pictures(5),)))
    thrice = ts.prune.channels(again, (pictures(),), 0.3, **FINE)
    last = ts.load_module(ts.save(thrice, tmp_path / "twice"), conv)
    assert torch.equal(run(last, (pictures(5),)), run(thrice, (pictures(5),)))


class Narrow(Conv):
    """The pruned architecture, written down."""

    def __init__(self, shrunk: nn.Module) -> None:
        super().__init__()
        for name, module in shrunk.named_children():
            if isinstance(module, nn.Conv2d):
                new: nn.Module = nn.Conv2d(
                    module.in_channels,
                    module.out_channels,
                    module.kernel_size,
                    padding=module.padding,
                    groups=module.groups,
                    bias=module.bias is not None,
                )  # type: ignore[arg-type]
            elif isinstance(module, nn.Linear):
                new = nn.Linear(module.in_features, module.out_features)
            elif isinstance(module, nn.BatchNorm2d):
                new = nn.BatchNorm2d(module.num_features)
            else:
                continue
            setattr(self, name, new)


def test_a_factory_may_know_the_pruned_architecture(pruned: nn.Module, saved: Path, tmp_path: Path) -> None:
    loaded = ts.load_module(saved, lambda: Narrow(pruned))
    assert ts.surgery(loaded) == ts.surgery(pruned)
    assert torch.equal(run(loaded, (pictures(5),)), run(pruned, (pictures(5),)))
    again = ts.prune.channels(loaded, (pictures(),), 0.3, **FINE)
    whole = ts.load_module(ts.save(again, tmp_path / "again"), conv)
    assert torch.equal(run(whole, (pictures(5),)), run(again, (pictures(5),)))


class Detector(nn.Module):
    """A model around one that may have been pruned by itself."""

    def __init__(self, body: nn.Module | None = None) -> None:
        super().__init__()
        self.body = conv() if body is None else body
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


def test_a_part_may_be_pruned_before_and_after_what_is_around_it(pruned: nn.Module, tmp_path: Path) -> None:
    part = Detector(copy.deepcopy(pruned)).eval()
    whole = ts.prune.channels(part, (pictures(),), 0.3, **FINE)
    both = copy.deepcopy(whole)
    both.body = ts.prune.channels(both.body, (pictures(),), 0.3, **FINE)  # type: ignore[arg-type]
    for number, model in enumerate((part, whole, both), 1):
        record = ts.surgery(model)
        assert record is not None
        assert [each["about"].get("part") for each in record["rounds"]] == ["body", None, "body"][:number]
        folder = ts.save(model, tmp_path / str(number))
        for factory in (Detector, lambda model=model: copy.deepcopy(model)):
            loaded = ts.load_module(folder, factory)
            assert ts.surgery(loaded) == record
            assert torch.equal(run(loaded, (pictures(),)), run(model, (pictures(),)))
    assert ts.surgery(Detector()) is None


def test_copies_carry_the_record(pruned: nn.Module) -> None:
    for made in (copy.deepcopy(pruned), copy_model(pruned)[0], copy.deepcopy(pruned).half()):
        assert ts.surgery(made) == ts.surgery(pruned)
    graph = ts.prune.channels(torch.fx.symbolic_trace(trained_conv()), (pictures(),), **FINE)
    assert ts.surgery(copy_model(graph)[0]) == ts.surgery(graph) is not None
    masked = ts.prune.weights(pruned, sparsity=0.5)
    assert ts.surgery(masked) == ts.surgery(pruned)
    ts.surgery(masked)["rounds"].clear()  # type: ignore[index]
    assert len(ts.surgery(masked)["rounds"]) == 1, "what is returned is a copy"  # type: ignore[index]


def test_buffers_that_are_not_saved_may_grow_as_the_model_runs(tmp_path: Path) -> None:
    class Cached(Conv):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(0), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.seen = torch.zeros(len(x))
            return super().forward(x)

    model = Cached().eval()
    model(pictures(4))
    shrunk = ts.prune.channels(model, (pictures(),), **FINE)
    loaded = ts.load_module(ts.save(shrunk, tmp_path / "a"), Cached)
    assert torch.equal(run(loaded, (pictures(),)), run(shrunk, (pictures(),)))


# --- what is refused ---


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda: Conv(classes=6), r"Conv.*not the model.*tests.support.deployment_models.Conv.*missing: none.*unknown: none.*head.weight \(6, 16\).*\(5, 16\).*head.bias \(6,\).*\(5,\).*factory"),
        (toy.Net, r"missing: bn1.bias.*unknown: depthwise.bias.*shapes: head.weight \(4, 8\).*\(5, 16\)"),
        (lambda: nn.Sequential(conv()), "unknown: depthwise.bias"),
    ],
)  # fmt: skip
def test_another_model_is_refused_and_the_difference_named(saved: Path, factory: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        ts.load_module(saved, factory)


def test_a_pruned_factory_of_another_pruning_is_refused(saved: Path) -> None:
    other = ts.prune.channels(trained_conv(), (pictures(),), 0.2, **FINE)
    with pytest.raises(ArtifactError, match="not the model.*pruned"):
        ts.load_module(saved, lambda: copy.deepcopy(other))


def test_a_record_of_another_base_is_refused(pruned: nn.Module) -> None:
    record = ts.surgery(pruned)
    assert record is not None
    with pytest.raises(PruneError, match="tests.support.deployment_models.Conv.*other weights.*Net"):
        replay(toy.Net(), record)
    assert torch.equal(replay(trained_conv(), record).stem.weight, pruned.stem.weight)  # type: ignore[union-attr,arg-type]


def rewritten(folder: Path, record: Any) -> None:
    """Another surgery.json, with a manifest that agrees: not an accident, but somebody who knows the format."""
    (folder / "surgery.json").write_text(record if isinstance(record, str) else json.dumps(record))
    manifest = json.loads((folder / "artifact.json").read_text())
    manifest["files"]["surgery.json"] = sha256(folder / "surgery.json")
    del manifest["digest"]
    (folder / "artifact.json").write_text(json.dumps(manifest | {"digest": digest(manifest)}))


def test_a_changed_or_missing_surgery_is_detected(saved: Path, tmp_path: Path) -> None:
    path = saved / "surgery.json"
    whole = path.read_text()
    path.write_text(whole.replace('"size": 8', '"size": 9', 1))
    with pytest.raises(ArtifactError, match="surgery.json.*truncated or changed"):
        ts.load_module(saved, conv)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"surgery.json is missing"):
        ts.load_module(saved, conv)


def first(record: Any, kind: str) -> Any:
    return record["rounds"][0][kind][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.update(version=2), "version 2.*reads 1.*upgrade"),
        (lambda record: record.pop("base"), "surgery.json.*damaged.*base: Field required"),
        (lambda record: first(record, "cuts").update(kept=[0, 99]), "indices.*not exist"),
        (lambda record: first(record, "cuts").update(kept=[1, 0]), "indices.*not exist"),
        (lambda record: first(record, "cuts").update(kept=None), "surgery.json.*damaged.*rounds.0.cuts.0.kept: .* valid array.*None"),
        (lambda record: first(record, "patches").update(name="_parameters"), "surgery.json is damaged"),
        (lambda record: first(record, "patches").update(new="8"), "surgery.json.*damaged.*rounds.0.patches.0.new"),
        (lambda record: first(record, "patches").update(module="nowhere"), "does not fit this Conv"),
        (lambda record: first(record, "patches").update(name="nothing"), r"\.nothing.*lacks"),
        (lambda record: first(record, "cuts").update(weight="nothing"), "not the model.*pruned"),
        (lambda record: record["rounds"].clear(), "not the model.*pruned"),
    ],
)  # fmt: skip
def test_a_surgery_that_makes_no_sense_is_refused(saved: Path, change: Any, message: str) -> None:
    record = json.loads((saved / "surgery.json").read_text())
    change(record)
    rewritten(saved, record)
    with pytest.raises(ArtifactError, match=message):
        ts.load_module(saved, conv)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[[1]]", '{"version": "x"}'])
def test_a_surgery_that_is_no_record_is_refused(saved: Path, text: str) -> None:
    rewritten(saved, text)
    with pytest.raises(ArtifactError, match="surgery.json is damaged"):
        ts.load_module(saved, conv)


def test_a_folder_saved_again_without_surgery_keeps_none(saved: Path) -> None:
    ts.save(trained_conv(), saved)
    assert not (saved / "surgery.json").exists()
    assert ts.surgery(ts.load_module(saved, conv)) is None


# --- runs ---

STEPS = [
    ts.Prune(sparsity=0.5, pattern="channel", round_to=1, min_channels=1),
    ts.Finetune(epochs=1),
    ts.Distill(epochs=1),
    ts.Quantize("int8"),
]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> ts.Result:
    work = tmp_path_factory.mktemp("run") / "work"
    return ts.compress(toy.model(), toy.task(), STEPS, runtime="eager", threads=1, workdir=work)


@pytest.mark.slow
def test_the_record_goes_through_every_step_into_the_saved_folder(result: ts.Result, tmp_path: Path) -> None:
    record = ts.surgery(result.module)
    assert record is not None
    saved = result.save(tmp_path / "out")
    loaded = ts.load_module(saved, toy.Net)
    assert ts.surgery(loaded) == record
    inputs = (toy.images(5, 9)[0],)
    assert torch.equal(run(loaded, inputs), run(result.module, inputs))
    assert any(each["action"] == "pruned" for each in result.run["rows"][1]["layers"])


@pytest.mark.slow
@pytest.mark.parametrize("lost", [(), ("04-quantize",), ("03-distill", "04-quantize"), ("02-finetune",), ("01-prune",)])
def test_a_resumed_run_makes_the_shrunk_models_again(result: ts.Result, lost: tuple[str, ...], tmp_path: Path) -> None:
    work = shutil.copytree(result.folder, tmp_path / "work")
    for name in lost:
        shutil.rmtree(work / name)
    resumed: list[str] = []
    again = ts.compress(
        toy.model(), toy.task(), STEPS, runtime="eager", threads=1, workdir=work,
        progress=lambda event: resumed.append(event.step) if event.phase == "resumed" else None,
    )  # fmt: skip
    assert len(resumed) == 4 - len(lost)
    assert ts.surgery(again.module) == ts.surgery(result.module)
    for name, value in result.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], value)
    images, _ = toy.images(5, 9)
    assert torch.equal(again.model(images), result.model(images))
    assert torch.equal(again.deployed(images), result.deployed(images))


@pytest.mark.slow
def test_a_model_that_was_pruned_before_the_run_goes_on_from_there(tmp_path: Path) -> None:
    given = ts.prune.channels(toy.model(), (toy.images(2, 0)[0],), 0.3, **FINE)
    before = ts.surgery(given)
    for _ in range(2):
        done = ts.compress(given, toy.task(), STEPS[:1], runtime="eager", threads=1, workdir=tmp_path / "work")
        record = ts.surgery(done.module)
        assert record is not None
        assert len(record["rounds"]) == 2
        loaded = ts.load_module(done.save(tmp_path / "out"), toy.Net)
        inputs = (toy.images(5, 9)[0],)
        assert torch.equal(run(loaded, inputs), run(done.module, inputs))
    assert ts.surgery(given) == before


def test_attributes_follow_their_weights_where_an_image_is_as_wide_as_they_are() -> None:
    shrunk = ts.prune.channels(trained_conv(), (torch.randn(2, 3, 8, 8),), 0.5, **FINE)
    assert shrunk.norm.num_features == len(shrunk.norm.weight) < 8
    assert shrunk.depthwise.in_channels == shrunk.depthwise.groups == len(shrunk.depthwise.weight)
