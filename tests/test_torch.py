"""`fastlstm.torch` beside `torch.nn.LSTM`: results, gradients, weights that change, and what a model goes through."""

import copy
import io
import itertools
import pickle
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
from conftest import SOURCES, environment, run_python

import fastlstm

torch = pytest.importorskip("torch")
ft = pytest.importorskip("fastlstm.torch")

from torch import nn  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")

T, N, I, H, P = 7, 5, 3, 11, 4
LAYOUTS = ["TNI", "NTI", "TI", "sorted", "unsorted", "unsorted-NTI"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Keep torch to one thread: on a busy machine its threads wait for each other; that takes minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _fresh():
    """Seed torch, and let every fallback warn again."""
    torch.manual_seed(0)
    ft._warned.clear()


def pair(*sizes, **settings):
    """A `fastlstm.torch.LSTM` and a `torch.nn.LSTM` with the same weights."""
    ours, theirs = ft.LSTM(*sizes, **settings), nn.LSTM(*sizes, **settings)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def make_input(layout, dtype):
    """An input in a layout; packed ones have lengths from 1 to T."""
    lengths = [T, 5, 5, 2, 1] if layout == "sorted" else [2, T, 1, 5, 5]
    if layout == "TI":
        return torch.randn(T, I, dtype=dtype)
    if layout == "NTI":
        return torch.randn(N, T, I, dtype=dtype)
    x = torch.randn(T, N, I, dtype=dtype)
    return x if layout == "TNI" else pack_padded_sequence(x, lengths, enforce_sorted=layout == "sorted")


def make_state(module, layout, dtype):
    count = module.num_layers * (2 if module.bidirectional else 1)
    rows = () if layout == "TI" else (N,)
    sizes = module.proj_size or module.hidden_size, module.hidden_size
    return tuple(torch.randn(count, *rows, size, dtype=dtype) for size in sizes)


def data_of(x):
    return x.data if isinstance(x, PackedSequence) else x


def run(module, x, hx, cotangents=None):
    """Return the results of a call and, under random cotangents for all of them, every gradient."""
    leaf = data_of(x).detach().clone().requires_grad_()
    x = x._replace(data=leaf) if isinstance(x, PackedSequence) else leaf
    hx = None if hx is None else tuple(part.detach().clone().requires_grad_() for part in hx)
    output, state = module(x, hx)
    if isinstance(x, PackedSequence):
        assert type(output) is PackedSequence
        for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            assert getattr(output, name) is getattr(x, name)
    results = [data_of(output), *state]
    generator = torch.Generator().manual_seed(1)
    loss = sum((torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype) * r).sum() for r in results)
    inputs = [leaf, *(hx or ()), *module.parameters()]
    return [r.detach() for r in results] + list(torch.autograd.grad(loss, inputs))


def assert_near(actual, expected, slack=0.0):
    """Compare lists of tensors, to 100 roundings of the largest number in each or to what the caller knows of."""
    assert len(actual) == len(expected)
    for got, want in zip(actual, expected, strict=True):
        assert got.shape == want.shape
        limit = 100 * torch.finfo(got.dtype).eps * max(1, want.abs().max().item())
        assert (got.double() - want.double()).abs().max() <= max(limit, slack)


# Results and gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("state", [False, True], ids=["", "state"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "settings",
    [
        dict(zip(("num_layers", "bidirectional", "proj_size", "bias"), values, strict=True))
        for values in itertools.product((1, 2), (False, True), (0, P), (True, False))
    ],
    ids=lambda settings: "-".join(f"{name}={value}" for name, value in settings.items()),
)
def test_results_and_gradients(settings, layout, state, dtype):
    ours, theirs = pair(I, H, batch_first=layout.endswith("NTI"), dtype=dtype, **settings)
    x = make_input(layout, dtype)
    hx = make_state(ours, layout, dtype) if state else None
    assert_near(run(ours, x, hx), run(theirs, x, hx))
    ours.eval()
    assert_near(run(ours, x, hx), run(theirs, x, hx))
    with torch.no_grad():
        output, state = ours(x, hx)
        expected, expected_state = theirs(x, hx)
    assert not data_of(output).requires_grad
    assert_near([data_of(output), *state], [data_of(expected), *expected_state])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["TNI", "NTI", "TI", "unsorted"])
def test_gradcheck(layout, training):
    lstm = ft.LSTM(2, 3, 2, batch_first=layout == "NTI", bidirectional=True, proj_size=2, dtype=torch.float64)
    lstm.train(training)
    x = torch.randn((2, 3, 2) if layout != "TI" else (3, 2), dtype=torch.float64)
    packed = pack_sequence([x[0], x[1, :2]], enforce_sorted=False) if layout == "unsorted" else None
    rows = () if layout == "TI" else (2,) if layout in ("NTI", "unsorted") else (3,)
    h_0, c_0 = torch.randn(4, *rows, 2, dtype=torch.float64), torch.randn(4, *rows, 3, dtype=torch.float64)

    def call(x, h_0, c_0, *weights):
        parameters = dict(zip(lstm.state_dict(), weights, strict=True))
        given = x if packed is None else packed._replace(data=x)
        output, state = torch.func.functional_call(lstm, parameters, (given, (h_0, c_0)))
        return data_of(output), *state

    leaves = [x if packed is None else packed.data, h_0, c_0, *(p.detach().clone() for p in lstm.parameters())]
    assert torch.autograd.gradcheck(call, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives_are_refused(training):
    lstm = ft.LSTM(I, H).train(training)
    x = torch.randn(T, N, I, requires_grad=True)
    (d_x,) = torch.autograd.grad(lstm(x)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first order"):
        d_x.sum().backward()


@pytest.mark.parametrize("used", range(3), ids=["output", "h_n", "c_n"])
def test_one_result_alone(used, monkeypatch):
    given, backward = [], ft.Tape.backward

    def watched(tape, d_output, d_state):
        given.extend((d_output, *d_state))
        return backward(tape, d_output, d_state)

    monkeypatch.setattr(ft.Tape, "backward", watched)
    ours, theirs = pair(I, H, 2, dtype=torch.float64)
    x = torch.randn(T, N, I, dtype=torch.float64)
    for module in (ours, theirs):
        output, state = module(x)
        (output, *state)[used].sum().backward()
    assert [part is not None for part in given] == [i == used for i in range(3)]
    assert_near([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])


def test_gradients_only_of_what_asks_for_them():
    ours, theirs = pair(I, H, dtype=torch.float64)
    for module in (ours, theirs):
        module.weight_hh_l0.requires_grad_(False)
        module(torch.ones(T, N, I, dtype=torch.float64))[0].sum().backward()
    assert ours.weight_hh_l0.grad is None
    assert_near([ours.weight_ih_l0.grad], [theirs.weight_ih_l0.grad])
    h_0, c_0 = torch.zeros(1, N, H), torch.zeros(1, N, H, requires_grad=True)
    frozen = ft.LSTM(I, H).requires_grad_(False)
    frozen(torch.ones(T, N, I), (h_0, c_0))[0].sum().backward()
    assert c_0.grad.abs().sum() > 0
    assert all(p.grad is None for p in frozen.parameters())


def test_gradients_share_no_memory():
    lstm = ft.LSTM(I, H, 2)
    lstm(torch.ones(T, N, I))[0].sum().backward()
    for a, b in itertools.combinations([p.grad.numpy() for p in lstm.parameters()], 2):
        assert not np.shares_memory(a, b)


def strided(x):
    """The same numbers in memory that is not contiguous: transposed, every other one of a row, repeated."""
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1])
    wide[..., ::2] = x
    return {
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": wide[..., ::2],
        "fortran": x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    }


@pytest.mark.parametrize("kind", ["transposed", "sliced", "fortran"])
def test_strided_input(kind):
    ours, theirs = pair(I, H)
    x, hx = strided(make_input("TNI", torch.float32))[kind], make_state(ours, "TNI", torch.float32)
    hx = tuple(strided(part)[kind] for part in hx)
    assert not x.is_contiguous()
    for call in (torch.no_grad, torch.enable_grad):
        with call():
            output, state = ours(x, hx)
            expected, expected_state = theirs(x, hx)
        assert_near([output, *state], [expected, *expected_state])
    repeated = torch.ones(1, 1, I).expand(T, N, I)
    assert_near([ours(repeated)[0].detach()], [theirs(repeated)[0].detach()])


def test_state_as_a_list():
    ours, theirs = pair(I, H)
    x, hx = make_input("TNI", torch.float32), list(make_state(ours, "TNI", torch.float32))
    assert_near([ours(x, hx)[0].detach()], [theirs(x, hx)[0].detach()])


# When a tape is written


@pytest.fixture
def recorded(monkeypatch):
    """The number of calls recorded so far, as the length of a list."""
    tapes = []
    record = ft._record

    def counting(*args):
        tapes.append(None)
        return record(*args)

    monkeypatch.setattr(ft, "_record", counting)
    return tapes


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_tape_without_gradients(recorded, layout, context):
    ours, theirs = pair(I, H, batch_first=layout.endswith("NTI"))
    x = make_input(layout, torch.float32)
    data_of(x).requires_grad_()
    with context():
        output, state = ours(x)
        expected, expected_state = theirs(x)
    assert recorded == []
    assert data_of(output).is_inference() == data_of(expected).is_inference()
    assert_near([data_of(output), *state], [data_of(expected), *expected_state])


def test_no_tape_for_frozen_weights(recorded):
    lstm = ft.LSTM(I, H).requires_grad_(False)
    assert not lstm(torch.ones(T, N, I))[0].requires_grad
    assert recorded == []


def test_training_records_once(recorded):
    output = ft.LSTM(I, H)(torch.ones(T, N, I))[0]
    assert len(recorded) == 1
    output.sum().backward()
    assert len(recorded) == 1


def test_evaluation_records_in_the_backward_pass(recorded):
    lstm = ft.LSTM(I, H, 2, dropout=0.5).eval()
    output = lstm(torch.ones(T, N, I))[0]
    assert output.requires_grad
    assert recorded == []
    output.sum().backward()
    assert len(recorded) == 1


def test_inference_tensors():
    with torch.inference_mode():
        ours, theirs = pair(I, H)
        x = torch.randn(T, N, I)
        assert_near([ours(x)[0]], [theirs(x)[0]])
        ours.weight_hh_l0.mul_(2)
        theirs.weight_hh_l0.mul_(2)
        assert_near([ours(x)[0]], [theirs(x)[0]])
    with torch.no_grad():
        assert_near([ours(x)[0]], [theirs(x)[0]])


def test_tape_goes_with_what_torch_saved():
    lstm = ft.LSTM(I, H)
    held = len(ft._held)
    loss = lstm(torch.ones(T, N, I))[0].sum()
    assert len(ft._held) == held + 1
    loss.backward(retain_graph=True)
    first = lstm.weight_hh_l0.grad.clone()
    lstm.zero_grad()
    loss.backward()
    assert torch.equal(lstm.weight_hh_l0.grad, first)
    assert len(ft._held) == held  # though the loss and its graph are still there
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    output = lstm(torch.ones(T, N, I))[0]
    del output
    assert len(ft._held) == held


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_activation_checkpointing(reentrant, dropout, training):
    from torch.utils.checkpoint import checkpoint

    lstm = ft.LSTM(I, H, 2, dropout=dropout).train(training)
    gradients = []
    for wrapped in (False, True):
        torch.manual_seed(3)
        x = torch.ones(T, N, I, requires_grad=True)
        output = checkpoint(lstm, x, use_reentrant=reentrant)[0] if wrapped else lstm(x)[0]
        assert not wrapped or not ft._held
        output.sum().backward()
        gradients.append([x.grad, *(p.grad.clone() for p in lstm.parameters())])
        lstm.zero_grad()
    for got, want in zip(*gradients, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("layout", ["TNI", "unsorted"])
def test_hooks_on_saved_tensors(layout):
    lstm = ft.LSTM(I, H, 2, dropout=0.5)
    x, hx = make_input(layout, torch.float32), make_state(lstm, layout, torch.float32)
    torch.manual_seed(3)
    expected = run(lstm, x, hx)
    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
        for got, want in zip(run(lstm, x, hx), expected, strict=True):
            assert torch.equal(got, want)


# Weights


# Some of these changes of the weights torch counts, and some not.
OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd-foreach": lambda p: torch.optim.SGD(p, lr=0.1, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "adam": torch.optim.Adam,
    "adam-fused": lambda p: torch.optim.Adam(p, fused=True),
    "adagrad-fused": lambda p: torch.optim.Adagrad(p, fused=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=3),
    "data": None,
}


def train(module, make, steps, x, y):
    """Return the losses of some steps."""
    head = nn.Linear(module.hidden_size, 1, dtype=x.dtype)
    nn.init.constant_(head.weight, 0.1)
    nn.init.zeros_(head.bias)
    parameters = [*module.parameters(), *head.parameters()]
    optimiser = make(parameters) if make else None

    def closure():
        for p in parameters:
            p.grad = None
        loss = ((head(module(x)[0]) - y) ** 2).mean()
        loss.backward()
        return loss

    losses = []
    for _ in range(steps):
        loss = optimiser.step(closure) if optimiser else closure()
        for p in parameters if optimiser is None else ():
            p.data.add_(p.grad, alpha=-0.1)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("size", [(1, 1), (12, 8)], ids=["step", "sequence"])
def test_same_loss_curve(name, size):
    make, steps = OPTIMISERS[name], 200 if name == "adam" else 5
    ours, theirs = pair(I, H, 2, dtype=torch.float64)
    x, y = torch.randn(*size, I, dtype=torch.float64), torch.randn(*size, 1, dtype=torch.float64)
    curve, expected = train(ours, make, steps, x, y), train(theirs, make, steps, x, y)
    assert expected[-1] < expected[0]
    np.testing.assert_allclose(curve, expected, rtol=0, atol=1e-9)


def replace(module, name):
    setattr(module, name, nn.Parameter(2 * getattr(module, name).detach()))


def write(module, name):
    getattr(module, name).detach().numpy()[...] *= 2


def swap(module, name):
    getattr(module, name).data = 2 * getattr(module, name).data


def in_place(module, name):
    with torch.no_grad():
        getattr(module, name).mul_(2)


def load(module, name):
    module.load_state_dict({name: 2 * getattr(module, name).detach()}, strict=False)


def behind(module, name):
    getattr(module, name).data.mul_(2)


def assign(module, name):
    module.load_state_dict({name: 2 * getattr(module, name).detach()}, strict=False, assign=True)


def flatten(module, name):
    vector = nn.utils.parameters_to_vector(module.parameters()).detach()
    nn.utils.vector_to_parameters(2 * vector, module.parameters())


CHANGES = [replace, write, swap, in_place, load, behind, assign, flatten]


@pytest.mark.parametrize("steps", [1, 100])
@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "weight_hr_l0"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_count(change, name, steps):
    ours, theirs = pair(I, H, proj_size=P)
    x, hx = torch.randn(steps, 1, I), (torch.randn(1, 1, P), torch.randn(1, 1, H))
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            before = ours(x, hx)[0].detach()
            change(ours, name)
            change(theirs, name)
            after = ours(x, hx)[0].detach()
            assert not torch.equal(after, before)
            assert_near([after], [theirs(x, hx)[0].detach()])


@pytest.mark.parametrize("how", ["counted", "training", "long call", "small weight"])
def test_a_single_number_counts(how):
    size = 5 if how == "small weight" else 40
    lstm = ft.LSTM(size, size)
    assert how == "small weight" or lstm.weight_ih_l0.detach().numpy().nbytes > ft.SMALL
    x = torch.randn(64 if how == "long call" else 1, 1, size)
    weight = lstm.weight_ih_l0
    with torch.set_grad_enabled(how == "training"):
        lstm(x)
        for index in range(0, weight.numel(), 13):  # as good as none of them is in the sample
            if how == "counted":
                weight.view(-1)[index] += 1
            else:
                weight.data.view(-1)[index] += 1
            again = ft.LSTM(size, size)
            again.load_state_dict(lstm.state_dict())
            assert torch.equal(lstm(x)[0], again(x)[0])


def exchange_numbers(weights):
    weights[3, [5, 9]] = weights[3, [9, 5]]


def exchange_in_a_column(weights):
    weights[[5, 9], 3] = weights[[9, 5], 3]


def turn_two(weights):
    weights[3, 5:7] *= -1


def turn_a_row(weights):
    weights[3] *= -1


@pytest.mark.parametrize("change", [exchange_numbers, exchange_in_a_column, turn_two, turn_a_row])
def test_changes_count_that_leave_the_sum_of_the_bits(change):
    lstm, x = ft.LSTM(64, 64), torch.randn(70, 2, 64)
    lstm(x)
    change(lstm.weight_hh_l0.detach().numpy())
    again = ft.LSTM(64, 64)
    again.load_state_dict(lstm.state_dict())
    assert torch.equal(lstm(x)[0], again(x)[0])


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 12, 64])
def test_sample_meets_every_row_and_column(rows):
    for columns in range(1, 80):
        array = np.zeros((rows, columns))
        ft._sample(array)[...] = 1
        assert array.any(axis=0).all()
        assert array.any(axis=1).all()


def test_square_weight_transposed_in_place():
    ours, theirs = pair(4 * H, H)
    x = torch.randn(1, 1, 4 * H)
    with torch.no_grad():
        ours(x)
        for module in (ours, theirs):
            module.weight_ih_l0.data = module.weight_ih_l0.data.t()
        assert_near([ours(x)[0]], [theirs(x)[0]])


def test_changed_settings_count():
    ours, theirs = pair(I, H, 2)
    x = torch.randn(N, N, I)
    with torch.no_grad():
        ours(x)
        ours.batch_first = theirs.batch_first = True
        assert_near([ours(x)[0]], [theirs(x)[0]])
        ours.dropout = 1.0
        assert not torch.equal(ours(x)[0], ours.eval()(x)[0])


def test_conversion():
    ours, theirs = pair(I, H)
    x = torch.randn(T, N, I)
    ours(x)
    ours.double()
    theirs.double()
    assert_near([ours(x.double())[0].detach()], [theirs(x.double())[0].detach()])
    assert [id(w) for w in ours._flat_weights] == [id(p) for p in ours.parameters()]


@pytest.mark.parametrize("what", ["weight", "data", "x", "output"])
@pytest.mark.parametrize("training", [True, False])
def test_changes_between_forward_and_backward(training, what):
    lstm = ft.LSTM(I, H).train(training)
    x = torch.randn(T, N, I, requires_grad=True)
    given = x * 1
    output, (h_n, c_n) = lstm(given)
    (expected,) = torch.autograd.grad(lstm(x)[0].sum(), x)
    with torch.no_grad():
        h_n += 1
        c_n += 1
    if what == "data":
        lstm.weight_hh_l0.data.mul_(2)
        if training:  # the tape has the weights of its own time
            assert torch.equal(torch.autograd.grad(output.sum(), x)[0], expected)
            return
    else:
        with torch.no_grad():
            {"weight": lstm.weight_hh_l0, "x": given, "output": output}[what].mul_(2)
        if what == "output" and not training:  # the backward pass does not need it
            assert torch.equal(torch.autograd.grad(output.sum(), x)[0], expected)
            return
    with pytest.raises(RuntimeError, match="weights of the LSTM have changed" if what == "data" else "inplace"):
        torch.autograd.grad(output.sum(), x)


@pytest.mark.parametrize("rows", [3, 400])  # a small block of memory is used again; a large one is gone
@pytest.mark.parametrize("settings", [{}, {"num_layers": 2, "dropout": 0.5}], ids=str)
def test_an_input_that_moves_before_the_backward_pass(rows, settings):
    lstm, x = ft.LSTM(64, 8, **settings), torch.randn(50, rows, 64)
    loss = lstm(x)[0].sum()
    expected = torch.autograd.grad(loss, lstm.parameters(), retain_graph=True)
    x.share_memory_()  # as a queue of torch.multiprocessing does
    others = [torch.full_like(x, 9.0) for _ in range(5)]
    assert all(map(torch.equal, torch.autograd.grad(loss, lstm.parameters()), expected))
    del others


def test_many_gradients_at_once_are_refused():
    x = torch.ones(2, 1, 3, requires_grad=True)
    y = ft.LSTM(3, 4)(x)[0]
    with pytest.raises(RuntimeError, match="is_grads_batched"):
        torch.autograd.grad(y, x, torch.eye(8).view(8, 2, 1, 4), is_grads_batched=True)


@pytest.mark.parametrize("counts", [[2, 1, 2], [2, 2, 2], [0], [2, -1], [4]])
def test_counts_of_a_packed_sequence_that_cannot_be(counts):
    packed = PackedSequence(torch.ones(5, I), torch.tensor(counts))
    for module in pair(I, H):
        with pytest.raises(RuntimeError):
            module(packed)


@pytest.mark.parametrize("with_state", [False, True])
def test_a_leaf_of_a_symbolic_trace(with_state):
    class Model(nn.Module):
        def __init__(self, lstm):
            super().__init__()
            self.lstm = lstm

        def forward(self, x, h, c):
            output, (h_n, _) = self.lstm(x, (h, c)) if with_state else self.lstm(x)
            return output.sum() + h_n.sum()

    given = torch.randn(T, N, I), torch.randn(1, N, H), torch.randn(1, N, H)
    ours, theirs = (torch.fx.symbolic_trace(Model(lstm)) for lstm in pair(I, H))
    assert type(ours.lstm) is ft.LSTM
    assert str(ours.graph) == str(theirs.graph)
    assert_near([ours(*given).detach()], [theirs(*given).detach()])


def test_state_dicts_are_interchangeable():
    for settings in ({}, {"bias": False}, {"proj_size": P, "bidirectional": True, "num_layers": 2}):
        ours, theirs = ft.LSTM(I, H, **settings), nn.LSTM(I, H, **settings)
        x = torch.randn(T, N, I)
        assert ours.load_state_dict(theirs.state_dict()) == theirs.load_state_dict(ours.state_dict())
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert_near([ours(x)[0].detach()], [theirs(x)[0].detach()])
        alone = fastlstm.from_torch(ours)
        assert np.array_equal(alone(x.numpy())[0], ours.eval()(x)[0].detach().numpy())
        assert repr(ours) == repr(theirs)


def test_constructor_is_that_of_torch():
    for settings, error in (({"dropout": 2}, ValueError), ({"proj_size": H}, ValueError), ({"bias": 1}, TypeError)):
        with pytest.raises(error) as theirs:
            nn.LSTM(I, H, **settings)
        with pytest.raises(error) as ours:
            ft.LSTM(I, H, **settings)
        assert str(ours.value) == str(theirs.value)


# Dropout


def test_dropout():
    p, scale = 0.3, 1e-4
    lstm = ft.LSTM(I, H, 2, dropout=p, dtype=torch.float64)
    with torch.no_grad():  # a second layer that lets its input through: i and o open, f shut, g = scale x
        for name in ("weight_ih_l1", "weight_hh_l1", "bias_ih_l1", "bias_hh_l1"):
            getattr(lstm, name).zero_()
        lstm.weight_ih_l1[2 * H : 3 * H] = scale * torch.eye(H)
        lstm.bias_ih_l1[:] = torch.tensor([40.0, -40.0, 0.0, 40.0]).repeat_interleave(H)
        x = torch.randn(40, 30, I, dtype=torch.float64)
        whole = lstm.eval()(x)[0]
        ratio = lstm.train()(x)[0] / whole
    kept = ratio > 0.5
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / (1 - p)), rtol=1e-6, atol=0)
    assert (ratio[~kept].abs() < 1e-12).all()
    count = ratio.numel()
    assert abs(kept.sum() - (1 - p) * count) < 5 * (p * (1 - p) * count) ** 0.5
    assert kept.any(dim=0).all()
    assert kept.any(dim=1).all()
    lstm.dropout = 1.0
    assert not lstm(x)[0].any()


def test_dropout_repeats_under_a_seed():
    lstm = ft.LSTM(I, H, 3, dropout=0.5)
    x = torch.randn(T, N, I)

    def draw(seed):
        torch.manual_seed(seed)
        first, second = lstm(x)[0], lstm(x)[0]
        assert not torch.equal(first, second)
        return first

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    torch.manual_seed(1)
    with torch.no_grad():
        assert torch.equal(lstm(x)[0], draw(1))
    lstm.eval()
    state = torch.get_rng_state()
    assert torch.equal(lstm(x)[0], lstm(x)[0])
    assert torch.equal(torch.get_rng_state(), state)


# Models


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, I)
        self.encoder = nn.Sequential(nn.LSTM(I, H, batch_first=True))
        self.extra = nn.ModuleDict({"a": nn.LSTM(H, H, 2, dropout=0.1), "b": nn.GRU(H, H)})
        self.extra["same"] = self.extra["a"]

    def forward(self, tokens):
        return self.extra["a"](self.encoder(self.embedding(tokens))[0])[0]


def test_accelerate():
    model = Tagger().eval()
    model.extra["a"].train()
    calls = []
    model.extra["a"].register_forward_hook(lambda *args: calls.append(args))
    before, modules = dict(model.named_parameters()), dict(model.named_modules())
    tokens = torch.randint(10, (N, T))
    torch.manual_seed(0)
    model.extra["a"].dropout = 0.0
    expected = model(tokens).detach()
    assert ft.accelerate(model) is model
    assert ft.accelerate(model) is model
    assert all(a is b for a, b in zip(dict(model.named_parameters()).values(), before.values(), strict=True))
    assert all(a is b for a, b in zip(dict(model.named_modules()).values(), modules.values(), strict=True))
    assert type(model.encoder[0]) is type(model.extra["a"]) is ft.LSTM
    assert type(model.extra["b"]) is nn.GRU
    assert model.extra["same"] is model.extra["a"]
    assert model.extra["a"].training
    assert not model.encoder[0].training
    assert_near([model(tokens).detach()], [expected])
    assert len(calls) == 2
    lone = nn.LSTM(I, H)
    assert ft.accelerate(lone) is lone
    assert type(lone) is ft.LSTM


def test_accelerate_leaves_subclasses():
    class Custom(nn.LSTM):
        pass

    assert type(ft.accelerate(Custom(I, H))) is Custom
    with pytest.raises(TypeError, match=r"`model` must be a torch\.nn\.Module, got dict"):
        ft.accelerate({})


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("first", [True, False], ids=["accelerated", "parametrized"])
def test_parametrized(first):
    ours, theirs = nn.LSTM(I, H, 2), nn.LSTM(I, H, 2)
    theirs.load_state_dict(ours.state_dict())
    if first:
        ft.accelerate(ours)
    for module in (ours, theirs):
        parametrize.register_parametrization(module, "weight_hh_l0", Double())
        parametrize.register_parametrization(module, "weight_ih_l1", nn.utils.parametrizations._WeightNorm())
    ft.accelerate(ours)
    assert isinstance(ours, ft.LSTM)
    assert not isinstance(theirs, ft.LSTM)
    x = torch.randn(T, N, I)
    assert_near(run(ours, x, None), run(theirs, x, None))
    with torch.no_grad():
        for module in (ours, theirs):
            module.parametrizations.weight_hh_l0.original.mul_(0.5)
        assert_near([ours(x)[0]], [theirs(x)[0]])
    for module in (ours, theirs):
        parametrize.remove_parametrizations(module, "weight_hh_l0")
        parametrize.remove_parametrizations(module, "weight_ih_l1")
    assert type(ours) is ft.LSTM
    assert_near(run(ours, x, None), run(theirs, x, None))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm():
    ours, theirs = (nn.utils.weight_norm(module, "weight_hh_l0") for module in pair(I, H))
    x = torch.randn(T, N, I)
    for _ in range(2):
        for module in (ours, theirs):
            with torch.no_grad():
                module.weight_hh_l0_g.mul_(2)
        assert_near(run(ours, x, None), run(theirs, x, None))


def test_functional_call():
    ours, theirs = pair(I, H)
    x = torch.randn(T, N, I)
    other = {name: p.detach() * 2 for name, p in ours.named_parameters()}
    for _ in range(2):
        assert_near([ours(x)[0].detach()], [theirs(x)[0].detach()])
        got, want = (torch.func.functional_call(module, other, x)[0] for module in (ours, theirs))
        assert_near([got], [want])


def through_torch(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), through_torch],
                         ids=["deepcopy", "copy", "pickle", "torch"])  # fmt: skip
def test_copies(clone, used):
    lstm = ft.LSTM(I, H, 2)
    x = torch.randn(T, N, I)
    if used:
        lstm(x)[0].sum().backward()
    other = clone(lstm)
    assert type(other) is ft.LSTM
    assert "_weights" not in vars(other)
    assert all(a is b for a, b in zip(other._flat_weights, other.parameters(), strict=True))
    assert torch.equal(other(x)[0], lstm(x)[0])
    if clone is not copy.copy:
        with torch.no_grad():
            other.weight_hh_l0.mul_(2)
    assert torch.equal(other(x)[0], lstm(x)[0]) == (clone is copy.copy)


def test_modules_share_a_parameter():
    a, b = ft.LSTM(I, I), ft.LSTM(I, I)
    for name, parameter in a.named_parameters():
        setattr(b, name, parameter)
    c, d = nn.LSTM(I, I), nn.LSTM(I, I)
    c.load_state_dict(a.state_dict())
    for name, parameter in c.named_parameters():
        setattr(d, name, parameter)
    for first, second in ((a, b), (c, d)):
        optimiser = torch.optim.SGD(first.parameters(), lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            second(first(torch.ones(T, N, I))[0])[0].sum().backward()
            optimiser.step()
    assert_near([p.detach() for p in b.parameters()], [p.detach() for p in d.parameters()])


# Wrong input


@pytest.mark.parametrize(
    "arguments",
    [
        lambda: (torch.zeros(T, N, I + 1),),
        lambda: (torch.zeros(I),),
        lambda: (torch.zeros(1, T, N, I),),
        lambda: (torch.zeros(0, N, I),),
        lambda: (torch.zeros(T, N, I, dtype=torch.float64),),
        lambda: (torch.zeros(T, N, I, dtype=torch.int64),),
        lambda: (torch.zeros(T, N, I, dtype=torch.complex64),),
        lambda: (torch.zeros(T, N, I), (torch.zeros(1, N, H), torch.zeros(1, N + 1, H))),
        lambda: (torch.zeros(T, N, I), (torch.zeros(1, N, H + 1), torch.zeros(1, N, H))),
        lambda: (torch.zeros(T, N, I), (torch.zeros(1, H), torch.zeros(1, H))),
        lambda: (torch.zeros(T, I), (torch.zeros(1, 1, H), torch.zeros(1, 1, H))),
        lambda: (torch.zeros(T, N, I), (torch.zeros(1, N, H), torch.zeros(1, N, H).double())),
        lambda: (torch.zeros(T, N, I), (torch.zeros(1, N, H).double(), torch.zeros(1, N, H))),
        lambda: (torch.zeros(T, N, I), (torch.zeros(1, N, H),)),
        lambda: (torch.zeros(T, N, I), (torch.zeros(1, N, H),) * 3),
        lambda: (torch.zeros(T, N, I), torch.zeros(1, N, H)),
        lambda: (torch.zeros(T, N, I).to_sparse(),),
        lambda: (torch.zeros(T, N, I).to_mkldnn(),),
        lambda: (torch.zeros(T, N, I), 5),
        lambda: (np.zeros((T, N, I), np.float32),),
        lambda: (None,),
    ],
)
def test_wrong_input_raises_as_torch_does(arguments):
    ours, theirs = pair(I, H)
    with pytest.raises(Exception) as expected:  # noqa: PT011
        theirs(*arguments())
    with pytest.raises(type(expected.value)) as raised:
        ours(*arguments())
    assert str(raised.value) == str(expected.value)


def test_wrong_packed_input_raises():
    lstm = ft.LSTM(I, H)
    with pytest.raises(RuntimeError, match="Expected 3, got 4"):
        lstm(pack_sequence([torch.zeros(T, I + 1)]))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(1, 1, 11\), got \[1, 2, 11\]"):
        lstm(pack_sequence([torch.zeros(T, I)]), (torch.zeros(1, 2, H), torch.zeros(1, 2, H)))
    with pytest.raises(ValueError, match="does not match weight dtype"):
        lstm(pack_sequence([torch.zeros(T, I).double()]))


def test_no_rows():
    ours, theirs = pair(I, H)
    x = torch.zeros(T, 0, I)
    assert ours(x)[0].shape == theirs(x)[0].shape == (T, 0, H)


def test_torch_refuses_lengths_of_zero():
    with pytest.raises(RuntimeError, match="greater than 0"):
        ft.LSTM(I, H)(pack_padded_sequence(torch.zeros(T, 2, I), [T, 0]))


def test_numbers_that_are_none():
    ours, theirs = pair(I, H, 2)
    x = torch.randn(T, N, I)
    x[2, 1, 0], x[3, 2, 1] = torch.nan, torch.inf
    got, want = run(ours, x, None), run(theirs, x, None)
    assert_same_nan(got[0], want[0])
    assert got[0][:, 0].isfinite().all()


def assert_same_nan(got, want):
    assert torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got, want, equal_nan=True)


# What is left to torch


class Subclass(torch.Tensor):
    pass


def in_autocast(module, x):
    with torch.autocast("cpu", torch.bfloat16):
        return module(x)[0]


def in_low_precision(module, x):
    return copy.deepcopy(module).bfloat16()(x.bfloat16())[0]


def in_meta(module, x):
    return copy.deepcopy(module).to("meta")(x.to("meta"))[0]


def in_subclass(module, x):
    return module(x.as_subclass(Subclass))[0].as_subclass(torch.Tensor)


def in_negative(module, x):
    return module(torch.complex(x, -x).conj().imag)[0]


def in_trace(module, x):
    return torch.jit.trace(module, (x,))(x)[0]


def in_script(module, x):
    scripted = torch.jit.script(nn.Sequential(module))
    return scripted(x)[0]


def in_vmap(module, x):
    return torch.func.vmap(lambda row: module(row)[0], in_dims=1, out_dims=1)(x)


def in_grad(module, x):
    return torch.func.grad(lambda x: module(x)[0].sum())(x)


def in_forward_mode(module, x):
    with torch.autograd.forward_ad.dual_level():
        return module(x)[0]


def in_dispatch_mode(module, x):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with Mode():
        return module(x)[0]


def in_compile(module, x):
    torch._dynamo.reset()
    model = torch.compile(nn.Sequential(module), backend="eager")
    return model(x)[0]


def in_compiled_step(module, x):
    @torch.compile(backend="eager")
    def step(x):
        loss = module(x)[0].sum()
        loss.backward()
        return loss

    torch._dynamo.reset()
    module.zero_grad()
    step(x)
    return module.weight_hh_l0.grad


def in_export(module, x):
    return torch.export.export(nn.Sequential(module), (x,), strict=False).module()(x)[0]


FALLBACKS = {
    "autocast": in_autocast,
    "negative bit": in_negative,
    "bfloat16": in_low_precision,
    "on meta": in_meta,
    "class Subclass": in_subclass,
    "jit.trace": in_trace,
    "jit.script": in_script,
    "TorchDispatchMode": in_dispatch_mode,
    "forward-mode": in_forward_mode,
    "torch.func": in_grad,
    "compile": in_compile,
    "torch.compile": in_compiled_step,
    "torch.export": in_export,
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_left_to_torch_with_one_warning(reason):
    ours, theirs = pair(I, H)
    x, call = torch.randn(T, N, I), FALLBACKS[reason]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = [call(ours, x), call(ours, x)]
    found = [str(w.message) for w in caught if w.category is ft.FallbackWarning]
    assert len(found) == 1, found
    assert reason in found[0]
    if reason in ("autocast", "TorchDispatchMode"):
        assert [w.filename for w in caught if w.category is ft.FallbackWarning] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = call(theirs, x)
    for result in got:
        assert type(result) is type(want)
        assert result.dtype == want.dtype
        assert result.device == want.device
        if reason != "on meta":
            torch.testing.assert_close(result, want)
    assert_near([ours(x)[0].detach()], [theirs(x)[0].detach()])


@pytest.mark.filterwarnings("ignore::fastlstm.torch.FallbackWarning")
def test_compiled_past_the_limit():
    ours, theirs = pair(I, H)
    model = nn.Sequential(ours)
    with torch._dynamo.config.patch(recompile_limit=1):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", dynamic=False)
        for steps, context in itertools.product((3, 4), (torch.no_grad, torch.enable_grad)):
            with context():
                x = torch.randn(steps, N, I)
                torch.testing.assert_close(compiled(x)[0], theirs(x)[0])
    assert ours._weights is None


def test_compiled_around_the_kernels():
    ours, theirs = pair(I, H)
    x = torch.randn(T, N, I)
    ours.forward = torch.compiler.disable(ours.forward)
    torch._dynamo.reset()
    torch.compile(nn.Sequential(ours), backend="eager")(x)[0].sum().backward()
    assert ours._weights is not None
    theirs(x)[0].sum().backward()
    assert_near([ours.weight_hh_l0.grad], [theirs.weight_hh_l0.grad])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("training", [True, False])
def test_compiled_backward_pass_alone(training):
    ours, theirs = (module.train(training) for module in pair(I, H))
    x = torch.randn(T, N, I)
    step = torch.compile(lambda loss: (2 * loss).backward(), backend="eager")
    for module in (ours, theirs):
        torch._dynamo.reset()
        step(module(x)[0].sum())
    assert_near([ours.weight_hh_l0.grad], [theirs.weight_hh_l0.grad])


def test_compile_of_a_torch_before_2_6(monkeypatch):
    monkeypatch.setattr(ft, "_find_dynamo", ft._replace_dynamo)
    ours, theirs = pair(I, H)
    x = torch.randn(T, N, I)
    ours(x)
    with pytest.warns(ft.FallbackWarning, match=r"torch\.compile"):
        torch.testing.assert_close(in_compile(ours, x), theirs(x)[0])


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_default_device(device):
    lstm = ft.LSTM(I, H, 2, dropout=0.5)
    x = pack_sequence([torch.ones(T, I)])
    with torch.device(device):
        lstm(x)[0].data.sum().backward()
    assert lstm.weight_hh_l0.grad.is_cpu


def test_fallback_as_an_error_comes_every_time():
    lstm = ft.LSTM(I, H).bfloat16()
    for _ in range(2):
        with pytest.raises(ft.FallbackWarning, match=r"torch\.bfloat16"):
            lstm(torch.zeros(T, N, I, dtype=torch.bfloat16))


# Threads and processes


def test_same_bits_for_any_number_of_threads(restore_threads):
    lstm = ft.LSTM(64, 128)
    x = torch.randn(50, 16, 64)
    found = []
    for threads in (1, 2):
        fastlstm.set_num_threads(threads)
        found.append(run(lstm, x, None))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_calls_from_several_threads():
    lstm = ft.LSTM(I, H)
    xs = [torch.randn(T, N, I, requires_grad=True) for _ in range(4)]

    def work(x):
        with torch.no_grad():
            output = lstm(x)[0]
        return output, torch.autograd.grad(lstm(x)[0].sum(), x)[0]

    expected = [work(x) for x in xs]
    wrong = []

    def check(x, want):
        try:
            for _ in range(30):
                if not all(torch.equal(a, b) for a, b in zip(work(x), want, strict=True)):
                    wrong.append(x)
        except Exception as error:
            wrong.append(error)

    workers = [threading.Thread(target=check, args=args) for args in zip(xs, expected, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_import_of_the_package_leaves_torch_alone():
    run_python("import sys, fastlstm; assert 'torch' not in sys.modules; assert not hasattr(fastlstm, 'torch')")


LOADER = """
import warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
warnings.filterwarnings("ignore", ".*suggested max number of worker.*", UserWarning)  # with a single CPU
import torch
from torch.utils.data import DataLoader, Dataset
from fastlstm.torch import LSTM

class Encoded(Dataset):
    def __init__(self):
        self.lstm = LSTM(3, 64).eval()
    def __len__(self):
        return 8
    def __getitem__(self, i):
        with torch.no_grad():
            return self.lstm(torch.full((50, 16, 3), float(i)))[0]

if __name__ == "__main__":
    torch.set_num_threads(1)
    data = Encoded()
    expected = torch.stack([data[i] for i in range(8)])
    for start in ("fork", "spawn")[: int(__import__("sys").argv[1])]:
        batches = list(DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context=start))
        assert torch.equal(torch.cat(batches), expected)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_data_loader_workers(tmp_path):
    (tmp_path / "loader.py").write_text(LOADER)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "loader.py"), "2"],
        env=environment(), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


PARALLEL = """
import sys
import torch
from torch import nn
from torch.distributed import init_process_group, destroy_process_group
from torch.nn.parallel import DistributedDataParallel
from fastlstm.torch import LSTM

path, rank = sys.argv[1], int(sys.argv[2])
init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=2)
torch.set_num_threads(1)
torch.manual_seed(rank)  # the first process's weights are those that count
model = DistributedDataParallel(LSTM(3, 5, 2, dtype=torch.float64))
torch.manual_seed(9)
x = torch.randn(7, 4, 3, dtype=torch.float64)
optimiser = torch.optim.Adam(model.parameters(), fused=True)
for _ in range(5):
    optimiser.zero_grad()
    (model(x[:, 2 * rank : 2 * rank + 2])[0] ** 2).mean().backward()
    optimiser.step()
torch.save(model.module.state_dict(), f"{path}/{rank}.pt")
destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="no gloo")
def test_two_processes_train_one_model(tmp_path):
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", PARALLEL, str(tmp_path), str(rank)],
            cwd=SOURCES.anchor, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [worker.communicate(timeout=600)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    torch.manual_seed(0)
    model = nn.LSTM(3, 5, 2, dtype=torch.float64)
    torch.manual_seed(9)
    x = torch.randn(7, 4, 3, dtype=torch.float64)
    optimiser = torch.optim.Adam(model.parameters())
    for _ in range(5):
        optimiser.zero_grad()
        (model(x)[0] ** 2).mean().backward()
        optimiser.step()
    expected = list(model.state_dict().values())
    for rank in range(2):
        assert_near(list(torch.load(tmp_path / f"{rank}.pt").values()), expected)
