"""The simulated device itself: it behaves as a GPU where layershed could tell the difference."""

import copy
import io

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.support.models import build_model
from tests.support.simulated.tensors import waits

CPU = torch.arange(6.0).view(2, 3)


def test_tensor_says_its_device_and_holds_its_numbers():
    x = CPU.to("sim")
    assert (x.device, x.is_cpu, x.shape) == (torch.device("sim", 0), False, CPU.shape)
    assert x.tolist() == CPU.tolist()
    assert torch.equal((x @ x.T).cpu(), CPU @ CPU.T)
    assert torch.zeros(2, device="sim").device == x.device == torch.tensor([1], device="sim").device
    assert torch.cuda.is_available() is False


MIXED = {
    "sum": lambda x: x + CPU,
    "matrix product": lambda x: x @ CPU.T,
    "in place": lambda x: CPU.clone().add_(x),
    "number changed in place": lambda x: torch.tensor(1.0).add_(x.sum()),
    "list": lambda x: torch.cat([x, CPU]),
    "number in a list": lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),
    "layer": lambda x: nn.Linear(3, 2)(x),
    "table": lambda x: nn.Embedding(6, 2)(x.long()),
    "mask": lambda x: CPU[x > 2],
    "written values": lambda x: x.index_put_((torch.tensor([0]),), CPU[0]),
    "selected rows": lambda x: x.index_select(0, torch.tensor([0])),
}


@pytest.mark.parametrize("name", MIXED)
def test_mixing_with_tensors_of_the_cpu_raises(name):
    with pytest.raises(RuntimeError, match="on the same device"):
        MIXED[name](CPU.to("sim"))


def test_numbers_and_indices_of_the_cpu_may_be_mixed_in():
    x = CPU.to("sim")
    assert (x * torch.tensor(2.0)).tolist() == (CPU * 2).tolist()
    assert x[torch.tensor([1])].tolist() == CPU[[1]].tolist()


def test_numpy_refuses_a_tensor_of_the_device():
    with pytest.raises(TypeError, match="numpy"):
        CPU.to("sim").numpy()


WAITING = {
    "item": (lambda x: x.sum().item(), {"read": 1}),
    "truth": (lambda x: bool(x.any()), {"read": 1}),
    "list": (lambda x: x.tolist(), {"read": 1}),
    "copy to the cpu": (lambda x: x.cpu(), {"read": 1}),
    "equality": (lambda x: torch.equal(x, x + 1), {"read": 1}),
    "selection": (lambda x: x[x > 2], {"shape": 1}),
    "nonzero": (lambda x: x.nonzero(), {"shape": 1}),
    "written selection": (lambda x: x.index_put_((x > 2,), x[0].clone()), {"shape": 1}),
    "copy to the device": (lambda x: CPU.to("sim"), {"sent": 1}),
    "made from a list": (lambda x: torch.tensor([1.0], device="sim"), {"sent": 1}),
    "index in a list": (lambda x: x[:, [0, 1]], {"sent": 1}),
    "index of the cpu": (lambda x: x[torch.tensor([0])], {"sent": 1}),
    "queue": (lambda x: torch.accelerator.synchronize(x.device), {"queue": 1}),
    "arithmetic": (lambda x: (x @ x.T).softmax(-1).sum(), {}),
    "filled selection": (lambda x: x.masked_fill(x > 2, 0.0), {}),
    "filled by a mask": (lambda x: x.__setitem__(x > 2, 0.0), {}),
    "early copy": (lambda x: CPU.to("sim", non_blocking=True), {}),
    "new": (lambda x: (x.new_ones(2), torch.zeros(2, device="sim"), torch.zeros_like(x)), {}),
}


@pytest.mark.parametrize("name", WAITING)
def test_what_the_host_waits_for_is_counted(name):
    act, expected = WAITING[name]
    x = CPU.to("sim")
    with waits() as noted:
        act(x)
    assert dict(noted) == expected


def test_copy_is_independent_and_keeps_ties():
    model = build_model("gpt2").to("sim")
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is twin.transformer.wte.weight
    assert isinstance(twin.lm_head.weight, nn.Parameter)
    assert twin.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()
    before = model.lm_head.weight.tolist()
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert model.lm_head.weight.tolist() == before


def test_moved_parameters_stay_the_same_objects_and_train():
    model = build_model("gpt2")
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    model.to("sim")
    assert all(own is other for own, other in zip(model.parameters(), parameters, strict=True))
    assert model.lm_head.weight is model.transformer.wte.weight
    before = parameters[0].tolist()
    model(input_ids=torch.ones(1, 4, dtype=torch.long, device="sim")).logits.sum().backward()
    optimizer.step()
    assert parameters[0].tolist() != before
    model.cpu()
    assert {parameter.device.type for parameter in parameters} == {"cpu"}


@pytest.mark.parametrize(("place", "device"), [(None, "sim"), ("cpu", "cpu"), (lambda storage, _: storage, "cpu")])
def test_saved_tensors_come_back_where_they_were_or_are_wanted(place, device):
    file = io.BytesIO()
    torch.save({"weight": CPU.to("sim"), "parameter": nn.Parameter(CPU.to("sim"))}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True, map_location=place)
    assert {value.device.type for value in loaded.values()} == {device}
    assert all(value.tolist() == CPU.tolist() for value in loaded.values())
    assert isinstance(loaded["parameter"], nn.Parameter)
    assert not isinstance(loaded["weight"], nn.Parameter)


def test_safetensors_hold_its_numbers(tmp_path):
    save_file({"x": CPU.to("sim"), "y": CPU.to("sim").T.contiguous()}, tmp_path / "x.safetensors")
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded["x"].tolist() == CPU.tolist()
    assert loaded["y"].tolist() == CPU.T.tolist()


def test_views_share_their_memory():
    x = CPU.to("sim")
    row = x[1]
    row.zero_()
    assert x.tolist()[1] == [0, 0, 0]
    assert row.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert row.data_ptr() - x.data_ptr() == 3 * x.element_size()
