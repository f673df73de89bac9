"""The pretend GPUs themselves: they answer as real ones do, raise where CUDA would, and count where the host waits."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.pretend import MixedDevicesError, PretendGpus, placed
from tests.tiny import tiny_model

CUDA0, CUDA1 = torch.device("cuda:0"), torch.device("cuda:1")


def test_tensors_say_where_they_are_and_compute_there() -> None:
    values = torch.arange(6.0).reshape(2, 3)
    with PretendGpus(2) as gpus:
        there = values.to("cuda:1")
        made = torch.tensor([1.0, 2.0, 3.0], device="cuda:0")
        assert there.device == CUDA1 and there.is_cuda and made.device == CUDA0
        assert (there + 1).device == there[:, None].device == torch.zeros_like(there).device == CUDA1
        assert torch.zeros(2, device=CUDA0).device == there.new_zeros(2, device="cuda:0").device == CUDA0
        assert values.device == there.cpu().device == torch.device("cpu")
        assert torch.equal((there.to(CUDA0) @ made).cpu(), values @ torch.tensor([1.0, 2.0, 3.0]))
        with torch.inference_mode():
            assert torch.equal(there.mul(2).cpu(), values * 2)
    assert sum(gpus.uploads.values()) == 2 and sum(gpus.moves.values()) == 1
    assert not torch.cuda.is_available(), "the pretence is over"
    with pytest.raises(RuntimeError, match="outlives the pretence"):
        there + 1


def test_what_is_written_is_written_into_the_tensor() -> None:
    with PretendGpus():
        made = torch.zeros(3, 4, device="cuda:0")
        made[1] = torch.ones(4, device="cuda:0")
        made[:, 2:] = 5.0
        made[torch.tensor([0, 2], device="cuda:0"), 0] = torch.tensor([7.0, 8.0], device="cuda:0")
        made[0].add_(1)
        expected = [[8.0, 1.0, 6.0, 6.0], [1.0, 1.0, 5.0, 5.0], [8.0, 0.0, 5.0, 5.0]]
        assert made.tolist() == expected
        array = np.array(expected)
        for index in (np.s_[..., None, 1], np.s_[1], np.s_[:, [0, 3]], np.s_[-1, ::2], np.s_[None, 0:2, 3]):
            assert made[index].tolist() == array[index].tolist()
        assert made[made > 6].tolist() == array[array > 6].tolist()


HERE, THERE, FAR = "cpu", "cuda:0", "cuda:1"


@pytest.mark.parametrize(
    "mixing",
    [
        lambda make: make(THERE) + make(FAR),
        lambda make: make(HERE) + make(THERE),
        lambda make: make(HERE).add_(make(THERE)),
        lambda make: make(THERE) @ make(HERE),
        lambda make: torch.cat([make(THERE), make(FAR)]),
        lambda make: torch.cat([make(THERE), make(HERE)]),
        lambda make: make(THERE)[torch.tensor([0], device=FAR)],
        lambda make: make(HERE)[torch.tensor([0], device=THERE)],
        lambda make: make(THERE).gather(1, torch.tensor([[0]])),
        lambda make: make(THERE).index_add_(0, torch.tensor([0]), make(THERE)[:1]),
        lambda make: make(THERE).index_put_((torch.tensor([0]),), make(HERE)[:1]),
        lambda make: torch.nn.functional.embedding(torch.tensor([1]), make(THERE)),
        lambda make: torch.where(make(THERE) > 0, make(THERE), make(FAR)),
        lambda make: make(HERE).mul_(make(THERE)[0, 0]),
    ],
)
def test_what_mixes_devices_fails(mixing: Callable[[Callable[[str], Tensor]], Tensor]) -> None:
    with PretendGpus(2), pytest.raises(MixedDevicesError, match=r"tensors on c.*, c.*, at tests/test_pretend.py"):
        mixing(lambda device: torch.ones(2, 2, device=device))


def test_what_cuda_allows_passes() -> None:
    with PretendGpus(2) as gpus:
        there = torch.ones(2, 2, device="cuda:0")
        number = torch.tensor(3.0)
        assert (there * number).tolist() == (number * there).tolist() == [[3.0, 3.0]] * 2
        assert torch.where(there > 0, there, number).tolist() == [[1.0, 1.0]] * 2
        gpus.uploads.clear()
        assert there[torch.tensor([1])].device == CUDA0, "CUDA brings indices along"
        assert sum(gpus.uploads.values()) == 1
        here = torch.zeros(2, 2)
        here.copy_(there)
        assert here.tolist() == [[1.0, 1.0]] * 2
        with pytest.raises((TypeError, RuntimeError), match="numpy"):
            there.numpy()
        with pytest.raises(RuntimeError, match="invalid device ordinal 2"):
            there.to("cuda:2")


@pytest.mark.parametrize(
    ("waiting", "times"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: float(x[0]), 1),
        (lambda x: int(x[0]), 1),
        (lambda x: bool((x > 0).all()), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: torch.zeros(4).copy_(x), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 1], 1),
        (lambda x: torch.bincount(x.long()), 1),
        (lambda x: x.masked_select(x > 1), 1),
        (lambda x: torch.repeat_interleave(x, x.long()), 1),
        (lambda x: x.unique(), 1),
        (lambda x: x * 2 + x.cumsum(0), 0),
        (lambda x: x[torch.tensor([1], device=x.device)], 0),
        (lambda x: x.sort().values.clamp(min=1).to(torch.int32), 0),
        (lambda x: x.index_fill(0, torch.tensor([1], device=x.device), 2.0), 0),
        (lambda x: x.masked_fill(x > 1, 0.0), 0),
        (lambda x: x.to("cuda:0"), 0),
    ],
)
def test_what_the_host_waits_for_is_counted(waiting: Callable[[Tensor], object], times: int) -> None:
    with PretendGpus() as gpus:
        there = torch.arange(4.0).to("cuda:0")
        waiting(there)
    assert sum(gpus.waits.values()) == times
    assert all("at tests/test_pretend.py:" in line for line in gpus.waits)


@pytest.mark.parametrize("gpus", [1, 2])
def test_a_model_is_placed_and_computes_what_it_does_on_the_cpu(gpus: int) -> None:
    tokens = torch.arange(40).reshape(2, 20)
    with sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        expected = tiny_model("qwen3_moe")(input_ids=tokens).logits
    with PretendGpus(gpus), torch.inference_mode():
        model = placed(tiny_model("qwen3_moe"), gpus)
        assert {str(weight.device) for weight in model.parameters()} == {"cuda:0", "cuda:1"} - {f"cuda:{gpus}"}
        assert model.base_model.layers[-1].mlp.gate.weight.device == torch.device("cuda", gpus - 1)
        assert torch.equal(model(input_ids=tokens.to(model.device)).logits.cpu(), expected)
