"""One artifact in a fresh process, as benchmarks/toolchain.py starts it: MODEL JOB SIDE; prints a row of JSON."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

BATCHES, SAMPLES = 4, 8
SUFFIXES = {"onnxruntime": ".onnx", "openvino": ".xml", "executorch": ".pte"}


class Tagger(nn.Module):
    """An LSTM over tokens, with a class for each."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5000, 128)
        self.lstm = nn.LSTM(128, 256, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(512, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0])  # type: ignore[no-any-return]


class Block(nn.Sequential):
    """Two normalized convolutions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        layers: list[nn.Module] = []
        for source in (inputs, outputs):
            layers += [nn.Conv2d(source, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.SiLU(inplace=True)]
        super().__init__(*layers)


class UNet(nn.Module):
    """A U-Net with the parameters of a small YOLO, about 8 million."""

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        widths = [width << level for level in range(depth + 1)]
        self.down = nn.ModuleList([Block(i, o) for i, o in zip([3, *widths[:-1]], widths, strict=True)])
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.widen = nn.ModuleList([nn.ConvTranspose2d(i, o, 2, 2) for i, o in pairs])
        self.up = nn.ModuleList([Block(2 * o, o) for _, o in pairs])
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level, block in enumerate(self.down):
            x = block(nn.functional.max_pool2d(x, 2) if level else x)
            skips.append(x)
        for widen, block, skip in zip(self.widen, self.up, skips[-2::-1], strict=True):
            x = block(torch.cat([widen(x), skip], 1))
        return self.head(x)  # type: ignore[no-any-return]


class Bert(nn.Module):
    """BERT of four layers, called with tokens alone."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        size = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
        self.bert = BertModel(BertConfig(**size, vocab_size=5000))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.bert(tokens).last_hidden_state  # type: ignore[no-any-return]


class Scan(nn.Module):
    """A selective scan, a step of 7 operations after the other, as exporters unroll it.

    Source: Gu & Dao 2023, arXiv:2312.00752, equation 2.
    """

    def __init__(self, nodes: int, states: int = 8) -> None:
        super().__init__()
        self.steps = nodes // 7
        self.decay, self.enter, self.read = (nn.Linear(4, states) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        decay, entered, read = self.decay(x).sigmoid(), self.enter(x), self.read(x)
        state, answers = entered[:, 0], []
        for step in range(self.steps):
            state = decay[:, step] * state + entered[:, step]
            answers.append((state * read[:, step]).sum(-1))
        return torch.stack(answers, 1)


def model_of(name: str) -> tuple[nn.Module, list[tuple[Tensor]]]:
    """A module with random weights and its calibration batches."""
    torch.manual_seed(0)
    if name.startswith("scan-"):
        scan = Scan(int(name.removeprefix("scan-")))
        return scan.eval(), [(torch.randn(2, scan.steps, 4),)]
    own = {"bert": Bert, "lstm": Tagger, "unet": UNet}
    if name in own:
        model = own[name]()
    else:
        import torchvision

        model = getattr(torchvision.models, name)()

    def batch() -> Tensor:
        if name in ("bert", "lstm"):
            return torch.randint(0, 5000, (SAMPLES, 64))
        size = 128 if name == "unet" else 224
        return torch.randn(SAMPLES, 3, size, size)

    return model.eval(), [(batch(),) for _ in range(BATCHES)]


def ours(model: nn.Module, batches: list[tuple[Tensor]], job: str, folder: Path) -> None:
    """Prune or quantize with torchslim, with all checks, and save."""
    import torchslim as ts

    if job == "prune":
        ts.save(ts.prune.channels(model, batches[0], sparsity=0.5, of="macs"), folder)
    elif job == "nodes":
        ts.deploy(model, batches[0], dynamic_shapes="batch").save(folder / "model.onnx")
    else:
        quantized = ts.quantize.static(model, batches, runtime=job)
        ts.deploy(quantized, batches[0], runtime=job).save(folder / f"model{SUFFIXES[job]}")


def peer(model: nn.Module, batches: list[tuple[Tensor]], job: str, folder: Path) -> None:
    """The same with the library that its users would take, as its own documentation does it."""
    if job == "prune":
        import torch_pruning

        ignored = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
        pruner = torch_pruning.pruner.MagnitudePruner(
            model,
            batches[0],
            torch_pruning.importance.MagnitudeImportance(p=1),
            pruning_ratio=0.3,
            ignored_layers=ignored,
        )
        pruner.step()
        torch.save(model.state_dict(), folder / "model.pt")
    elif job == "nodes":
        _exported(model, batches, folder / "model.onnx")
    elif job == "onnxruntime":
        _onnxruntime_peer(model, batches, folder)
    elif job == "executorch":
        _executorch_peer(model, batches, folder)
    else:
        import nncf
        import openvino

        free = [-1, *batches[0][0].shape[1:]]
        converted = openvino.convert_model(model, example_input=batches[0], input=[free])
        data: Any = nncf.Dataset([batch[0].numpy() for batch in batches])
        quantized = nncf.quantize(converted, data, subset_size=BATCHES)
        openvino.save_model(quantized, folder / "model.xml", compress_to_fp16=False)


def _exported(model: nn.Module, batches: list[tuple[Tensor]], path: Path) -> None:
    torch.onnx.export(
        model,
        batches[0],
        str(path),
        dynamo=True,
        verbose=False,
        input_names=["x"],
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        external_data=False,
    )


def _executorch_peer(model: nn.Module, batches: list[tuple[Tensor]], folder: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    free = ({0: torch.export.Dim("batch", min=1, max=64)},)
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(torch.export.export(model, batches[0], dynamic_shapes=free).module(), quantizer)
    for batch in batches:
        prepared(*batch)
    exported = torch.export.export(convert_pt2e(prepared), batches[0], dynamic_shapes=free)
    program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
    (folder / "model.pte").write_bytes(program.buffer)


def _onnxruntime_peer(model: nn.Module, batches: list[tuple[Tensor]], folder: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    names = ["model.onnx", "prepared.onnx", "int8.onnx"]
    exported, prepared, written = (str(folder / name) for name in names)
    _exported(model, batches, Path(exported))
    quant_pre_process(exported, prepared)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = iter(batches)

        def get_next(self) -> Any:
            batch = next(self.rest, None)
            return None if batch is None else {"x": batch[0].numpy()}

    quantize_static(
        prepared,
        written,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def main() -> None:
    """Make the artifact and print its row."""
    name, job, side = sys.argv[1:]
    torch.set_num_threads(1)
    model, batches = model_of(name)
    with tempfile.TemporaryDirectory() as folder:
        (ours if side == "ours" else peer)(model, batches, job, Path(folder))
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = time.process_time() + usage[1].ru_utime + usage[1].ru_stime
    print(json.dumps({"cpu_s": round(seconds, 2), "peak_mib": round(max(u.ru_maxrss for u in usage) / 1024)}))


if __name__ == "__main__":
    main()
