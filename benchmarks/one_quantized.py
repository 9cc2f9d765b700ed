"""One model on one runtime: float, ours and the runtime's own quantizer, timed in turn; used by benchmarks.quantize."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchslim as ts
from benchmarks.outputs import settle_norms
from torchslim.artifact.integer_coverage import lowered
from torchslim.artifact.latency import interleave
from torchslim.core.isolation import quiet
from torchslim.quantize import convert, prepare, sqnr
from torchslim.runtimes.openvino import no_telemetry

THREADS = 2
CALIBRATION = 4  # batches of 8
SECONDS = 30.0  # of timing for a row, at most


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model of the benchmark: how it is built, one sample, and the scheme that suits it."""

    build: Callable[[], nn.Module]
    sample: Callable[[int], Tensor]
    scheme: str
    transformer: bool = False


class Bert(nn.Module):
    """Six encoder layers of width 384 on 128 tokens, as in small sentence encoders."""

    def __init__(self, width: int = 384, layers: int = 6, heads: int = 12, vocabulary: int = 30_522) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
            vocab_size=vocabulary,
        )  # fmt: skip
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.bert(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """Two LSTM layers of 256 on 128 features."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(128, 256, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]  # type: ignore[no-any-return]


def _vision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        model: nn.Module = torchvision.models.get_model(name, weights=None)
        for module in model.modules():
            if isinstance(module, nn.Linear) and not module.weight.any():  # ViT's head: outputs of zero show no noise
                nn.init.normal_(module.weight, std=0.02)
        return model

    return build


def _images(count: int) -> Tensor:
    return torch.randn(count, 3, 224, 224)


CANDIDATES = {
    **{
        name: Candidate(_vision(name), _images, "int8")
        for name in ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0")
    },
    "vit_b_16": Candidate(_vision("vit_b_16"), _images, "int8", transformer=True),
    "bert_6x384": Candidate(
        Bert, lambda count: torch.randint(0, 30_000, (count, 128)), "int8-dynamic", transformer=True
    ),
    "lstm_2x256": Candidate(Recurrent, lambda count: torch.randn(count, 100, 128), "int8-dynamic"),
}
RUNTIMES = ("onnxruntime", "openvino", "inductor", "eager")


def measure(name: str, runtime: str, batch: int, rounds: int) -> dict[str, Any]:
    """The row of one model, runtime and batch size."""
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    candidate = CANDIDATES[name]
    model = candidate.build().eval()
    settle_norms(model, [(candidate.sample(8),)])
    batches = [(candidate.sample(8),) for _ in range(CALIBRATION)]
    x = candidate.sample(batch)
    # nncf gives a transformer static ranges; so do we beside it
    scheme = "int8" if candidate.transformer and runtime == "openvino" else candidate.scheme
    row: dict[str, Any] = {"model": name, "runtime": runtime, "batch": batch, "scheme": scheme}
    with torch.no_grad():
        expected = model(x)
    sessions: dict[str, Callable[[], Any]] = {}
    baseline = ts.deploy(model, (x,), runtime=runtime, threads=THREADS)
    sessions["float"] = lambda: baseline(x)
    start = time.perf_counter()
    prepared = prepare(model, (x,), runtime=runtime, scheme=scheme)
    if scheme == "int8":
        prepared.calibrate(batches)
    quantized = convert(prepared)
    ours = ts.deploy(quantized, (x,), runtime=runtime, threads=THREADS)
    row["rolled_back"] = list(getattr(ours.made_from, "notes", quantized.notes))
    row["seconds"] = time.perf_counter() - start
    sessions["ours"] = lambda: ours(x)
    row["sqnr_ours"] = sqnr(expected, ours(x))
    found = lowered(ours, prepared.records)
    row |= {"integer_share": found.integer_share, "warnings": list(found.warnings)}
    row |= {"bytes_float": baseline.size_bytes, "bytes_ours": ours.size_bytes, "peer": None, "reason": ""}
    try:
        with quiet():
            peer = PEERS[runtime](model, batches, x, candidate)
        with torch.no_grad():
            row["sqnr_peer"] = sqnr(expected, peer(x))
        sessions["peer"] = lambda: peer(x)
        row["peer"] = PEER_NAMES[runtime, scheme]
    except Exception as error:  # noqa: BLE001 - the row says what it was
        row["reason"] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    with torch.no_grad():
        timings = interleave(sessions, rounds=rounds, seconds=SECONDS)
    return row | {"rounds": {key: list(values) for key, values in timings.rounds.items()}}


# what a user would take instead ---------------------------------------------------------------------------------------


def _onnxruntime(model: nn.Module, batches: Sequence[Any], x: Tensor, candidate: Candidate) -> Callable[[Tensor], Any]:
    """ONNX Runtime's quantize_static (per channel, after its preprocessing) or quantize_dynamic."""
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, name: str) -> None:
            self.rows = iter([{name: batch[0].numpy()} for batch in batches])

        def get_next(self) -> Any:
            return next(self.rows, None)

    with tempfile.TemporaryDirectory() as folder:
        start, middle, end = (str(Path(folder) / name) for name in ("float.onnx", "prepared.onnx", "int8.onnx"))
        example = torch.cat([x, x]) if len(x) == 1 else x  # a batch of one would be taken for fixed
        program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        torch.onnx.export(program, dynamo=True, verbose=False, external_data=False).save(start)  # type: ignore[union-attr]
        quant_pre_process(start, middle)
        if candidate.scheme == "int8":
            name = ort.InferenceSession(middle).get_inputs()[0].name
            quantize_static(
                middle, end, Reader(name), per_channel=True, weight_type=QuantType.QInt8,
                activation_type=QuantType.QUInt8,
            )  # fmt: skip
        else:
            quantize_dynamic(middle, end, per_channel=candidate.transformer, weight_type=QuantType.QInt8)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = THREADS, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = ort.InferenceSession(Path(end).read_bytes(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda value: torch.from_numpy(session.run(None, {name: value.numpy()})[0])


def _openvino(model: nn.Module, batches: Sequence[Any], x: Tensor, candidate: Candidate) -> Callable[[Tensor], Any]:
    """nncf on the converted model, with its preset for the kind of network."""
    with no_telemetry():
        import nncf
        import openvino

    with torch.no_grad():  # its own tracing compares two traces, which attention's two paths make differ
        traced = torch.jit.trace(model, x, check_trace=False)
    converted = openvino.convert_model(traced, example_input=x)
    options = {"model_type": nncf.ModelType.TRANSFORMER} if candidate.transformer else {}
    if candidate.scheme == "int8" or candidate.transformer:
        quantized = nncf.quantize(converted, nncf.Dataset([batch[0] for batch in batches]), **options)
    else:
        quantized = nncf.compress_weights(converted)
    compiled = openvino.compile_model(
        quantized, "CPU",
        {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"},
    )  # fmt: skip
    return lambda value: torch.from_numpy(compiled([value.numpy()])[0])


def _inductor(model: nn.Module, batches: Sequence[Any], x: Tensor, candidate: Candidate) -> Callable[[Tensor], Any]:
    """torchao's quantizer for x86, compiled with frozen weights."""
    import torch._inductor.config as inductor_config
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = x86.X86InductorQuantizer()
    dynamic = candidate.scheme == "int8-dynamic"
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_dynamic=dynamic))
    prepared = prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
    with torch.no_grad():
        for each in [x] if len(x) != 8 else [batch[0] for batch in batches]:
            prepared(each)
        for batch in batches:
            for start in range(0, 8 - len(x) + 1, len(x)):
                prepared(batch[0][start : start + len(x)])
        compiled = torch.compile(convert_pt2e(prepared))
        with inductor_config.patch(freezing=True):
            compiled(x)
    return compiled  # type: ignore[no-any-return]


def _eager(model: nn.Module, batches: Sequence[Any], x: Tensor, candidate: Candidate) -> Callable[[Tensor], Any]:
    """torch.ao's dynamic quantization of linear and LSTM layers."""
    if candidate.scheme != "int8-dynamic":
        raise NotImplementedError("PyTorch has no static int8 that runs without a compiler on exported models")
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear, nn.LSTM}, dtype=torch.qint8)  # type: ignore[no-any-return]


PEERS = {"onnxruntime": _onnxruntime, "openvino": _openvino, "inductor": _inductor, "eager": _eager}
PEER_NAMES = {
    ("onnxruntime", "int8"): "onnxruntime quantize_static",
    ("onnxruntime", "int8-dynamic"): "onnxruntime quantize_dynamic",
    ("openvino", "int8"): "nncf quantize",
    ("openvino", "int8-dynamic"): "nncf",
    ("inductor", "int8"): "torchao X86InductorQuantizer",
    ("inductor", "int8-dynamic"): "torchao X86InductorQuantizer, dynamic",
    ("eager", "int8-dynamic"): "torch.ao quantize_dynamic",
}
