"""Times the model in this folder on this machine: python bench.py [--threads N] [--rounds N] [--batch N]

In a folder that `torchslim latency` packed, bench.py times all programs in turn against the whole model, and
writes latency.json for `latency_table` of a recipe. In a folder that `torchslim bench --pack` wrote, it times the
artifacts in turn, and writes times.json for `torchslim bench --import`.

Needs numpy and the runtime of the model (onnxruntime for model.onnx, openvino for model.xml, executorch for model.pte,
torch for model.pt2 and model.aoti.pt2), and nothing else. Files are read once and checked against their recorded
SHA-256. Nothing is unpickled, and a program may call only the operators that it had when it was saved. model.aoti.pt2
is machine code, which runs only with --trusted.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import math
import operator
import os
import platform
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[list[Any]], list[Any]]
HERE = Path(__file__).resolve().parent
OPERATORS: tuple[str, ...] = ()  # of the programs in this folder, written when it was saved
ROUND_SECONDS = 0.002  # a round repeats short calls until it lasts this long
TIMES = "torchslim-times"
TOGETHER = 8  # programs in memory at a time, besides the whole model


class Folder:
    """The files that a manifest lists, checked when they are read."""

    def __init__(self, hashes: dict[str, str], trusted: bool) -> None:
        self.hashes, self.trusted = hashes, trusted

    def read(self, name: str) -> bytes:
        """The bytes of a file, checked to be those that were saved."""
        path = HERE / name
        if not isinstance(name, str) or Path(name).name != name or name not in self.hashes:
            sys.exit(f"{name!r} is not listed among the files of this folder; copy it again")
        if path.is_symlink() or not path.is_file():
            sys.exit(f"{name} is missing, or no ordinary file; copy the folder again")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.hashes[name]:
            sys.exit(f"{name} was changed since it was saved; copy the folder again")
        return data

    def arrays(self, name: str = "example.npz") -> dict[str, Any]:
        """The example inputs and outputs, by name."""
        loaded = np.load(io.BytesIO(self.read(name)), allow_pickle=False)
        return {name: loaded[name] for name in sorted(loaded.files)}

    def load(self, name: str, threads: int | None, dtypes: list[str], without: Sequence[str] | None = None) -> Run:
        """The model in a file, as a function from a list of arrays to a list of arrays."""
        data = self.read(name)
        if name.endswith(".onnx"):
            return load_onnx(data, threads, without)
        if name.endswith(".xml"):
            return load_xml(data, self.read(f"{name.removesuffix('.xml')}.bin"), threads)
        if name.endswith(".pte"):
            return load_pte(data, threads, dtypes)
        if not name.endswith(".aoti.pt2"):
            return of_torch(load_pt2(data), threads, dtypes)
        if not self.trusted:
            sys.exit(f"{name} is machine code, which can do anything: if you trust who made it, add --trusted")
        import torch

        with tempfile.TemporaryDirectory() as folder:  # the checked bytes: the file may have changed
            path = Path(folder) / "model.pt2"
            path.write_bytes(data)
            return of_torch(torch._inductor.aoti_load_package(str(path)), threads, dtypes)


def load_onnx(data: bytes, threads: int | None, without: Sequence[str] | None = None) -> Run:
    """An ONNX model as a function on arrays; with `without`, these optimizers and idle spinning are off."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if threads:
        options.intra_op_num_threads = threads
    if without is not None:  # the settings of torchslim
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        data, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(without or ())
    )
    names = [input_.name for input_ in session.get_inputs()]
    return lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))


def load_xml(xml: bytes, weights: bytes, threads: int | None) -> Run:
    """An OpenVINO model as a function on arrays; floats stay float32 even on processors with bfloat16."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # else the import reports to its makers
    import openvino

    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    settings |= {"ENABLE_CPU_PINNING": False} | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
    core = openvino.Core()
    model = core.compile_model(core.read_model(xml, weights), "CPU", settings)
    request = model.create_infer_request()

    def run(arrays: list[Any]) -> list[Any]:
        results = request.infer(arrays, share_inputs=True)
        return [results[index] for index in range(len(model.outputs))]

    return run


def load_pte(data: bytes, threads: int | None, dtypes: list[str]) -> Run:
    """An ExecuTorch program as a function on arrays."""
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    if threads and portable_lib._threadpool_get_thread_count() != threads:  # before any program keeps the old threads
        portable_lib._unsafe_reset_threadpool(threads)
    program = Runtime.get().load_program(data)  # owns the bytes that its methods read: it must live as long as they do
    return of_torch(lambda *tensors: program.load_method("forward").execute(tensors), None, dtypes)


def of_torch(program: Any, threads: int | None, dtypes: list[str]) -> Run:
    """A torch program on flat tensors as a function on arrays."""
    import torch

    if threads:
        torch.set_num_threads(threads)

    def run(arrays: list[Any]) -> list[Any]:
        with torch.no_grad():
            tensors = [
                torch.from_numpy(array).to(getattr(torch, dtype)) for array, dtype in zip(arrays, dtypes, strict=True)
            ]
            outputs = program(*tensors)
        # numpy has no bfloat16
        return [(output.float() if output.dtype == torch.bfloat16 else output).numpy() for output in outputs]

    return run


def load_pt2(data: bytes) -> Any:
    """Module of an exported program, without `torch.export.load`, which unpickles, evaluates and calls anything."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = archive.infolist()
        if any(info.compress_type for info in infos) or sum(info.file_size for info in infos) > len(data):
            sys.exit("model.pt2 is compressed, or larger than it says; it is not read")
        entries = {info.filename.partition("/")[2]: archive.read(info) for info in infos}
    with contextlib.suppress(ImportError):
        import torchao.quantization.pt2e  # noqa: F401 - the operations of quantized programs
    return Program(entries).module()


class Program:
    """Builds a module from the graph and the weights of an exported program."""

    def __init__(self, entries: dict[str, bytes]) -> None:
        import torch
        from torch._export.serde import serialize

        self.torch, self.entries = torch, entries
        self.described = json.loads(entries["models/model.json"])["graph_module"]
        self.tables = {
            "as_scalar_type": serialize._SERIALIZE_TO_TORCH_DTYPE,
            "as_memory_format": serialize._SERIALIZE_TO_TORCH_MEMORY_FORMAT,
            "as_layout": serialize._SERIALIZE_TO_TORCH_LAYOUT,
        }
        self.graph, self.root = torch.fx.Graph(), torch.nn.Module()

    def module(self) -> Any:
        """The module; it takes flat tensors."""
        values: dict[str, Any] = {}
        tensors = self.held("weights", "model_weights") | self.held("constants", "model_constants")
        signature = self.described["signature"]
        for index, input_spec in enumerate(signature["input_specs"]):
            ((kind, about),) = input_spec.items()
            if kind == "user_input":
                name = self.name(about["arg"])
                values[name] = self.graph.placeholder(f"x{index}")
            elif kind == "constant_input":
                values[about["name"]] = None
            else:
                path = about.get("parameter_name") or about.get("buffer_name") or about["tensor_constant_name"]
                self.root.register_buffer(f"w{index}", tensors[path])
                values[self.name(about["arg"])] = self.graph.get_attr(f"w{index}")
        self.calls(self.described["graph"], values)
        outputs = [spec["user_output"]["arg"] for spec in signature["output_specs"] if "user_output" in spec]
        self.graph.output(tuple(self.value(output, values) for output in outputs))
        self.graph.eliminate_dead_code()
        return self.torch.fx.GraphModule(self.root, self.graph)

    def held(self, folder: str, config: str) -> dict[str, Any]:
        """The tensors of a folder, by their paths in the program."""
        tensors = {}
        for path, entry in json.loads(self.entries[f"data/{folder}/{config}_config.json"])["config"].items():
            meta = entry["tensor_meta"]
            dtype = self.tables["as_scalar_type"][meta["dtype"]]
            sizes, strides = ([size["as_int"] for size in meta[key]] for key in ("sizes", "strides"))
            stored = self.entries[f"data/{folder}/{entry['path_name']}"]
            if stored:
                flat = self.torch.frombuffer(bytearray(stored), dtype=dtype)
                tensors[path] = flat.as_strided(sizes, strides, meta["storage_offset"]["as_int"])
            elif 0 in sizes:
                tensors[path] = self.torch.empty(sizes, dtype=dtype)
            else:
                sys.exit(f"model.pt2 holds no numbers for {path!r}; it is not read")
        return tensors

    def calls(self, graph: dict[str, Any], values: dict[str, Any]) -> None:
        """Add the nodes of a part of the program to the graph."""
        for node in graph["nodes"]:
            args: list[Any] = []
            kwargs = {}
            for input_ in node["inputs"]:
                value = input_["arg"] if "as_graph" in input_["arg"] else self.value(input_["arg"], values)
                if input_["kind"] == 2:
                    kwargs[input_["name"]] = value
                else:
                    args.append(value)
            if ".higher_order." in node["target"]:
                result: Any = self.inside(node["target"].rpartition(".")[2], args, values)
            else:
                result = self.graph.call_function(self.target(node["target"]), tuple(args), kwargs)
            self.assign(node, result, values)

    def target(self, name: str) -> Any:
        """The operator `name`, which the program must have had when it was saved."""
        root, *parts = name.split(".")
        if name not in OPERATORS or root not in ("torch", "math", "_operator"):
            sys.exit(f"model.pt2 calls {name!r}, which it did not when it was saved; copy the folder again")
        function: Any = {"torch": self.torch, "math": math, "_operator": operator}[root]
        for part in parts:
            function = getattr(function, part)
        return function

    def inside(self, kind: str, args: list[Any], values: dict[str, Any]) -> list[Any]:
        """Outputs of a part of the program that is called with gradients or autocast off."""
        place = next(index for index, item in enumerate(args) if isinstance(item, dict) and "as_graph" in item)
        off = kind == "wrap_with_set_grad_enabled" or (kind == "wrap_with_autocast" and args[2] is False)
        if not off:
            sys.exit(f"this program holds {kind}, which bench.py cannot run; time it with torchslim bench")
        part = args[place]["as_graph"]["graph"]
        inner = dict(values)
        for inner_input, value in zip(part["inputs"], args[place + 1 :], strict=True):
            inner[self.name(inner_input)] = value
        self.calls(part, inner)
        return [self.value(output, inner) for output in part["outputs"]]

    def assign(self, node: dict[str, Any], result: Any, values: dict[str, Any]) -> None:
        """Store the results of a node under their names in the program."""
        if isinstance(result, list):
            names = [self.name(tensor) for output in node["outputs"] for tensor in self.spread(output)]
            values.update(zip(names, result, strict=True))
            return
        outputs = node["outputs"]
        for index, output in enumerate(outputs):
            own = result if len(outputs) == 1 else self.graph.call_function(operator.getitem, (result, index))
            if next(iter(output)) in ("as_tensors", "as_optional_tensors"):
                for place, part in enumerate(self.spread(output)):
                    values[self.name(part)] = self.graph.call_function(operator.getitem, (own, place))
            elif "as_none" not in output:
                values[self.name(output)] = own

    def spread(self, argument: dict[str, Any]) -> list[Any]:
        """The tensors of an argument: those of a list, or the argument itself."""
        content = next(iter(argument.values()))
        return [{"as_tensor": item} for item in content] if isinstance(content, list) else [argument]

    def name(self, argument: dict[str, Any]) -> str:
        """The name of a value in the program."""
        own = argument.get("name", argument.get("as_name"))
        return str(own) if own is not None else self.name(next(iter(argument.values())))

    def value(self, argument: dict[str, Any], values: dict[str, Any]) -> Any:
        """The value of a node's argument, as it is described in the program."""
        ((kind, content),) = argument.items()
        if kind in self.tables:
            return self.tables[kind][content]
        if kind == "as_device":
            return self.torch.device("cpu")
        if kind == "as_none":
            return None
        if kind == "as_name":
            return values[content]
        if kind == "as_tensor":
            return values[content["name"]]
        if kind in ("as_float", "as_floats"):  # numbers that JSON lacks are texts
            return [float(item) for item in content] if isinstance(content, list) else float(content)
        if isinstance(content, list):
            return [
                self.value(item if len(item) == 1 and "name" not in item else {"as_tensor": item}, values)
                if isinstance(item, dict)
                else item
                for item in content
            ]
        return self.value(content, values) if isinstance(content, dict) else content


def difference(found: Any, recorded: Any) -> float:
    """The largest difference of two arrays; NaN equals NaN."""
    found, recorded = np.asarray(found, np.float64), np.asarray(recorded, np.float64)
    same = (found == recorded) | (np.isnan(found) & np.isnan(recorded))
    return float(np.abs(found[~same] - recorded[~same]).max(initial=0.0))


def resized(arrays: list[Any], spec: dict[str, Any], batch: int | None) -> list[Any]:
    """The example inputs with `batch` samples, by default one, where the batch is free."""
    axis, sizes = spec["batch_axis"], spec["sizes"]
    if axis is None:
        return arrays
    index = np.arange(batch or 1)
    return [
        np.take(array, index % array.shape[axis], axis) if len(size) > axis and size[axis] is None else array
        for array, size in zip(arrays, sizes, strict=True)
    ]


def in_turn(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds a call, timed A B A B ..., so that drift of the machine affects all; short calls are repeated."""
    repeats = {}
    for name, call in calls.items():
        fastest = float("inf")
        for _ in range(10):
            start = time.perf_counter()
            call()
            fastest = min(fastest, time.perf_counter() - start)
        repeats[name] = max(1, round(ROUND_SECONDS / max(fastest, 1e-7)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return seconds


def time_pack(
    pack: dict[str, Any], folder: Folder, threads: int | None, rounds: int, batch: int | None
) -> dict[str, Any]:
    """Table of a packed folder: by row and width, the time divided by the whole model's, from paired rounds."""
    about, spec = dict(pack["about"]), pack["spec"]
    about["threads"] = threads or about["threads"]
    arrays = resized(list(folder.arrays().values()), spec, batch)

    def load(name: str) -> Run:
        return folder.load(name, about["threads"], spec["dtypes"], pack["disabled_optimizers"])

    whole_model = load(pack["whole"])
    rows: dict[str, dict[str, float]] = {}
    programs = pack["programs"]
    for start in range(0, len(programs), TOGETHER):
        group = programs[start : start + TOGETHER]
        runs = {"whole": whole_model} | {program["file"]: load(program["file"]) for program in group}
        seconds = in_turn({name: partial(run, arrays) for name, run in runs.items()}, rounds)
        for program in group:
            ratio = float(np.median(np.array(seconds[program["file"]]) / np.array(seconds["whole"])))
            rows.setdefault(program["row"], {})[str(program["width"])] = ratio
        print(f"{start + len(group)} of {len(programs)} programs timed", file=sys.stderr)
    return {"format": pack["gives"], "about": about, "machine": processor(), "rows": rows}


def time_artifacts(
    pack: dict[str, Any], folder: Folder, threads: int | None, rounds: int, batch: int | None
) -> dict[str, Any]:
    """Milliseconds of the artifacts of a packed folder by round, in turn, each on its own inputs."""
    calls, rows = {}, []
    for number, program in enumerate(pack["programs"]):
        spec, count = program["spec"], threads or program["threads"]
        run = folder.load(program["file"], count, spec["dtypes"], pack["disabled_optimizers"])
        arrays, worst = checked(run, folder.arrays(program["example"]), "")
        arrays = resized(arrays, spec, batch)
        calls[str(number)] = partial(run, arrays)
        about = {key: program[key] for key in ("name", "program", "runtime")}
        shapes = [list(array.shape) for array in arrays]
        difference_ = worst if math.isfinite(worst) else None
        rows.append({**about, "threads": count, "inputs": shapes, "largest_difference": difference_})
    seconds = in_turn(calls, rounds)
    programs = [{**row, "ms": [1e3 * value for value in seconds[str(number)]]} for number, row in enumerate(rows)]
    return {"format": pack["gives"], "version": 1, "machine": machine(), "programs": programs}


def checked(run: Run, example: dict[str, Any], prefix: str) -> tuple[list[Any], float]:
    """The example inputs whose names begin with `prefix`, and the largest difference to their recorded outputs."""
    arrays = [array for name, array in example.items() if name.startswith(f"{prefix}in")]
    expected = [array for name, array in example.items() if name.startswith(f"{prefix}out")]
    return arrays, max((difference(*pair) for pair in zip(run(arrays), expected, strict=True)), default=0.0)


def machine() -> dict[str, Any]:
    """Description of this machine."""
    system = f"{platform.system()} {platform.release()}"
    return {
        "processor": processor(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "system": system,
    }


def processor() -> str:
    """The name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_whole(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it: another process never reads a part of it."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".torchslim-tmp-") as folder:
        written = Path(folder, path.name)
        written.write_text(text)  # a plain file in the folder gets the permissions of the umask
        written.replace(path)


def main() -> None:
    """Check the outputs against those recorded when the model was saved, then time it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=None, help="default: what the model was saved with")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--batch", type=int, default=None, help="samples a call; default 1 where the batch is free")
    parser.add_argument("--trusted", action="store_true", help="run machine code, model.aoti.pt2, too")
    arguments = parser.parse_args()
    if any(number is not None and number < 1 for number in (arguments.rounds, arguments.batch, arguments.threads)):
        parser.error("rounds, batch and threads must be at least 1")
    if (HERE / "pack.json").is_file():
        pack = json.loads((HERE / "pack.json").read_text())
        folder = Folder(pack["files"], arguments.trusted)
        file, timer = ("times.json", time_artifacts) if pack["gives"] == TIMES else ("latency.json", time_pack)
        table = timer(pack, folder, arguments.threads, arguments.rounds, arguments.batch)
        write_whole(HERE / file, json.dumps(table, indent=1) + "\n")
        print(HERE / file)
        return
    manifest = json.loads((HERE / "artifact.json").read_text())
    folder = Folder(manifest["files"], arguments.trusted)
    threads = arguments.threads or manifest["threads"]
    example, spec = folder.arrays(), manifest["spec"]
    names = ("model.onnx", "model.xml", "model.pte", "model.aoti.pt2", "model.pt2")
    run = folder.load(next(name for name in names if name in manifest["files"]), threads, spec["dtypes"])
    timed = []
    for prefix in ("", "largest_"):  # the median-size example, and the largest one where sizes vary
        if f"{prefix}out000" in example:
            arrays, worst = checked(run, example, prefix)
            arrays = resized(arrays, spec, arguments.batch)
            seconds = in_turn({"it": partial(run, arrays)}, arguments.rounds)["it"]
            p10, median, p90 = np.percentile(seconds, [10, 50, 90]) * 1e3
            spread = {"median": median, "p10": p10, "p90": p90, "rounds": arguments.rounds}
            about = {"threads": threads, "inputs": [list(array.shape) for array in arrays]}
            timed.append({"latency_ms": spread, **about, "largest_difference_to_recorded_outputs": worst})
    print(json.dumps(timed[0] | ({"largest": timed[1]} if timed[1:] else {})))


if __name__ == "__main__":
    main()
