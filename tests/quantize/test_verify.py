"""Quantization is verified, else rolled back: in the graph, deployed, and saved."""

from __future__ import annotations

import copy
import json
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import torchslim as ts
from tests.support.sabotage import WAYS, Heads, Mixed, harm, harmful, images, small
from torchslim.artifact import deployment, shipped, storage
from torchslim.artifact.integer_coverage import lowered
from torchslim.core.reason import Reason
from torchslim.errors import DeployError, QuantizeError
from torchslim.quantize import Checks, QuantizedModule, convert, prepare, sqnr
from torchslim.quantize import rollback as rollback_module
from torchslim.quantize.conversion import integers
from torchslim.quantize.rollback import search
from torchslim.quantize.samples import float_outputs, outputs
from torchslim.quantize.units import units_of
from torchslim.runtimes import Deployed, Spec, find_runtime

QUICK = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def calibrated(model, batches, **options):
    prepared = prepare(model, batches[0], **options)
    prepared.calibrate(batches)
    return prepared


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model, batches = small((8, 8), 4), images()
    return model, batches, calibrated(model, batches)


def per_channel(reference, value):
    """The lowest signal over noise of any channel of dimension 1, variation around its mean against the difference."""
    rows, got = (each.movedim(1, 0).flatten(1).double() for each in (reference, value))
    noise = (rows - got).square().mean(1)
    return float((10 * (rows.var(1, correction=0) / noise).log10()).min())


# the graph ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*went back to float")
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "inductor", "eager", "aoti"])
@pytest.mark.parametrize("kind", [Heads, Mixed])
def test_every_channel_of_a_head_with_two_units_comes_back(kind, runtime):
    torch.manual_seed(0)
    model, batches = kind().eval(), images()
    found = ts.quantize.static(model, batches, runtime=runtime)
    x = torch.cat([each[0] for each in batches])
    with torch.no_grad():
        assert per_channel(model(x), found(x)) > 10


@pytest.mark.slow
def test_scores_in_the_last_dimension_are_seen_too():
    torch.manual_seed(0)
    model, batches = Heads(last=True).eval(), images()
    with mock.patch.object(rollback_module, "integers", harmful("score", "dead")):
        prepared = calibrated(model, batches, runtime="eager")
        with pytest.warns(UserWarning, match=r"score went back to float.*channel \d \(dimension 2\)"):
            found = convert(prepared)
    x = torch.cat([each[0] for each in batches])
    with torch.no_grad():
        assert per_channel(model(x).transpose(1, 2), found(x).transpose(1, 2)) > 10
    assert {each.layer: each.action for each in found.records}["score"] == "refused"


@pytest.mark.slow
@QUICK
@given(place=st.integers(0, 3), how=st.sampled_from(WAYS))
@pytest.mark.filterwarnings("ignore:.*went back to float")
def test_a_layer_that_the_graph_gets_wrong_goes_back_to_float(net, place, how):
    _, _, prepared = net
    layer = [each.layer for each in units_of(prepared.program)][place]
    with mock.patch.object(rollback_module, "integers", harmful(layer, how)):
        found = convert(prepared)
    evidence = found.evidence
    assert evidence is not None
    answers = outputs(found.program, evidence.runs)
    assert evidence.off(answers) == []
    assert {key.removeprefix("layer ") for key in evidence.released} <= {layer}
    if how != "dead channel":  # of one channel inside of a network its outputs may keep enough
        assert evidence.released
        assert [each.layer for each in found.records if each.action == "refused"] == [layer]
        assert layer in found.notes[0]


def test_where_nothing_is_off_nothing_changes(net):
    _, batches, prepared = net
    found, plain = convert(prepared), integers(prepared)
    assert torch.equal(found(*batches[0]), plain(*batches[0]))
    assert (found.notes, found.evidence.released) == ([], {})
    assert found.records == prepared.records
    assert found.evidence.worst.decibels > 10
    assert len(found.state_dict()) == len(plain.state_dict())


@pytest.mark.slow
def test_what_no_layer_is_to_blame_for_is_an_error(net):
    _, _, prepared = net

    def useless(given, released=()):
        return harm(integers(given), "10", "nan")  # whatever is released

    with (
        mock.patch.object(rollback_module, "integers", useless),
        pytest.raises(QuantizeError, match="cannot be verified.*output.*not finite"),
    ):
        convert(prepared)


@pytest.mark.slow
def test_checks_can_be_left_out_or_set(net):
    _, _, prepared = net
    with mock.patch.object(rollback_module, "integers", harmful("10", "dead")):
        assert convert(prepared, checks=None).evidence is None
    with pytest.warns(UserWarning, match="went back to float"):
        strict = convert(prepared, checks=Checks(channel_db=56.0))
    assert strict.evidence.released
    assert ts.Quantize("int8", checks={"channel_db": 12.0}).checks == Checks(channel_db=12.0)


@pytest.mark.slow
@given(seed=st.integers(0, 100), data=st.data())
@settings(max_examples=4, deadline=None)
def test_units_in_float_compute_what_float_does(seed, data):
    torch.manual_seed(seed)
    batches = images(2, 4)
    prepared = calibrated(data.draw(st.sampled_from([Heads().eval(), small((4,), 3)])), batches)
    units = units_of(prepared.program)
    runs = prepared.samples.runs(8)
    expected = float_outputs(prepared.program, runs)
    made = integers(prepared, [unit.key for unit in units])
    assert not any("quantized_decomposed" in str(node.target) for node in made.program.graph.nodes)
    for one, other in zip(expected[0], outputs(made.program, runs)[0], strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))
    some = data.draw(st.sets(st.sampled_from([unit.key for unit in units])))
    assert len(outputs(integers(prepared, some).program, runs)) == len(runs)


# searching ------------------------------------------------------------------------------------------------------------


class _Fault:
    kind, short = "output", 5.0

    def told(self, names):
        return "off"


@given(count=st.integers(1, 40), data=st.data())
@settings(max_examples=40, deadline=None)
def test_the_culprits_are_found_by_bisection(count, data):
    units = [mock.Mock(key=f"u{index}", operation="") for index in range(count)]
    bad = data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=4))
    looks = []

    def look(released):
        looks.append(released)
        return [_Fault() for index in bad if f"u{index}" not in released]

    found = search(units, look, look(frozenset()), [""])
    assert found is not None
    assert set(found) == {f"u{index}" for index in bad}
    assert len(looks) <= 3 + len(bad) * (1 + (count - 1).bit_length())


# deployed -------------------------------------------------------------------------------------------------------------


def harmed(runtime, layer, how, inputs):
    """Compiles as a runtime does that gets a layer wrong."""

    def compile_(model):
        return find_runtime(runtime).compile(harm(model, layer, how), inputs)

    return compile_


@pytest.mark.slow
@pytest.mark.parametrize(("runtime", "how"), [("eager", "dead"), ("onnxruntime", "shifted"), ("openvino", "nan")])
def test_a_layer_that_a_runtime_gets_wrong_goes_back_to_float(runtime, how):
    torch.manual_seed(1)
    model, batches = (
        nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval(),
        [(torch.randn(8, 6),) for _ in range(2)],
    )
    quantized = ts.quantize.static(model, batches, runtime=runtime)
    layer = "2"
    deployed = deployment.verified(quantized, harmed(runtime, layer, how, batches[0]))
    assert deployed.made_from is not None
    assert deployment.off(deployed.made_from, deployed) == []
    assert [each.layer for each in deployed.records if each.action == "refused"] == [layer]
    assert sqnr(model(*batches[0]), deployed(*batches[0])) > 20
    assert any(layer in note and runtime in note for note in deployed.spec.notes)
    table = {each.layer: each for each in lowered(deployed, quantized.records).layers}
    assert not table[layer].integer
    assert Reason.BACK_IN_FLOAT.given_in(table[layer].why)


@pytest.mark.slow
def test_a_deployed_model_that_is_wrong_in_float_too_is_an_error(net):
    _, batches, prepared = net
    quantized = convert(prepared)

    def compile_(each):
        deployed = find_runtime("eager").compile(each, batches[0])
        session = deployed.session
        deployed.session = lambda leaves: [2 * value for value in session(leaves)]
        return deployed

    with pytest.raises(DeployError, match="all layers in float.*output.* dB"):
        deployment.verified(quantized, compile_)


@pytest.mark.slow
def test_a_deployed_model_that_fails_on_its_own_samples_is_an_error(net):
    _, batches, prepared = net

    def compile_(each):
        deployed = find_runtime("eager").compile(each, batches[0])
        deployed.session = mock.Mock(side_effect=RuntimeError("no memory"))
        return deployed

    with pytest.raises(DeployError, match="RuntimeError: no memory"):
        deployment.verified(convert(prepared), compile_)


@pytest.mark.slow
def test_the_check_costs_one_pass_of_each(net):
    _, batches, prepared = net
    ran = []

    def counted(program, runs, *switches):
        ran.extend("graph" for _ in runs)
        return outputs(program, runs, *switches)

    def in_float(program, runs):
        ran.extend("float" for _ in runs)
        return float_outputs(program, runs)

    with (
        mock.patch.object(rollback_module, "outputs", counted),
        mock.patch.object(rollback_module, "float_outputs", in_float),
    ):
        quantized = convert(prepared)
    assert sorted(ran) == ["float", "graph"]
    run = Deployed.run

    def deployed_run(self, leaves):
        ran.append("deployed")
        return run(self, leaves)

    for shapes, extra in (("batch", 1), (None, 2)):  # a fixed batch takes fewer samples: two calls
        ran.clear()
        with mock.patch.object(Deployed, "run", deployed_run), mock.patch.object(deployment, "outputs", counted):
            deployed = ts.deploy(quantized, batches[0], runtime="eager", dynamic_shapes=shapes)
        assert ran == ["deployed"] * extra
        assert deployed.made_from is None
        plain = find_runtime("eager").compile(quantized, batches[0], shapes)
        assert torch.equal(deployed(*batches[0]), plain(*batches[0]))


@pytest.mark.slow
def test_other_sizes_than_those_calibrated_on_are_checked_on_the_example():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    quantized = ts.quantize.static(model, images(2, 4, 12), runtime="eager")
    other = (torch.randn(2, 3, 12, 12),)
    with mock.patch.object(Spec, "fits", return_value=False):
        deployed = ts.deploy(quantized, other, runtime="eager")
    assert deployed.made_from is None


@pytest.mark.slow
def test_calibration_batches_of_several_lengths_are_runs_of_their_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3)).eval()
    fixed = ts.quantize.static(model, [(torch.randn(2, 4, 16),), (torch.randn(2, 4, 16),)], runtime="eager")
    assert [len(run[0]) for run in fixed.evidence.runs] == [4]
    single = nn.Sequential(nn.Flatten(0), nn.Linear(32, 8)).eval()  # no batch
    alone = ts.quantize.static(single, [(torch.randn(4, 8),) for _ in range(3)], runtime="eager")
    assert len(alone.evidence.runs) == 2


# copies, and the other ways of quantizing -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_copy_shares_the_evidence_and_what_comes_later_does_not_reach_it(net):
    model, batches, _ = net
    mine = calibrated(model, batches)
    quantized = convert(mine)
    copied = copy.deepcopy(quantized)
    assert copied.evidence is quantized.evidence
    before = integers(quantized.evidence.prepared)(*batches[0])
    mine.calibrate([(100 * batches[0][0],)])
    assert torch.equal(integers(quantized.evidence.prepared)(*batches[0]), before)
    parameters = {id(each) for each in mine.program.parameters()}
    assert all(id(each) in parameters for each in quantized.evidence.program.parameters())  # no second copy in memory


@pytest.mark.slow
def test_weights_and_dynamic_ranges_are_checked_on_what_there_is():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    batches = [(torch.randn(8, 64),) for _ in range(3)]
    for made, samples in (
        (ts.quantize.dynamic(model, batches[0], runtime="eager"), 8),
        (ts.quantize.weights(model, batches[0], bits=4, runtime="eager"), 8),
        (ts.quantize.weights(model, batches[0], bits=8, batches=batches), 24),
    ):
        assert isinstance(made, QuantizedModule)
        assert sum(len(run[0]) for run in made.evidence.runs) == samples
        assert made.evidence.released == {}


@pytest.mark.filterwarnings("ignore:.*went back to float")
def test_a_model_trained_on_the_grid_is_checked_against_what_was_trained():
    torch.manual_seed(0)
    model, batches = Heads().eval(), images()
    prepared = prepare(model, batches[0], qat=True)
    prepared.calibrate(batches)
    optimizer = torch.optim.SGD(prepared.parameters(), 1e-4)
    prepared.train()
    for batch in batches:
        (prepared(*batch) / 640).square().mean().backward()
        optimizer.step()
    prepared.eval()
    found = convert(prepared)
    assert found.evidence.trained is not found.evidence.reference
    x = torch.cat([each[0] for each in batches])
    assert float(found(x)[:, 4:].std()) > 0
    assert found.evidence.off(outputs(found.program, found.evidence.runs)) == []


@pytest.mark.slow
def test_rounded_weights_are_compared_with_those_from_before(net):
    model, batches, _ = net
    helpers = ts.quantize.Helpers(rounding="gptq", correct_biases=True)
    found = ts.quantize.static(model, batches, helpers=helpers, runtime="eager")
    expected = torch.cat([found.evidence.reference[0][0]])
    with torch.no_grad():
        assert torch.allclose(model(*found.evidence.runs[0]), expected, rtol=1e-4, atol=1e-4)


# a run ----------------------------------------------------------------------------------------------------------------


def run_task(batches, targets):
    pairs = [(x, y) for (x,), y in zip(batches, targets, strict=True)]
    return ts.Task(train=pairs, val=pairs, metric=lambda predict, given: 1.0)


@pytest.mark.slow
def test_a_run_checks_what_it_deploys_and_what_it_keeps(tmp_path):
    torch.manual_seed(0)
    model, batches = small((6,), 3), images()
    task = run_task(batches, [torch.zeros(8).long()] * 3)
    compiled = find_runtime("onnxruntime").compile

    def bench(self, model):
        harmed_model = harm(model, "7", "dead") if isinstance(model, QuantizedModule) else model
        return compiled(harmed_model, self.example_inputs)

    with mock.patch("torchslim.pipeline.target_bench.Bench.compile", bench):
        result = ts.compress(model, task, [ts.Quantize("int8")], workdir=tmp_path / "run")
    row = result.run["rows"][1]
    record = next(each for each in row["layers"] if each["layer"] == "7")
    assert (record["action"], record["integer"]) == ("refused", False)
    assert "on onnxruntime" in record["reason"]
    assert any("7 went back to float" in each for each in row["warnings"])
    assert sqnr(model(*batches[0]), result.deployed(*batches[0])) > 15
    assert sqnr(result.model(*batches[0]), result.deployed(*batches[0])) > 30
    json.dumps(result.run)
    again = ts.compress(model, task, [ts.Quantize("int8")], workdir=tmp_path / "run")
    assert again.run["rows"][1]["layers"] == row["layers"]
    assert torch.equal(again.deployed(*batches[0]), result.deployed(*batches[0]))


@pytest.mark.slow
def test_an_artifact_that_answers_otherwise_is_made_again_with_layers_in_float(tmp_path):
    torch.manual_seed(0)
    model, batches = small((6,), 3), images()
    task = run_task(batches, [torch.zeros(8).long()] * 3)
    real = shipped.load_opened

    def load(opened, **options):
        deployed = real(opened, **options)
        if any(each["layer"] == "7" and each["weight_bits"] == 8 for each in deployed.spec.layers):
            session = deployed.session
            deployed.session = lambda leaves: [0 * value for value in session(leaves)]
        return deployed

    with mock.patch.object(shipped, "load_opened", load):
        result = ts.compress(model, task, [ts.Quantize("int8")], runtime="eager", workdir=tmp_path / "run")
    layers = {each["layer"]: each["action"] for each in result.run["rows"][1]["layers"]}
    assert layers == {"0": "quantized", "5": "quantized", "7": "refused"}
    assert result.run["rows"][1]["evidence"]["worst_channel"]["sqnr_db"] > 10


@pytest.mark.slow
def test_a_saved_model_is_loaded_and_asked_again(net, tmp_path):
    _, batches, prepared = net
    deployed = ts.deploy(convert(prepared), batches[0], runtime="eager")
    ts.save(deployed, tmp_path / "right")
    real = storage.load_opened

    def load(opened, **options):
        loaded = real(opened, **options)
        session = loaded.session
        loaded.session = lambda leaves: [1.1 * value for value in session(leaves)]
        return loaded

    with (
        mock.patch.object(storage, "load_opened", load),
        pytest.raises(storage.ArtifactError, match="other outputs"),
    ):
        ts.save(deployed, tmp_path / "wrong")
