"""The table "Not put back" of docs/second_pass.md: each row does what the table says, and its remedy is right."""

import functools
import random
import threading
from collections import deque
from pathlib import Path
from queue import Queue
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import BOTH, assert_identical, assert_unmoved_is_plain, make_trainer, make_unmoved, snapshot
from tiny import Net, collate, make_model
from torch import nn
from transformers import ReformerConfig, ReformerForSequenceClassification, Trainer, TrainerCallback

from hf_gnp import GNPTrainer


PAGE = Path(__file__).parents[2] / "docs" / "second_pass.md"
MICRO_BATCHES = 6  # of `make_unmoved`
PASSES = 2 * MICRO_BATCHES + 1  # with the probe
REFUSED_BY_THE_PROBE = r"when it is run again.*in_second_pass.*docs/second_pass\.md"
ROWS: dict[str, str] = {}


def row(what: str, happens: str):
    """Say which row of the table a test shows: its first two columns."""
    ROWS[what] = happens
    return lambda test: test


def rows_of_the_page() -> dict[str, str]:
    text = PAGE.read_text().partition("## Not put back")[2].partition("\n## ")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return {what: happens for what, happens, _ in cells[2:]}


def test_each_row_has_a_test():
    assert rows_of_the_page() == ROWS


def with_loss(cls, extra):
    """A class whose `compute_loss` calls `extra(trainer, model, inputs)` and multiplies by what it returns, if any."""

    class WithLoss(cls):
        def compute_loss(self, model, inputs, *args, **kwargs):
            factor = extra(self, model, inputs)
            loss = model(**inputs)["loss"]
            return loss if factor is None else loss * factor

    return WithLoss


def trained(tmp_path, cls, extra=None, setup=None, **options):
    """Six micro-batches in three steps; the penalised trainer moves its weights by nothing."""
    if extra is not None:
        cls = with_loss(cls, extra)
    trainer = make_unmoved(tmp_path, cls, **{"model": Net(nn.Tanh), **options})
    if setup is not None:
        setup(trainer)
    trainer.train()
    return trainer


def assert_refused(tmp_path, extra, message, error=RuntimeError, **options):
    """Stock `Trainer` trains, the penalised run stops, and its weights are those it began with."""
    trained(tmp_path, Trainer, extra, **options)
    start = snapshot(Net(nn.Tanh))
    model = Net(nn.Tanh)
    with pytest.raises(error, match=message):
        trained(tmp_path, GNPTrainer, extra, **{"model": model, **options})
    if "model" not in options:
        assert_identical(snapshot(model), start)


# --- It happens twice ---


@row("`wandb.log`, `print`, or a file that `compute_loss` writes", "it happens twice")
@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("where", ["tracker", "print", "file"])
def test_written_by_the_loss(tmp_path, capsys, where, guarded):
    path, tracked = tmp_path / "losses.txt", []

    def write(trainer, model, inputs):
        if guarded and getattr(trainer, "in_second_pass", False):
            return
        if where == "tracker":
            tracked.append("loss written")
        elif where == "print":
            print("loss written")
        else:
            with path.open("a") as file:
                file.write("loss written\n")

    counts = []
    for cls in BOTH:
        tracked.clear()
        path.write_text("")
        trained(tmp_path, cls, write)
        texts = {"tracker": "\n".join(tracked), "print": capsys.readouterr().out, "file": path.read_text()}
        counts.append(texts[where].count("loss written"))
    assert counts == [MICRO_BATCHES, MICRO_BATCHES if guarded else PASSES]


COUNTS = {"n": 0}


def counters():
    """Four ways to count that no attribute of the trainer or of a module holds, and one that an attribute does."""
    calls = 0

    class Counts:
        n = 0

    def in_closure(*_):
        nonlocal calls
        calls += 1

    def in_global(*_):
        COUNTS["n"] += 1

    def on_class(*_):
        Counts.n += 1

    def on_parameter(trainer, model, inputs):
        weight = model.layers[0].weight
        weight.calls = getattr(weight, "calls", 0) + 1

    def in_attribute(trainer, model, inputs):
        trainer.calls = getattr(trainer, "calls", 0) + 1

    return {
        "global": (in_global, lambda trainer: COUNTS["n"]),
        "closure": (in_closure, lambda trainer: calls),
        "class": (on_class, lambda trainer: Counts.n),
        "parameter": (on_parameter, lambda trainer: trainer.model.layers[0].weight.calls),
        "attribute": (in_attribute, lambda trainer: trainer.calls),
    }


@row("a counter in a global, a closure, or on a class or a parameter", "it counts twice")
@pytest.mark.parametrize("where", counters())
def test_counter(tmp_path, where):
    found = []
    for cls in BOTH:
        COUNTS["n"] = 0
        count, read = counters()[where]
        found.append(read(trained(tmp_path, cls, count)))
    assert found == [MICRO_BATCHES, MICRO_BATCHES if where == "attribute" else PASSES]


@row("a container of more than 4,096 items in an attribute", "a change in place counts twice")
@pytest.mark.parametrize("size, guarded", [(4097, False), (4097, True), (4000, False)])
@pytest.mark.parametrize("kind", [list, dict.fromkeys])
def test_long_container(tmp_path, kind, size, guarded):
    def add(trainer, model, inputs):
        if not (guarded and getattr(trainer, "in_second_pass", False)):
            kept = trainer.kept
            kept.append(0) if isinstance(kept, list) else kept.setdefault(len(kept), 0)

    def setup(trainer):
        trainer.kept = kind(range(size))

    added = [len(trained(tmp_path, cls, add, setup).kept) - size for cls in BOTH]
    assert added == [MICRO_BATCHES, PASSES if size > 4096 and not guarded else MICRO_BATCHES]


class Wrapped(nn.Module):
    """A module of the user's around a BERT."""

    def __init__(self):
        super().__init__()
        self.bert = make_model("bert")

    def forward(self, **inputs):
        return self.bert(**inputs)


OWNERS = {
    "torch": lambda model: model.bert.classifier,
    "transformers": lambda model: model.bert.bert,
    "config": lambda model: model.bert.config,
    "own": lambda model: model,
}


@row(
    "an attribute of torch's modules, of transformers' modules without buffers, of configs or arguments",
    "it changes twice",
)
@pytest.mark.parametrize("where", OWNERS)
def test_attribute_of_a_librarys_module(tmp_path, where):
    def count(trainer, model, inputs):
        OWNERS[where](model).calls += 1

    found = []
    for cls in BOTH:
        model = Wrapped()
        OWNERS[where](model).calls = 0
        options = {"kind": "bert", "remove_unused_columns": False}
        trained(tmp_path, cls, count, model=model, **options)
        found.append(OWNERS[where](model).calls)
    assert found == [MICRO_BATCHES, MICRO_BATCHES if where == "own" else PASSES]


class Teacher(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self):
        self.calls += 1


def setattr_of(name, value, trainer):
    setattr(trainer, name, value)


@row("buffers of a module in a global or a closure, or behind a hook", "they change twice")
@pytest.mark.parametrize("where", ["closure", "hook", "attribute", "partial"])
def test_buffers_of_a_module(tmp_path, where):
    counts = []
    for cls in BOTH:
        teacher, model, options = Teacher(), Net(nn.Tanh), {}

        def in_closure(trainer, model, inputs, teacher=teacher):
            teacher()

        def loss_with(outputs, labels, num_items_in_batch=None, *, teacher):
            teacher()
            return nn.functional.cross_entropy(outputs["logits"], labels)

        if where == "hook":
            model.layers[0].register_forward_hook(lambda *_, teacher=teacher: teacher())
        if where == "partial":
            model, options["kind"] = make_model("bert"), "bert"
            options["compute_loss_func"] = functools.partial(loss_with, teacher=teacher)
        if where == "attribute":
            options["setup"] = functools.partial(setattr_of, "teacher", teacher)
        extra = in_closure if where in ("closure", "attribute") else None
        trained(tmp_path, cls, extra, model=model, **options)
        counts.append(teacher.calls.item())
    assert counts == [MICRO_BATCHES, MICRO_BATCHES if where in ("attribute", "partial") else PASSES]


class Slotted:
    __slots__ = ("calls",)

    def __init__(self):
        self.calls = 0


@row(
    "a NumPy array of more than 16,384 items, a `bytearray`, a `SimpleNamespace`, or a class with `__slots__`",
    "it changes twice",
)
@pytest.mark.parametrize("kind", ["array", "bytes", "namespace", "slots", "tensor"])
def test_attribute_that_is_not_put_back(tmp_path, kind):
    def count(trainer, model, inputs):
        if kind in objects:
            trainer.held.calls += 1
        else:
            trainer.held[0] += 1

    size, counts, objects = 2**14 + 1, [], {"slots": Slotted, "namespace": lambda: SimpleNamespace(calls=0)}
    kinds = {"array": np.zeros, "tensor": torch.zeros, "bytes": bytearray}
    held = objects[kind] if kind in objects else functools.partial(kinds[kind], size)
    for cls in BOTH:
        trainer = trained(tmp_path, cls, count, functools.partial(setattr_of, "held", held()))
        counts.append(trainer.held.calls if kind in objects else trainer.held[0])
    assert counts == [MICRO_BATCHES, MICRO_BATCHES if kind == "tensor" else PASSES]


@row("a hook that a forward registers", "it is registered in each pass")
@pytest.mark.parametrize("when", ["forward", "before training"])
def test_hook_registered_by_a_forward(tmp_path, when):
    class Hooked(Net):
        def forward(self, x, labels):
            if when == "forward":
                self.register()
            return super().forward(x, labels)

        def register(self):
            self.layers[0].register_forward_hook(lambda *_: None)

    found = []
    for cls in BOTH:
        model = Hooked(nn.Tanh)
        if when == "before training":
            model.register()
        trained(tmp_path, cls, model=model)
        found.append(len(model.layers[0]._forward_hooks))
    assert found == ([MICRO_BATCHES, PASSES] if when == "forward" else [1, 1])


@row("groups of the trainer's optimizer, changed in `compute_loss`", "they change twice")
@pytest.mark.parametrize("where", ["compute_loss", "callback"])
def test_groups_of_the_optimizer(tmp_path, where):
    def change(optimizer):
        optimizer.param_groups[0]["weight_decay"] += 1.0

    class Changes(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            change(optimizer)

    in_loss = where == "compute_loss"
    extra = (lambda trainer, model, inputs: change(trainer.optimizer)) if in_loss else None
    callbacks = [] if in_loss else [Changes()]
    runs = [trained(tmp_path, cls, extra, callbacks=callbacks) for cls in BOTH]
    decays = [trainer.optimizer.param_groups[0]["weight_decay"] for trainer in runs]
    assert decays == ([MICRO_BATCHES, PASSES] if in_loss else [3, 3])
    if not in_loss:
        assert_identical(*(snapshot(trainer.model) for trainer in runs))


# --- The passes differ, and no loss tells ---


class NoisyGradient(Net):
    """Adds noise to a gradient, as private training does."""

    def __init__(self, generator=None):
        super().__init__(nn.Tanh)
        if generator is None:
            generator = self.generator = torch.Generator().manual_seed(3)
        noised = lambda gradient: gradient + 0.1 * torch.randn(gradient.shape, generator=generator)  # noqa: E731
        self.layers[0].weight.register_hook(noised)


@row("noise in a gradient hook from such a generator", "the passes get different noise")
@pytest.mark.parametrize("where", ["closure", "module"])
def test_noise_in_a_gradient_hook(tmp_path, where):
    def make(cls):
        generator = torch.Generator().manual_seed(3) if where == "closure" else None
        model, drawn = NoisyGradient(generator), []
        model.layers[0].weight.register_hook(lambda gradient: drawn.append(gradient[0, 0].item()))
        make_unmoved(tmp_path, cls, model=model).train()
        return snapshot(model), drawn

    (plain, expected), (result, seen) = map(make, BOTH)
    passes = [seen[start : start + 2] for start in range(0, len(seen), 2)]  # of the windows of two micro-batches
    if where == "module":
        assert_identical(result, plain)
        assert passes[::2] == passes[1::2] and [x for first in passes[::2] for x in first] == expected
    else:
        assert not torch.equal(result["layers.0.weight"], plain["layers.0.weight"])
        assert all(first != second for first, second in zip(passes[::2], passes[1::2], strict=True))


class Tally:
    def __init__(self):
        self.n = 0


EXTRAS = {
    "object": (Tally, lambda extra: extra.n, lambda extra: setattr(extra, "n", extra.n + 1)),
    "set": (set, len, lambda extra: extra.add(len(extra))),
    "deque": (deque, len, lambda extra: extra.append(0)),
    "list": (list, len, lambda extra: extra.append(0)),
    "tensor": (lambda: {"n": torch.zeros(())}, lambda extra: int(extra["n"]), lambda extra: extra["n"].add_(1)),
}


@row("your own objects, sets and deques in the inputs", "a change in the forward stays")
@pytest.mark.parametrize("kind", EXTRAS)
def test_objects_in_the_inputs_change(tmp_path, kind):
    make, read, change = EXTRAS[kind]
    seen = {False: [], True: []}

    def use(trainer, model, inputs):
        extra = inputs.pop("extra")
        seen[trainer.in_second_pass].append(read(extra))
        change(extra)

    def setup(trainer):
        trainer.data_collator = lambda samples: {**collate(samples), "extra": make()}

    trained(tmp_path, GNPTrainer, use, setup)
    assert seen[False] == [0] * MICRO_BATCHES
    # The first is the probe's, and the second is the second pass of the same micro-batch.
    stays = kind in ("object", "set", "deque")
    assert seen[True] == ([1, 2, *[1] * (MICRO_BATCHES - 1)] if stays else [0] * (MICRO_BATCHES + 1))


SENT: Queue = Queue()


@row("items that a thread adds to an attribute in the second pass", "they are lost")
def test_items_of_a_thread(tmp_path):
    while not SENT.empty():
        SENT.get()

    def send(trainer, model, inputs):
        def work(is_second):
            trainer.items.append(is_second)
            SENT.put(is_second)

        thread = threading.Thread(target=work, args=(trainer.in_second_pass,))
        thread.start()
        thread.join()

    def setup(trainer):
        trainer.items = []

    trainer = trained(tmp_path, GNPTrainer, send, setup)
    assert trainer.items == [False] * MICRO_BATCHES
    assert sorted(SENT.queue) == [False] * MICRO_BATCHES + [True] * (PASSES - MICRO_BATCHES)


class Heads(nn.Module):
    """Two heads, of which one is trained at a time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.heads = nn.Linear(5, 7), nn.ModuleList(nn.Linear(7, 3) for _ in "ab")

    def switch(self, active: int) -> None:
        for number, head in enumerate(self.heads):
            head.requires_grad_(number == active)

    def trained(self) -> int:
        return [head.weight.requires_grad for head in self.heads].index(True)

    def forward(self, x, labels):
        logits = sum(head(self.body(x).tanh()) for head in self.heads)
        return {"loss": nn.functional.cross_entropy(logits, labels)}


@row("layers or adapters switched in `training_step` between micro-batches", "the last choice counts")
@pytest.mark.parametrize("where", ["training_step", "compute_loss"])
def test_layers_switched_between_micro_batches(tmp_path, where):
    def base(cls):
        class Switching(cls):
            def training_step(self, model, inputs, *args, **kwargs):
                if where == "training_step":
                    model.switch(self.number % 2)
                loss = super().training_step(model, inputs, *args, **kwargs)
                self.number += where == "training_step"
                return loss

            def compute_loss(self, model, inputs, *args, **kwargs):
                if where == "compute_loss":
                    model.switch(self.number % 2)
                    self.number += 1
                seen[getattr(self, "in_second_pass", False)].append(model.trained())
                return model(**inputs)["loss"]

        return Switching

    def setup(trainer):
        trainer.number = 0

    ends = []
    for cls in BOTH:
        seen = {False: [], True: []}
        ends.append(snapshot(trained(tmp_path, base(cls), setup=setup, model=Heads()).model))
        assert seen[False] == [0, 1] * 3
    second = seen[True][1:]  # after the probe's
    if where == "compute_loss":
        assert second == [0, 1] * 3
        assert_identical(*ends)
    else:
        assert second == [1] * MICRO_BATCHES
        assert not torch.equal(ends[0]["heads.0.weight"], ends[1]["heads.0.weight"])


# --- The probe stops the run ---


GENERATORS = {"torch": torch.Generator(), "python": random.Random(3)}


def draw(generator) -> float:
    return 1 + (generator.random() if isinstance(generator, random.Random) else torch.rand((), generator=generator))


@row("a generator in a global or a closure", "the probe stops the run")
@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("where", ["global", "closure"])
def test_generator(tmp_path, where, name):
    own = random.Random(3) if name == "python" else torch.Generator()
    source = (lambda: own) if where == "closure" else (lambda: GENERATORS[name])
    assert_refused(tmp_path, lambda *_: draw(source()), REFUSED_BY_THE_PROBE)


@pytest.mark.parametrize("name", GENERATORS)
def test_generator_in_an_attribute(tmp_path, name):
    def make(cls):
        trainer = make_unmoved(tmp_path, with_loss(cls, lambda trainer, *_: draw(trainer.own)), model=Net(nn.Tanh))
        trainer.own = random.Random(3) if name == "python" else torch.Generator().manual_seed(3)
        return trainer

    assert_unmoved_is_plain(make)


@row("an iterator or a file that `compute_loss` reads", "the probe stops the run")
@pytest.mark.parametrize("kind", ["iterator", "file"])
def test_read_by_the_loss(tmp_path, kind):
    path = tmp_path / "factors.txt"
    path.write_text("\n".join(str(1 + number / 10) for number in range(50)))

    def setup(trainer):
        trainer.factors = path.open() if kind == "file" else map(float, path.read_text().split())

    assert_refused(tmp_path, lambda trainer, *_: float(next(trainer.factors)), REFUSED_BY_THE_PROBE, setup=setup)

    def make(cls):  # instead: in the data loader
        factors = map(float, path.read_text().split())
        trainer = make_unmoved(tmp_path, with_loss(cls, lambda *args: args[-1].pop("factor")), model=Net(nn.Tanh))
        trainer.data_collator = lambda samples: {**collate(samples), "factor": next(factors)}
        return trainer

    assert_unmoved_is_plain(make)


class Codebook(nn.Module):
    """Follows the mean of its inputs, in another parameter after each forward, or in the same one."""

    def __init__(self, is_replaced: bool):
        super().__init__()
        self.mean, self.is_replaced = nn.Parameter(torch.zeros(7), requires_grad=is_replaced), is_replaced

    def forward(self, x):
        mean = self.mean.detach().clone()
        new = 0.5 * mean + 0.5 * x.detach().mean(0)
        if self.is_replaced:
            self.mean = nn.Parameter(new)
        else:
            self.mean.data.copy_(new)
        return x - mean


@row("a parameter that a forward replaces, as in some VQ-VAE codebooks", "the probe stops the run")
def test_replaced_parameter(tmp_path):
    model = Net(functools.partial(Codebook, True))
    assert_refused(tmp_path, None, REFUSED_BY_THE_PROBE, model=model)
    assert_unmoved_is_plain(lambda cls: make_unmoved(tmp_path, cls, model=Net(functools.partial(Codebook, False))))


@row("random numbers of the operating system, as in Reformer", "the probe stops the run")
def test_numbers_of_the_operating_system(tmp_path):
    source = random.SystemRandom()
    assert_refused(tmp_path, lambda *_: 1 + source.random(), REFUSED_BY_THE_PROBE)


def test_reformer(tmp_path):
    """It seeds its dropout from the operating system."""
    sizes = {"hidden_size": 12, "attention_head_size": 6, "num_attention_heads": 2, "feed_forward_size": 12}
    layout = {"attn_layers": ["local"], "axial_pos_embds": False, "max_position_embeddings": 16, "num_labels": 3}
    short = {"local_attn_chunk_length": 4, "vocab_size": 61, "hidden_dropout_prob": 0.5, "is_decoder": False}
    torch.manual_seed(0)
    model = ReformerForSequenceClassification(ReformerConfig(**sizes, **layout, **short))
    with pytest.raises(RuntimeError, match=REFUSED_BY_THE_PROBE):
        make_unmoved(tmp_path, GNPTrainer, "bert", model=model).train()


# --- Refused ---


@row("features computed from weights before `compute_loss`", "refused: the inputs already have an autograd graph")
@pytest.mark.parametrize("where", ["training_step", "compute_loss"])
def test_features_computed_before_the_loss(tmp_path, where):
    def base(cls):
        class Featured(cls):
            def training_step(self, model, inputs, *args, **kwargs):
                if where == "training_step":
                    inputs = {**inputs, "x": model.embed(inputs["x"])}
                return super().training_step(model, inputs, *args, **kwargs)

            def compute_loss(self, model, inputs, *args, **kwargs):
                if where == "compute_loss":
                    inputs = {**inputs, "x": model.embed(inputs["x"])}
                return model(**inputs)["loss"]

        return Featured

    class Embedding(Net):
        def __init__(self):
            super().__init__(nn.Tanh)
            self.embed = nn.Linear(5, 5)

    make = lambda cls: make_unmoved(tmp_path, base(cls), model=Embedding())  # noqa: E731
    if where == "compute_loss":
        assert_unmoved_is_plain(make)
        return
    make(Trainer).train()
    with pytest.raises(NotImplementedError, match="inputs of compute_loss have a graph"):
        make(GNPTrainer).train()


@row("a loss whose only gradient comes from a backward inside `compute_loss`", "refused")
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("by_accelerator", [False, True])
def test_lone_backward_inside_the_loss(tmp_path, by_accelerator, accumulation):
    def cached(cls):
        class Cached(cls):
            def compute_loss(self, model, inputs, *args, **kwargs):
                loss = model(**inputs)["loss"]
                self.accelerator.backward(loss) if by_accelerator else loss.backward()
                return loss.detach().requires_grad_()

        return Cached

    options = {"model": Net(nn.Tanh), "gradient_accumulation_steps": accumulation, "max_steps": 1}
    trained(tmp_path, cached(Trainer), **options)
    start = snapshot(options["model"])
    message = r"Cached\.compute_loss returned has no gradient.*inside compute_loss.*gnp_alpha=0"
    error: type[Exception] = NotImplementedError
    if accumulation > 1 and not by_accelerator:  # which cannot be told from an edit of the gradient
        message, error = r"gradient was changed between the micro-batches.*gnp_alpha=0", RuntimeError
    with pytest.raises(error, match=message):
        trained(tmp_path, cached(GNPTrainer), **options)
    assert_identical(snapshot(options["model"]), start)


def keeps_gradients(model: nn.Module, name: str) -> None:
    """Let hooks add up what they see in an attribute of each parameter, which exists before or only from then on."""

    def keep(gradient, parameter):
        before = getattr(parameter, name, None)
        if before is None:
            setattr(parameter, name, gradient.clone())
        else:
            before.add_(gradient)

    for parameter in model.parameters():
        if name == "main_grad":
            parameter.main_grad = torch.zeros_like(parameter)
        parameter.register_hook(lambda gradient, parameter=parameter: keep(gradient, parameter))


@row("hooks that write `main_grad` or per-sample gradients on parameters", "refused")
@pytest.mark.parametrize("name", ["main_grad", "grad_sample"])
def test_gradients_kept_on_parameters(tmp_path, name):
    model = Net(nn.Tanh)
    keeps_gradients(model, name)
    start = snapshot(model)
    message = rf"writes into layers\.\d\.\w+\.{name}.*Use \.grad.*gnp_alpha=0"
    with pytest.raises(NotImplementedError, match=message):
        trained(tmp_path, GNPTrainer, model=model)
    assert_identical(snapshot(model), start)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_kept_in_lists_on_parameters(tmp_path):
    """Opacus appends the gradients of each backward to a list."""
    model = Net(nn.Tanh)
    for parameter in model.parameters():
        parameter.grad_sample = []
        parameter.register_hook(lambda gradient, parameter=parameter: parameter.grad_sample.append(gradient.clone()))
    with pytest.raises(NotImplementedError, match="grad_sample"):
        trained(tmp_path, GNPTrainer, model=model)


def test_gradients_kept_in_a_dictionary_in_the_first_pass_alone(tmp_path):
    """What the message names as the remedy: as many gradients as there are micro-batches."""
    kept: dict[str, list[torch.Tensor]] = {}
    model = Net(nn.Tanh)
    trainer = make_unmoved(tmp_path, GNPTrainer, model=model)

    def keep(gradient, name):
        if not trainer.in_second_pass:
            kept.setdefault(name, []).append(gradient.clone())

    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: keep(gradient, name))
    trainer.train()
    assert {len(gradients) for gradients in kept.values()} == {MICRO_BATCHES}


def test_hook_that_scales_the_gradient(tmp_path):
    """It changes `.grad` itself."""

    def make(cls):
        model = Net(nn.Tanh)
        for parameter in model.parameters():
            parameter.register_hook(lambda gradient: gradient * 0.5)
        return make_unmoved(tmp_path, cls, model=model)

    assert_unmoved_is_plain(make)


class LinearSurrogate(nn.Module):
    """A surrogate whose gradient is the same at all weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 3)

    def forward(self, x, labels):
        value = (self.layer(x) * torch.arange(12.0).view(4, 3)).mean()
        return {"loss": value - value.detach()}


@row(
    "a linear model with a loss whose value and gradient do not depend on the weights",
    "the probe stops the run",
)
def test_linear_surrogate(tmp_path):
    """Losses and gradients of both passes are rightly the same. No check of the run can tell that from a copy."""
    trainer = make_trainer(tmp_path, "net", model=LinearSurrogate(), max_steps=2)
    with pytest.raises(RuntimeError, match=r"never reached the forward.*gnp_alpha=0"):
        trainer.train()
