"""Models whose forwards ask for what operators have no plain word for; all map (n, in) to (n, out)."""

import torch
from torch import nn
from torch.compiler import is_exporting
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

WIDTH = 64


class Odd(nn.Module):
    """Something between two layers, and a draw behind it, whose number tells if all before were counted."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.first, self.inner = nn.Linear(in_features, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.other, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, out_features)
        self.drop = nn.Dropout(0.3)
        self.add()

    def add(self):
        """Add layers."""

    def forward(self, x):
        return self.last(self.drop(self.middle(torch.tanh(self.first(x)))))


class NoiseWithoutGradient(Odd):
    def middle(self, x):
        with torch.no_grad():
            noise = functional.dropout(self.other(x), 0.3) + torch.randn_like(x)
        return self.inner(x + noise)


class Asking(Odd):
    """Computes otherwise where it is exported, as transformers' attention does."""

    def middle(self, x):
        if torch.compiler.is_exporting() or torch.compiler.is_compiling():
            return self.inner(x.flip(1)).flip(0)
        return self.inner(x)


class AsksByImport(Odd):
    """The same, by a function that it has imported, or an older one of torch."""

    def middle(self, x):
        global LATE
        LATE = torch.compiler.is_exporting  # as a module that is imported only now does
        if is_exporting() or torch._dynamo.is_compiling() or torch._utils.is_compiling():
            return self.inner(x.flip(1)).flip(0)
        return self.inner(x)


class AsksInBranch(Odd):
    """Asks where torch compiles in one process too, and behind that."""

    def middle(self, x):
        def asks(x):
            return x.sin() if torch.compiler.is_compiling() else x.cos()

        x = self.inner(torch.cond(x.sum() > -1e9, asks, lambda x: x.tan(), (x,)))
        return self.other(x) if torch.compiler.is_exporting() else x


class Averaged(Odd):
    """A moving average of the first layer's weight, changed by what another change gave."""

    def add(self):
        self.register_buffer("mean", torch.zeros(WIDTH, WIDTH))

    def middle(self, x):
        h = self.other(torch.tanh(self.inner(x)))
        if self.training:
            self.mean.mul_(0.9).add_(self.inner.weight.detach(), alpha=0.1)
        return h + functional.linear(x, self.mean)


class AveragedByViews(Averaged):
    """The same through a view that is made before."""

    def middle(self, x):
        view = self.mean[:16]
        h = self.other(torch.tanh(self.inner(x + functional.linear(x, self.mean.clone()))))
        if self.training:
            view.mul_(0.9)
            view.add_(self.inner.weight.detach()[:16], alpha=0.1)
        return h


class NormedTwice(Odd):
    """Running statistics of one's own, moved on by two calls, where nothing is to be differentiated."""

    def add(self):
        self.register_buffer("mean", torch.zeros(WIDTH))

    def norm(self, x):
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return x - self.mean

    def middle(self, x):
        return self.norm(self.other(torch.tanh(self.norm(self.inner(x)))))


class Indexed(Odd):
    """Takes a row whose number a tensor says."""

    def add(self):
        self.register_buffer("which", torch.tensor([3, 1]))

    def middle(self, x):
        return self.inner(x) * self.other.bias[self.which[0]]


class Calibrated(Odd):
    """Has a tensor that only evaluation uses."""

    def add(self):
        self.register_buffer("scale", torch.ones(WIDTH))

    def middle(self, x):
        x = self.inner(x)
        return x if self.training else x * self.scale


class NoisyBackward(torch.autograd.Function):
    """Adds noise to a gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient + torch.randn_like(gradient)


class Noisy(nn.Linear):
    def forward(self, x):
        return NoisyBackward.apply(super().forward(x))


def noisy_row(in_features, out_features):
    return nn.Sequential(Noisy(in_features, 8), nn.Tanh(), nn.Linear(8, out_features))


class OwnSeed(nn.Linear):
    def forward(self, x):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return super().forward(x) + torch.randn_like(x[:, :1])


def forked_row(in_features, out_features):
    """Puts torch's random numbers back behind draws of its own."""
    row = OwnSeed(in_features, 8), nn.Dropout(0.3), OwnSeed(8, 8), nn.Tanh(), nn.Dropout(0.3)
    return nn.Sequential(*row, nn.Linear(8, out_features))


class NoisyLoss(nn.Module):
    """Draws."""

    def forward(self, output, target):
        return (output - target + torch.randn_like(output)).square().mean(dim=1)


SCALE = [1.0]


class Progressive(Odd):
    """Drops more in each step, or from one on, by its own train(); or scales less, by a global; or does neither.

    Or is in eval mode from a step on, asks in each step how often it was called, or sets a hook.
    """

    way = "always"
    calls, late = 0, 10

    def train(self, mode=True):
        self.calls += mode and self.way in ("later", "freezes", "asks")
        super().train(mode)
        if mode and (self.way == "always" or (self.way == "later" and self.calls > self.late)):
            self.drop.p = min(0.9, self.drop.p + 0.01)
        elif self.way == "elsewhere":
            SCALE[0] *= 0.9
        elif self.way == "freezes" and self.calls > self.late:
            self.drop.eval()
        elif mode and self.way == "hooks" and not self.inner._forward_hooks:
            self.inner.register_forward_hook(lambda module, given, found: 2 * found)
        return self

    def middle(self, x):
        if self.way == "asks" and self.calls > self.late:
            x = 2 * x
        return self.inner(x) * SCALE[0]


class Recurrent(Odd):
    """An LSTM, which autocast makes give bf16 of float32, and does not where it has no memory."""

    def add(self):
        self.cells = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def middle(self, x):
        return self.inner(self.cells(x.float().unsqueeze(1))[0].squeeze(1))


class Padded(nn.Module):
    """A layer of torch that asks itself, as what it does else can't be written down."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)

    def forward(self, x):
        return self.encoder(x, src_key_padding_mask=torch.zeros(x.shape[:2], dtype=torch.bool))


class NeedsToKnow(Odd):
    """A branch on numbers, unless it is exported: both ways give the same."""

    def middle(self, x):
        if torch.compiler.is_exporting() or not bool((x > 9).any()):
            return self.inner(x)
        return x


class OwnAutocast(Odd):
    def middle(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = functional.dropout(self.inner(x), 0.2)
        return x.float()


class OwnDevice(Odd):
    def middle(self, x):
        with torch.device("cpu"):
            return self.inner(x) + torch.zeros(WIDTH)


class DropsInPlace(Odd):
    def add(self):
        self.inside = nn.Dropout1d(0.3, inplace=True)

    def middle(self, x):
        return self.inner(self.inside((x * 1.0).unsqueeze(1)).squeeze(1))


class Pooled(Odd):
    def add(self):
        self.pool, self.wide = nn.FractionalMaxPool2d(2, output_size=(4, 4)), nn.Linear(16, WIDTH)

    def middle(self, x):
        return self.inner(self.wide(self.pool(x.view(-1, 1, 8, 8)).flatten(1)))


class PooledWithIndices(Pooled):
    def add(self):
        super().add()
        self.pool.return_indices = True

    def middle(self, x):
        return self.inner(self.wide(self.pool(x.view(-1, 1, 8, 8))[0].flatten(1)))


class Gamma(Odd):
    def middle(self, x):
        return self.inner(x * torch.distributions.Gamma(x.abs() + 1, 1.0, validate_args=False).rsample())


class OneForAll(Odd):
    def middle(self, x):
        q = self.inner(x).view(-1, 2, 4, 8)
        return functional.scaled_dot_product_attention(q, q, q, dropout_p=0.3).flatten(1)


class Nested(Odd):
    reentrant = False

    def again(self, function, x):
        return checkpoint(function, x, use_reentrant=self.reentrant)

    def middle(self, x):
        inside = self.again(lambda z: self.inner(self.again(lambda y: self.drop(self.other(y)), z)), x)
        return x + self.drop(inside)


class NestedReentrant(Nested):
    reentrant = True


class NormedAgain(NestedReentrant):
    """A BatchNorm whose statistics are those of the first run alone."""

    def add(self):
        self.norm = nn.BatchNorm1d(2)

    def middle(self, x):
        return self.again(lambda z: self.norm(self.inner(z).unflatten(1, (2, WIDTH // 2))).flatten(1), x)


class NoGradientInside(NestedReentrant):
    """A reentrant region of inputs without a gradient has none inside: torch says so in a warning."""

    def forward(self, x):
        return self.last(self.drop(self.inner(torch.tanh(self.again(self.first, x)))))


class Renormed(Odd):
    """Changes its table in the forward."""

    def add(self):
        self.table = nn.Embedding(20, WIDTH, max_norm=1.7)

    def middle(self, x):
        return self.inner(x + self.table((x[:, :5] * 10).long().abs() % 20).sum(1))


class Masked(Odd):
    """Hooks on gradients, made in the constructor: one holds a tensor, one sees the sum so far."""

    def add(self):
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        mask = (torch.arange(2 * WIDTH * WIDTH) % 3 > 0).float().view(2 * WIDTH, WIDTH)
        self.register_buffer("portion", torch.tensor(0.5))
        self.wide.weight.register_hook(lambda g: g * mask * self.portion)
        self.narrow.weight.register_post_accumulate_grad_hook(self.bound)

    def bound(self, parameter):
        parameter.grad.clamp_(-1e-3, 1e-3)

    def middle(self, x):
        return self.inner(self.narrow(torch.relu(self.wide(x))))


class TeacherNorm(Odd):
    """A BatchNorm runs without gradients, as a teacher's."""

    def add(self):
        self.teacher = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.2))

    def middle(self, x):
        with torch.no_grad():
            known = self.teacher(x)
        return self.inner(x) * known


class FillingNorm(Odd):
    """A frozen part runs in a loop, fills what was made before, and gives what the rest hangs on."""

    def add(self):
        self.norm = nn.BatchNorm1d(WIDTH)

    def middle(self, x):
        found = torch.zeros(2, *x.shape)
        with torch.no_grad():
            for at in range(2):
                found[at] = self.norm(self.other(x * (at + 1)))
        return self.inner(found.mean(0))


class WatchingNorm(Odd):
    """A BatchNorm only watches; its statistics are used."""

    def add(self):
        self.norm = nn.BatchNorm1d(WIDTH, affine=False)

    def middle(self, x):
        if self.training:
            with torch.no_grad():
                self.norm(x)
        return self.inner((x - self.norm.running_mean) / torch.sqrt(self.norm.running_var + 1e-5))


class TwiceNorm(Odd):
    """A BatchNorm first without gradients, then with them; it counts its calls, and computes by that."""

    def add(self):
        self.norm = nn.BatchNorm1d(WIDTH, momentum=None)

    def middle(self, x):
        with torch.no_grad():
            known = self.norm(2 * x)
        return self.inner(self.norm(x) + known)


class Merged(nn.Module):
    """Adds one of its layers to the other in eval mode, by its own train(), as LoRA does; in another order."""

    def __init__(self):
        super().__init__()
        self.base, self.more, self.merged = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), True

    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        if self.merged:
            more = torch.tanh(self.more(x))
            return self.base(x), more
        return self.base(x), torch.tanh(self.more(x))


class Merges(Odd):
    def add(self):
        self.merged = Merged()

    def middle(self, x):
        base, more = self.merged(x)
        return self.other(torch.tanh(self.inner(base))) + more


class LaterNorm(Odd):
    """The statistics that a BatchNorm has moved on are used behind the next layer."""

    def add(self):
        self.norm = nn.BatchNorm1d(WIDTH, affine=False)

    def middle(self, x):
        self.norm(x)
        return (self.inner(x) - self.norm.running_mean) / torch.sqrt(self.norm.running_var + 1e-5)


class CastingNorm(Odd):
    """A BatchNorm in an autocast of its own."""

    def add(self):
        self.norm = nn.BatchNorm1d(WIDTH)

    def middle(self, x):
        with torch.autocast("cpu", enabled=False):
            x = self.drop(self.norm(x.float()))
        return self.inner(x)


class OwnCount(nn.Module):
    """Counts its calls as a BatchNorm does, and computes by that."""

    def __init__(self):
        super().__init__()
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x):
        if self.training:
            self.num_batches_tracked.add_(1)
            share = 1 / self.num_batches_tracked.float()
            with torch.no_grad():
                self.mean.mul_(1 - share).add_(share * x.mean(0))
        return x - self.mean


class CountsItself(Odd):
    def add(self):
        self.count = OwnCount()

    def middle(self, x):
        return self.inner(self.count(x))


class MeansByOut(Odd):
    """A moving average that `out=` writes, used at both ends."""

    def add(self):
        self.register_buffer("mean", torch.zeros(WIDTH))

    def moved(self, x):
        with torch.no_grad():
            torch.mul(self.mean, 0.9, out=self.mean)
            torch.add(self.mean, x.mean(0), alpha=0.1, out=self.mean)
        return x - self.mean

    def middle(self, x):
        return self.moved(self.inner(torch.tanh(self.other(self.moved(x)))))


class FrozenNorm(nn.BatchNorm1d):
    """Normalises with its running statistics in training, too."""

    def forward(self, x):
        return functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


class OtherNorm(nn.BatchNorm1d):
    """Has its own idea of weight, momentum and eps."""

    def forward(self, x):
        statistics = self.running_mean, self.running_var
        return functional.batch_norm(x, *statistics, self.weight * 2, self.bias, self.training, 0.3, 1e-2)


class ChunkedNorm(nn.BatchNorm1d):
    """Normalises in two parts."""

    def forward(self, x):
        return torch.cat([super(ChunkedNorm, self).forward(part) for part in x.chunk(2, 2)], 2)


class OwnNorms(Odd):
    """BatchNorms that do other things than torch's."""

    def add(self):
        self.norms = nn.Sequential(FrozenNorm(8), OtherNorm(8), ChunkedNorm(8))

    def middle(self, x):
        return self.inner(self.norms(x.unflatten(1, (8, 8))).flatten(1))


class OwnStatistics(Odd):
    """Running statistics in buffers of its own, which F.batch_norm changes without torch's counting it."""

    def add(self):
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("variance", torch.ones(8))

    def middle(self, x):
        x = x.unflatten(1, (8, 8))
        return self.inner(
            functional.batch_norm(x, self.mean, self.variance, training=self.training).flatten(1)
        )


class DrawsAlways(Odd):
    """Draws in evaluation, too."""

    def middle(self, x):
        return self.inner(functional.dropout(self.other(functional.dropout(x, 0.2, True)), 0.3, True))


class KeepsDtype(Odd):
    """Asks for dtypes, which autocast decides."""

    def middle(self, x):
        h = self.inner(x)
        filled = h.new_zeros(h.shape).index_add_(0, torch.arange(len(h)), h)
        return torch.tanh(filled.float()) + h


class PlainMean(Odd):
    """Running statistics that are the mean of all batches."""

    def add(self):
        self.norm = nn.BatchNorm1d(8, momentum=None)

    def middle(self, x):
        return self.inner(self.norm(x.unflatten(1, (8, 8))).flatten(1))


class ChannelsLast(Odd):
    """Its user chose how numbers of images lie: filters, values that cross and gradients keep it."""

    def add(self):
        self.convolutions = nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding="same")
        )
        self.convolutions.to(memory_format=torch.channels_last)

    def middle(self, x):
        return self.inner(self.convolutions(x.unflatten(1, (4, 4, 4))).flatten(1))


class KeepsTensor(Odd):
    """Makes a tensor in its first call, and keeps it for the others."""

    def add(self):
        self.grid = None

    def middle(self, x):
        if self.grid is None:
            self.grid = torch.linspace(-1.0, 1.0, WIDTH)
        return self.inner(torch.cat([x, self.grid.expand(len(x), -1)], 1)[:, WIDTH // 2 : -WIDTH // 2])


class OldNorm(Odd):
    """A weight that is no parameter: a hook computes it."""

    def add(self):
        self.normed = nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))

    def middle(self, x):
        return self.inner(torch.tanh(self.normed(x)))


class Counting(Odd):
    """Counts its calls, and computes nothing by that."""

    def add(self):
        self.calls = 0

    def middle(self, x):
        self.calls += 1
        return self.inner(x)


class Annealing(Odd):
    """Counts its calls, and computes by that."""

    def add(self):
        self.calls = 0

    def middle(self, x):
        self.calls += 1
        return self.inner(x) * min(1.0, self.calls / 10)


class EveryFourth(Counting):
    """Computes something else in every fourth call."""

    def middle(self, x):
        return super().middle(x) * (2.0 if self.calls % 4 == 0 else 1.0)


class Tupled(Odd):
    """Counts in a tuple."""

    def add(self):
        self.calls = (0,)

    def middle(self, x):
        self.calls = (self.calls[0] + 1,)
        return self.inner(x) * (1.0 + self.calls[0])


class Warming(Odd):
    """Counts its calls, and does something else in the first ones."""

    def add(self):
        self.calls = 0

    def middle(self, x):
        self.calls += 1
        return self.inner(x * 2 if self.calls < 6 else x)


class Sampled(Odd):
    """torch.distributions look at the numbers that they are given."""

    def middle(self, x):
        share = torch.distributions.Beta(0.4, 0.4).sample((len(x), 1))
        return torch.distributions.Normal(share * x, functional.softplus(self.inner(x))).rsample()


class OnGraph(Odd):
    """Adds along the edges of a sparse graph, in either of torch's ways to keep one."""

    def add(self):
        edges = torch.eye(WIDTH).roll(1, 0) + torch.eye(WIDTH)
        self.edges, self.other_edges = edges.to_sparse(), [edges.T.to_sparse()]

    def middle(self, x):
        x = torch.sparse.mm(self.edges, self.inner(x).T)
        return self.other((self.other_edges[0] @ x).T)


class NormedLayer(nn.Module):
    """The same as a layer in a row, whose stage runs it again."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(2)

    def forward(self, x):
        return checkpoint(self.run, x, use_reentrant=True)

    def run(self, x):
        return self.norm(self.inner(x).unflatten(1, (2, WIDTH // 2))).flatten(1)


def normed_row(in_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_features, WIDTH), NormedLayer(), NormedLayer(), nn.Linear(WIDTH, out_features)
    )


class Freezing(Odd):
    """Freezes a layer for one of its calls."""

    def middle(self, x):
        self.inner.requires_grad_(False)
        x = torch.tanh(self.inner(x))
        self.inner.requires_grad_(True)
        return self.inner(x)


TABLES: dict = {"real": torch.ones(8)}


class Keeper:
    """An object of the file that keeps something."""


KEEPER = Keeper()


def table(width):
    """Makes a table once, and keeps it with the function."""
    if not hasattr(table, "made"):
        table.made = torch.linspace(0.9, 1.1, width)
    return table.made


class Tables(nn.Module):
    """Keeps tables in a dictionary of the file, a class, a function, an object, and in a file it imports."""

    made = None

    def forward(self, x):
        import late_tables

        if "added" not in TABLES:
            TABLES["added"] = torch.linspace(-1.0, 1.0, 8)
            TABLES.setdefault("inner", {})["list"] = [torch.linspace(0.2, 0.3, 8)]
            KEEPER.kept = torch.linspace(0.4, 0.6, 8), 3
        if Tables.made is None:
            Tables.made = torch.linspace(0.8, 1.2, 8)
        x = x.clone()
        x += TABLES["added"] * TABLES["inner"]["list"][0]
        x[..., :4] = x[..., :4] * late_tables.TABLE[:4] + late_tables.PAIR.a[:4]
        return x * Tables.made * table(8) + KEEPER.kept[0] / KEEPER.kept[1]


class OfTables(nn.Module):
    """With a branch by numbers, or layers(), or neither."""

    def __init__(self, in_features, out_features, branch=False):
        super().__init__()
        self.first, self.tables, self.inner = nn.Linear(in_features, 8), Tables(), nn.Linear(8, 8)
        self.branch = Branch() if branch else nn.Tanh()
        self.last = nn.Linear(8, out_features)

    def forward(self, x):
        return self.last(self.inner(self.branch(self.tables(self.first(x)))))


class ListedTables(OfTables):
    def layers(self):
        return [self.first, self.tables, self.branch, self.inner, self.last]


class Branch(nn.Module):
    def forward(self, x):
        return x / 2 if x.abs().mean() > 0.3 else x


class Moved(Odd):
    """Moves a layer to where its input is."""

    def middle(self, x):
        return self.inner.to(x.device)(x)


class NamedLikeAMethod(nn.Module):
    """A submodule has the name of a method of nn.Module."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.first, self.branch, self.last = nn.Linear(in_features, 8), Branch(), nn.Linear(8, out_features)
        self.parameters = nn.ParameterList(nn.Module.parameters(self))

    def forward(self, x):
        return self.last(self.branch(self.first(x)))
