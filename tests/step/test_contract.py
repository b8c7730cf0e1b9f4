"""The table "Not put back" of docs/second_pass.md: each row does what the table says, and its remedy is right."""

import functools
import itertools
import random
import threading
from collections import deque
from pathlib import Path
from queue import Queue
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import BOTH, assert_identical, assert_unmoved_is_plain, make_trainer, make_unmoved, snapshot, with_loss
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


def make_scaled(tmp_path, cls, factor=None, **options):
    """A trainer of six micro-batches in three steps. Its loss is multiplied by what `factor` returns, if anything."""

    def loss(trainer, model, inputs):
        by = factor(trainer, model, inputs)
        value = model(**inputs)["loss"]
        return value if by is None else value * by

    return make_unmoved(tmp_path, cls if factor is None else with_loss(cls, loss), **options)


def trained(*args, **options):
    trainer = make_scaled(*args, **options)
    trainer.train()
    return trainer


def assert_refused(tmp_path, extra, message, error=RuntimeError, **options):
    """Stock `Trainer` trains, the penalised run stops, and its weights are those it began with."""
    trained(tmp_path, Trainer, extra, **options)
    start = snapshot(Net())
    model = Net()
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


class Wrapped(nn.Module):
    """A module of the user's around a BERT."""

    def __init__(self):
        super().__init__()
        self.bert = make_model("bert")

    def forward(self, **inputs):
        return self.bert(**inputs)


class Slotted:
    __slots__ = ("calls",)


class Teacher(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))


GLOBAL, GLOBAL_TEACHER = SimpleNamespace(), Teacher()


def in_closure(own):
    return lambda trainer: own


# Where the loss counts in `calls`, and whether it counts twice there.
COUNTERS = {
    "global": (lambda trainer: GLOBAL, True),
    "closure": (in_closure(SimpleNamespace()), True),
    "class": (lambda trainer: Wrapped, True),
    "parameter": (lambda trainer: trainer.model.bert.classifier.weight, True),
    "trainer": (lambda trainer: trainer, False),
    "torch's module": (lambda trainer: trainer.model.bert.classifier, True),
    "transformers' module": (lambda trainer: trainer.model.bert.bert, True),
    "config": (lambda trainer: trainer.model.bert.config, True),
    "own module": (lambda trainer: trainer.model, False),
    "namespace": (lambda trainer: trainer.namespace, True),
    "slots": (lambda trainer: trainer.slotted, True),
    "buffer in a global": (lambda trainer: GLOBAL_TEACHER, True),
    "buffer in a closure": (in_closure(Teacher()), True),
    "buffer in an attribute": (lambda trainer: trainer.teacher, False),
}


@row("a counter in a global, a closure, or on a class or a parameter", "it counts twice")
@row(
    "an attribute of torch's modules, of transformers' modules without buffers, of configs or arguments",
    "it changes twice",
)
@pytest.mark.parametrize("where", COUNTERS)
def test_counter(tmp_path, where):
    counter_of, is_twice = COUNTERS[where]
    is_buffer = where.startswith("buffer")

    def setup(trainer):
        trainer.namespace, trainer.slotted, trainer.teacher = SimpleNamespace(), Slotted(), Teacher()
        counter_of(trainer).calls = torch.zeros(()) if is_buffer else 0

    def count(trainer, model, inputs):
        counter_of(trainer).calls += 1

    options = {"kind": "bert", "remove_unused_columns": False, "setup": setup}
    runs = [counter_of(trained(tmp_path, cls, count, model=Wrapped(), **options)).calls for cls in BOTH]
    assert runs == [MICRO_BATCHES, PASSES if is_twice else MICRO_BATCHES]


@row("buffers of a module in a global or a closure, or behind a hook", "they change twice")
@pytest.mark.parametrize("where", ["hook", "partial"])
def test_buffers_of_a_module(tmp_path, where):
    counts = []
    for cls in BOTH:
        teacher, options = Teacher(), {"model": make_model("bert"), "kind": "bert"}

        def count(*_, teacher=teacher):
            teacher.calls += 1

        def loss_with(outputs, labels, num_items_in_batch=None, *, teacher):
            teacher.calls += 1
            return nn.functional.cross_entropy(outputs["logits"], labels)

        if where == "hook":
            options["model"].classifier.register_forward_hook(count)
        else:
            options["compute_loss_func"] = functools.partial(loss_with, teacher=teacher)
        trained(tmp_path, cls, **options)
        counts.append(teacher.calls.item())
    assert counts == [MICRO_BATCHES, PASSES if where == "hook" else MICRO_BATCHES]


def append(kept):
    kept.append(0)


def insert(kept):
    kept[len(kept)] = 0


def add_to_first(kept):
    kept[0] += 1


# What an attribute holds, how the loss adds to it, how that is counted, and whether it is added twice.
HELD = {
    "long list": (lambda: [0] * 4097, append, len, True),
    "list": (lambda: [0] * 4000, append, len, False),
    "long dict": (lambda: dict.fromkeys(range(4097)), insert, len, True),
    "dict": (lambda: dict.fromkeys(range(4000)), insert, len, False),
    "array": (lambda: np.zeros(2**14 + 1), add_to_first, lambda kept: kept[0], True),
    "bytes": (lambda: bytearray(2**14 + 1), add_to_first, lambda kept: kept[0], True),
    "tensor": (lambda: torch.zeros(2**14 + 1), add_to_first, lambda kept: kept[0].item(), False),
}


@row("a container of more than 4,096 items in an attribute", "a change in place counts twice")
@row(
    "a NumPy array of more than 16,384 items, a `bytearray`, a `SimpleNamespace`, or a class with `__slots__`",
    "it changes twice",
)
@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("kind", HELD)
def test_object_in_an_attribute(tmp_path, kind, guarded):
    """The namespace and the slots are in `test_counter`."""
    make, change, count, is_twice = HELD[kind]

    def add(trainer, model, inputs):
        if not (guarded and getattr(trainer, "in_second_pass", False)):
            change(trainer.held)

    def setup(trainer):
        trainer.held = make()

    added = [count(trained(tmp_path, cls, add, setup=setup).held) - count(make()) for cls in BOTH]
    assert added == [MICRO_BATCHES, PASSES if is_twice and not guarded else MICRO_BATCHES]


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
        model = Hooked()
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
        super().__init__()
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

    trained(tmp_path, GNPTrainer, use, data_collator=lambda samples: {**collate(samples), "extra": make()})
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

    trainer = trained(tmp_path, GNPTrainer, send, setup=setup)
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


@row(
    "a buffer, a frozen weight or a large tensor that `training_step` writes through `.data` between micro-batches",
    "its first value counts",
)
@pytest.mark.parametrize("where", ["training_step", "_prepare_inputs"])
@pytest.mark.parametrize(
    "kind, how",
    [
        *itertools.product(("small buffer", "buffer", "attribute"), ("written", "through .data", "replaced")),
        *itertools.product(("frozen weight",), ("written", "through .data")),
    ],
)
def test_values_set_for_each_micro_batch(tmp_path, kind, how, where):
    """Such as weights of classes, or a teacher: the second pass sees those of its micro-batch."""
    numel = 4 if kind == "small buffer" else 2**14 + 1

    def base(cls):
        class Setting(cls):
            def owner_and_name(self):
                return (self, "factor") if kind == "attribute" else (self.model, "factor")

            def set(self):
                owner, name = self.owner_and_name()
                value = torch.full((numel,), 1.0 + self.number % 3)
                if how == "replaced":
                    setattr(owner, name, value)
                else:
                    tensor = getattr(owner, name)
                    (tensor.data if how == "through .data" else tensor).copy_(value)
                self.number += 1

            def training_step(self, *args, **kwargs):
                if where == "training_step":
                    self.set()
                return super().training_step(*args, **kwargs)

            def _prepare_inputs(self, inputs):
                if where == "_prepare_inputs":
                    self.set()
                return super()._prepare_inputs(inputs)

            def compute_loss(self, model, inputs, *args, **kwargs):
                owner, name = self.owner_and_name()
                return model(**inputs)["loss"] * getattr(owner, name)[0]

        return Setting

    def setup(trainer):
        trainer.number, value = 0, torch.ones(numel)
        if kind == "frozen weight":
            trainer.model.factor = nn.Parameter(value, requires_grad=False)
        elif kind == "attribute":
            trainer.factor = value
        else:
            trainer.model.register_buffer("factor", value)

    ends = [snapshot(trained(tmp_path, base(cls), setup=setup).model) for cls in BOTH]
    if how == "through .data":
        assert not torch.equal(ends[0]["layers.0.weight"], ends[1]["layers.0.weight"])
    else:
        assert_identical(*ends)


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
        collator = lambda samples: {**collate(samples), "factor": next(factors)}  # noqa: E731
        return make_scaled(tmp_path, cls, lambda *args: args[-1].pop("factor"), data_collator=collator)

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
        trained(tmp_path, GNPTrainer, kind="bert", model=model)


# --- Refused ---


@row("features computed from weights before `compute_loss`", "refused: the inputs already have an autograd graph")
@pytest.mark.parametrize("where", ["training_step", "compute_loss"])
def test_features_computed_before_the_loss(tmp_path, where):
    def base(cls):
        class Featured(cls):
            def training_step(self, model, inputs, *args, **kwargs):
                return super().training_step(model, embedded("training_step", model, inputs), *args, **kwargs)

            def compute_loss(self, model, inputs, *args, **kwargs):
                return model(**embedded("compute_loss", model, inputs))["loss"]

        return Featured

    def embedded(method, model, inputs):
        return {**inputs, "x": model.embed(inputs["x"])} if method == where else inputs

    class Embedding(Net):
        def __init__(self):
            super().__init__()
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
    def cached(self, model, inputs):
        loss = model(**inputs)["loss"]
        self.accelerator.backward(loss) if by_accelerator else loss.backward()
        return loss.detach().requires_grad_()

    options = {"model": Net(), "gradient_accumulation_steps": accumulation, "max_steps": 1}
    trained(tmp_path, with_loss(Trainer, cached), **options)
    start = snapshot(options["model"])
    message = r"WithLoss\.compute_loss returned has no gradient.*inside compute_loss.*gnp_alpha=0"
    error: type[Exception] = NotImplementedError
    if accumulation > 1 and not by_accelerator:  # which cannot be told from an edit of the gradient
        message, error = r"gradient was changed between the micro-batches.*gnp_alpha=0", RuntimeError
    with pytest.raises(error, match=message):
        trained(tmp_path, with_loss(GNPTrainer, cached), **options)
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
    model = Net()
    keeps_gradients(model, name)
    start = snapshot(model)
    message = rf"writes into layers\.\d\.\w+\.{name}.*Use \.grad.*gnp_alpha=0"
    with pytest.raises(NotImplementedError, match=message):
        trained(tmp_path, GNPTrainer, model=model)
    assert_identical(snapshot(model), start)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_kept_in_lists_on_parameters(tmp_path):
    """Opacus appends the gradients of each backward to a list."""
    model = Net()
    for parameter in model.parameters():
        parameter.grad_sample = []
        parameter.register_hook(lambda gradient, parameter=parameter: parameter.grad_sample.append(gradient.clone()))
    with pytest.raises(NotImplementedError, match="grad_sample"):
        trained(tmp_path, GNPTrainer, model=model)


def test_gradients_kept_in_a_dictionary_in_the_first_pass_alone(tmp_path):
    """What the message names as the remedy: as many gradients as there are micro-batches."""
    kept: dict[str, list[torch.Tensor]] = {}
    model = Net()
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
        model = Net()
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
