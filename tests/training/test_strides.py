"""Many steps at a call of a compiled graph: the numbers of single steps, wherever one looks."""

import signal
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch._inductor
from cases import LONG
from pairs import Normed, build, data, linear, made, same, traceless, values
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import ppvae.staging.stride as graphs
import ppvae.training.strides as walking
from ppvae import fit
from ppvae.objectives import ELBO, warm_up
from ppvae.staging import artifacts
from ppvae.staging.staged import NotStageable
from ppvae.training import Diverged
from ppvae.training.strides import Strides

#: torch, on itself, while it compiles
pytestmark = pytest.mark.filterwarnings("ignore:.*torch._prims_common.check.*:FutureWarning")

TOLD = {"num_epochs": 5, "batch_size": 4, "learning_rate": 0.01, "progress": False, "seed": 3}


def normed():
    return build(encoder=Normed())


def halved(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


def trained(make, x, **told):
    ((model, guide),) = made(make)
    with traceless(model, guide):
        result = fit(model, guide, x, **{**TOLD, "compile": True, **told})
    return result, values(model, guide)


#: Statistics, dropout, a schedule, a clip and a warm-up; batches of four, four and three.
ALL = {"scheduler": halved, "clip": 0.5, "objective": ELBO(beta=warm_up(8)), "num_epochs": 6}
DOUBLE = partial(data, dtype=torch.float64)
HELD = {"validation": DOUBLE(6) + 1.0, "patience": 2}
LOADER = DataLoader(TensorDataset(DOUBLE(9)), 4)


def test_strides_are_single_steps():
    """The compiler may reorder sums; a few steps multiply a difference in the last place by less
    than 1e6.
    """
    as_single_steps(normed, DOUBLE(11), {**ALL, **HELD})


@pytest.mark.filterwarnings("ignore:fit. looped, but minibatches of one datum run eagerly")
@pytest.mark.parametrize(
    ("x", "size"),
    [(DOUBLE(17), 8), (LOADER, None), (DOUBLE(9), None)],
    ids=["a datum that is left", "loader", "all data"],
)
def test_strides_of_every_kind_are_single_steps(x, size, interpreted):
    as_single_steps(linear, x, {"batch_size": size})


def as_single_steps(make, x, told):
    (alone, before), (strides, after) = (
        trained(make, x, compile=compile, **told) for compile in (False, True)
    )
    assert (alone.execution, strides.execution) == ("eager", "looped")
    assert strides.num_steps == alone.num_steps and strides.best_epoch == alone.best_epoch
    assert strides.losses == pytest.approx(alone.losses, rel=1e-9)
    assert strides.validation_losses == pytest.approx(alone.validation_losses, rel=1e-9)
    assert same(before, after, 1e-9)
    pairs = zip(alone.optimizer.state.values(), strides.optimizer.state.values(), strict=True)
    for one, other in pairs:
        assert one.keys() == other.keys() and one["step"] == other["step"]
        assert one["step"].dtype == other["step"].dtype
        assert all(same([one[name]], [other[name]], 1e-9) for name in one)
    assert alone.optimizer.param_groups[0]["lr"] == strides.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("size", [8, 5])
def test_the_length_of_a_stride_and_the_step_of_a_ctrl_c_change_no_bit(
    size, monkeypatch, tmp_path, ctrl_c, interpreted
):
    """The noise of eight data, 16 numbers, is drawn at once; that of five step by step."""
    told = {"num_epochs": 8, "batch_size": size}
    whole, end = trained(linear, data(19), **told)
    monkeypatch.setattr(walking, "_MOST", 1)
    assert trained(linear, data(19), **told)[0].losses == whole.losses
    monkeypatch.setattr(walking, "_MOST", 64)
    go = Strides.go

    def stopping(strides, before):
        if before >= 5:
            signal.raise_signal(signal.SIGINT)
        return go(strides, before)

    monkeypatch.setattr(Strides, "go", stopping)
    path = tmp_path / "run.pt"
    part, _ = trained(linear, data(19), checkpoint=path, **told)
    assert part.interrupted and 5 < part.num_steps < whole.num_steps and part.execution == "looped"
    monkeypatch.setattr(Strides, "go", go)
    rest, there = trained(linear, data(19), checkpoint=path, **told)
    assert rest.losses == whole.losses and same(there, end) and rest.execution == "looped"


class Late(nn.Module):
    """Finite for a while: a weight that grows by each step of Adam, and a root of what is left."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.0))

    def forward(self, z):
        return z.repeat_interleave(3, -1)[..., :3] * 0.0 + (0.105 - self.weight).sqrt() * 100


def test_what_diverges_within_a_stride_is_told_at_its_step(monkeypatch, interpreted):
    """Adam moves a weight by its rate in each step, as long as its gradient has one sign: after 11
    steps of 0.01 the root is of a negative number. The weight is one number, of no dimension.
    """
    go, strides_from = Strides.go, []

    def seen(strides, before):
        strides_from.append(before)
        return go(strides, before)

    monkeypatch.setattr(Strides, "go", seen)

    def make():
        model, guide = linear()
        model.decoder = Late()
        return model, guide

    told, ends = [], []
    for compile in (False, True):
        ((model, guide),) = made(make)
        with traceless(model, guide), pytest.raises(Diverged) as caught:
            fit(model, guide, data(11), **{**TOLD, "num_epochs": 20, "compile": compile})
        told.append(str(caught.value))
        ends.append(values(model, guide))
    assert strides_from[0] == 0 and 9 <= strides_from[-1] <= 11  # in an epoch from step 9 to 11
    alone, strides = (words.partition("; parameters and buffers are back at ") for words in told)
    assert alone[0] == strides[0] and alone[0].startswith("the loss is nan at step 11: ")
    assert (alone[2], strides[2]) == ("those of step 10", "those of step 10")
    assert same(*ends, 1e-9)


@pytest.mark.filterwarnings("ignore:fit. compiled, not looped")
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, partial(torch.optim.Adam, amsgrad=True)])
def test_other_optimizers_take_their_own_steps(optimizer, monkeypatch):
    monkeypatch.setattr(walking, "Stride", None)
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    assert trained(linear, data(11), optimizer=optimizer)[0].execution == "compiled"


def test_what_is_compiled_is_kept_in_a_file_which_it_outlives(monkeypatch, tmp_path):
    """What is loaded is unpacked to a place of its own, from which it runs."""
    compiler = torch._inductor.aot_compile

    def none(*args, **kwargs):
        raise AssertionError("it is compiled again")

    monkeypatch.setenv("PPVAE_CACHE", str(tmp_path / "kept"))
    first, _ = trained(linear, data(11))
    (file,) = (tmp_path / "kept").iterdir()
    assert file.parent == artifacts.folder() and file.parent.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(torch._inductor, "aot_compile", none)
    again, _ = trained(linear, data(14), batch_size=5, num_epochs=2)
    assert (first.execution, again.execution) == ("looped", "looped")  # of other sizes, too
    kept, there = file.read_bytes(), []

    def unlink(row):
        there.append(file.exists())
        file.unlink(missing_ok=True)

    assert trained(linear, data(11), callback=unlink)[0].losses == first.losses
    assert there == [True, False, False, False, False]
    file.write_bytes(kept)
    if not LONG:
        return
    monkeypatch.setattr(torch._inductor, "aot_compile", compiler)
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:1000])  # cut short, it is made again
    third, _ = trained(linear, data(11))
    assert third.execution == "looped" and third.losses == first.losses
    assert size == pytest.approx(file.stat().st_size, rel=0.01)


@pytest.mark.filterwarnings("ignore:fit. compiled, not looped")
def test_a_compiler_that_fails_leaves_nothing_behind(monkeypatch, tmp_path):
    """What the processor has was taken for granted, and is asked again."""
    from torch._inductor import cpu_vec_isa

    def fails(graph, inputs, *, options):
        with torch._inductor.config.patch({"cpp.vec_isa_ok": options["cpp.vec_isa_ok"]}):
            assert cpu_vec_isa.valid_vec_isa_list()
        raise OSError("no compiler")

    monkeypatch.setenv("PPVAE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch._inductor, "aot_compile", fails)
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    assert trained(linear, data(11))[0].execution == "compiled"
    assert cpu_vec_isa.valid_vec_isa_list.cache_info().currsize == 0


@pytest.mark.skipif(not LONG, reason="the compiler takes its time")
def test_where_nothing_can_be_kept_it_is_compiled_for_once(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("PPVAE_CACHE", str(tmp_path / "file"))
    assert trained(linear, data(11))[0].execution == "looped"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


class Counted(IterableDataset):
    """A stream that does not begin anew: a datum that is drawn is gone."""

    def __init__(self):
        self.count = 0

    def __iter__(self):
        for each in DOUBLE(8):
            self.count += 1
            yield each + 0.01 * self.count


def shuffled():
    own = torch.Generator().manual_seed(4)
    return DataLoader(TensorDataset(DOUBLE(8)), 4, shuffle=True, generator=own)


@pytest.mark.parametrize(
    ("loader", "size"), [(shuffled, None), (lambda: DataLoader(Counted(), 4), 8)]
)
def test_strides_draw_nothing_beforehand(loader, size, interpreted):
    told = {"batch_size": None, "size": size, "num_epochs": 3}
    (alone, before), (strides, after) = (
        trained(linear, loader(), compile=compile, **told) for compile in (False, True)
    )
    assert strides.execution == "looped"
    assert strides.losses == pytest.approx(alone.losses, rel=1e-9) and same(before, after, 1e-9)


def cycled(optimizer):
    """Moves the learning rate, and the first of Adam's betas."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=6)


class Decaying(torch.optim.lr_scheduler.ConstantLR):
    """Lets weights decay from the second epoch on."""

    def step(self, *args):
        super().step(*args)
        if self.last_epoch == 1:
            self.optimizer.param_groups[0]["weight_decay"] = 0.3


@pytest.mark.filterwarnings("ignore:fit. looped, but Adam was changed on the way")
@pytest.mark.parametrize("scheduler", [cycled, Decaying])
def test_settings_of_adam_may_move(scheduler, interpreted):
    (alone, before), (strides, after) = (
        trained(linear, DOUBLE(8), compile=compile, scheduler=scheduler)
        for compile in (False, True)
    )
    assert strides.execution == "looped"
    but = "Adam was changed on the way, or what it moves" if scheduler is Decaying else ""
    assert strides.execution_reason == but
    assert strides.losses == pytest.approx(alone.losses, rel=1e-9) and same(before, after, 1e-9)


def test_a_scheduler_goes_on_from_a_checkpoint(tmp_path, interpreted):
    whole, end = trained(linear, DOUBLE(8), scheduler=halved)
    told = {"scheduler": halved, "checkpoint": tmp_path / "run.pt"}
    trained(linear, DOUBLE(8), **told, num_epochs=2)
    rest, there = trained(linear, DOUBLE(8), **told)
    assert rest.execution == "looped" and rest.losses == whole.losses and same(there, end)


class Labelled(nn.Module):
    """Data with labels, beside a table of other rows; and a buffer that is one number."""

    def __init__(self):
        super().__init__()
        self.weight, self.levels = nn.Parameter(torch.randn(2, 3)), nn.Embedding(5, 3)
        self.register_buffer("scale", torch.tensor([0.5]).expand(3))

    def forward(self, x, y, table):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = z @ self.weight + self.levels(y) + table.mean()
            pyro.sample("x", dist.Normal(loc, self.scale).to_event(1), obs=x)


#: gradients of the same loss, compiled, are for `.ci/long`
LOOPS = [(None, "looped")] + [(torch.optim.AdamW, "compiled")] * LONG


@pytest.mark.filterwarnings("ignore:fit. compiled, not looped")
@pytest.mark.parametrize(("optimizer", "execution"), LOOPS)
def test_rows_that_are_no_data_and_labels_out_of_range(optimizer, execution, interpreted):
    """A table has a number of rows of its own, and the compiled loop looks at no strides."""

    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(3, 2)

        def forward(self, x, y, table):
            with pyro.plate("data", len(x)):
                loc = self.encoder(x) * table.std()
                pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    def make():
        return Labelled(), Guide()

    labels, table = torch.arange(11) % 5, DOUBLE(6)[:, :2].T.expand(2, 6)
    told = {"kwargs": {"table": table}, "num_epochs": 3, "optimizer": optimizer}
    (alone, before), (strides, after) = (
        trained(make, (DOUBLE(11), labels), compile=compile, **told) for compile in (False, True)
    )
    assert strides.execution == execution
    assert strides.losses == pytest.approx(alone.losses, rel=1e-9) and same(before, after, 1e-9)
    if execution == "looped":
        labels[10] = 5
        with pytest.raises(IndexError, match="out of range"):
            trained(make, (DOUBLE(11), labels), check_support=False, **told)


@pytest.mark.filterwarnings("ignore:fit. compiled, not looped")
def test_a_graph_is_known_by_what_is_trained_and_by_its_dtypes(monkeypatch):
    told = []

    def seen(words, graph):
        told.append("\n".join(words))
        raise NotStageable("seen")

    def frozen(at):
        model, guide = linear()
        model.decoder = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 3))
        model.decoder[at].weight.requires_grad_(False)
        return model, guide

    monkeypatch.setattr(graphs, "compiled", seen)
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    for at in (0, 1, 0):
        trained(partial(frozen, at), DOUBLE(8), num_epochs=1)
    torch.set_default_dtype(torch.float32)
    trained(lambda: [each.double() for each in frozen(0)], DOUBLE(8), num_epochs=1)
    torch.set_default_dtype(torch.float64)
    assert told[0] == told[2] and len({*told}) == 3


class Twofold(nn.Module):
    """A number that each call moves, and that is read under another name."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.register_buffer("moved", torch.zeros(3))
        self.register_buffer("read", self.moved[:])

    def forward(self, z):
        if self.training:
            self.moved.add_(0.1)
        return self.layer(z) + self.read


@pytest.mark.filterwarnings("ignore:fit. compiled, not looped")
def test_memory_that_two_buffers_share_is_moved_once(monkeypatch):
    def make():
        model, guide = linear()
        model.decoder = Twofold()
        return model, guide

    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    (alone, before), (one, after) = (
        trained(make, DOUBLE(8), compile=compile) for compile in (False, True)
    )
    assert one.execution == "compiled"
    assert one.losses == pytest.approx(alone.losses, rel=1e-9) and same(before, after, 1e-9)
