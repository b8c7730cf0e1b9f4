"""What scripts rely on when they replace `Trainer` by one word: held against stock `Trainer` beside it."""

import gc
import importlib
import inspect
import logging
import sys
import weakref

import pytest
import torch
from runs import (
    BOTH,
    assert_identical,
    logs_of,
    make_args,
    make_trainer,
    run,
    snapshot,
    trained,
    with_loss,
    without_gnp,
)
from tiny import Net, collate, make_data, make_model
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_gnp import GNPMixin, GNPTrainer, GNPTrainingArguments


NO_MOVE = 1e-30


def make(tmp_path, cls=GNPTrainer, args_cls=None, **kwargs) -> Trainer:
    """Plain `TrainingArguments` for both, unless another class is given."""
    options = {name: kwargs.pop(name) for name in ("callbacks", "eval_dataset", "compute_metrics") if name in kwargs}
    args = make_args(tmp_path, args_cls or TrainingArguments, **kwargs)
    data = make_data("net")
    return cls(Net(), args, data_collator=collate, train_dataset=data, **options)


# --- Construction ---


def test_signature():
    assert inspect.signature(GNPTrainer) == inspect.signature(Trainer)
    assert "processing_class" in inspect.signature(GNPTrainer.__init__).parameters
    assert inspect.signature(GNPTrainer.train) == inspect.signature(Trainer.train)


def test_mixin_after_the_trainer_is_refused():
    with pytest.raises(TypeError, match=r"class Wrong\(GNPMixin, Trainer\)"):

        class Wrong(Trainer, GNPMixin):
            pass


def test_signature_of_a_subclass():
    class Base(Trainer):
        def __init__(self, *args, extra=None, **kwargs):
            super().__init__(*args, **kwargs)

    class Penalised(GNPMixin, Base):
        pass

    class Own(Penalised):
        def __init__(self, model, another, **kwargs):
            super().__init__(model, **kwargs)

    assert "extra" in inspect.signature(Penalised).parameters
    assert list(inspect.signature(Own).parameters) == ["model", "another", "kwargs"]


@pytest.mark.parametrize("alpha", [0.0, 0.8])
def test_order_of_callbacks(tmp_path, alpha):
    class Mine(TrainerCallback):
        pass

    lists = []
    for cls in BOTH:
        trainer = make_trainer(tmp_path, "net", cls, callbacks=[Mine()], gnp_alpha=alpha)
        trainer.add_callback(EarlyStoppingCallback)
        lists.append([type(callback) for callback in trainer.callback_handler.callbacks])
        assert isinstance(trainer.pop_callback(Mine), Mine)
    assert lists[0] == lists[1]


def test_stateful_callbacks_are_saved(tmp_path):
    class Stateful(TrainerCallback, ExportableState):
        def __init__(self, seen=0):
            self.seen = seen

        def on_step_end(self, args, state, control, **kwargs):
            self.seen += 1

        def state(self):
            return {"args": {"seen": self.seen}, "attributes": {}}

    saved = []
    for cls in BOTH:
        trainer = make(tmp_path / cls.__name__, cls, callbacks=[Stateful()], max_steps=2, save_strategy="steps")
        trainer.args.save_steps = 2
        trainer.train()
        saved.append({k: v for k, v in trainer.state.stateful_callbacks.items() if k != "GNPStateCallback"})
    assert saved[0] == saved[1]


def test_callbacks_of_another_trainer(tmp_path):
    first = make(tmp_path, max_steps=1)
    first.train()
    for cls in BOTH:
        second = make(tmp_path, cls, callbacks=first.callback_handler.callbacks[2:], max_steps=1)
        second.train()
        assert second.state.global_step == 1


# --- Arguments ---


def test_args_stay_the_users_object(tmp_path):
    """One that is set later counts, and callbacks and the trainer hold the same object."""
    seen = []

    class Seen(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append(args)

    for cls in BOTH:
        args = make_args(tmp_path, TrainingArguments, max_steps=4)
        trainer = cls(Net(), args, data_collator=collate, train_dataset=make_data("net"), callbacks=[Seen()])
        assert trainer.args is args
        args.max_steps = 2
        trainer.train()
        assert trainer.state.global_step == 2
        assert seen.pop() is args


def test_saved_args_load_without_hf_gnp(tmp_path, monkeypatch):
    make(tmp_path).save_model(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "hf_gnp"]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises
    with pytest.raises(ImportError):
        importlib.import_module("hf_gnp.arguments")
    torch.load(tmp_path / "training_args.bin", weights_only=False)


def set_on(trainer: Trainer, **values) -> None:
    for name, value in values.items():
        setattr(trainer.args, name, value)


@pytest.mark.parametrize("args_cls", [TrainingArguments, GNPTrainingArguments])
@pytest.mark.parametrize(
    ("values", "r", "alpha"),
    [
        ({"gnp_r": 0.1}, 0.1, 0.8),
        ({"gnp_r": "0.1"}, 0.1, 0.8),
        ({"gnp_alpha": 1.0}, 0.05, 1.0),
        ({"gnp_alpha": None}, 0.05, 0.8),
    ],
)
def test_args_set_late(tmp_path, args_cls, values, r, alpha):
    trainer = make(tmp_path, args_cls=args_cls, max_steps=2)
    set_on(trainer, **values)
    late = run(trainer)
    default = {"gnp_r": None} if args_cls is TrainingArguments else {}
    early = run(make(tmp_path, args_cls=GNPTrainingArguments, max_steps=2, **{**default, **values}))
    assert_identical(late, early)
    assert (late["logs"][0]["gnp_r"], late["logs"][0]["gnp_alpha"]) == (r, pytest.approx(alpha))


@pytest.mark.parametrize("args_cls", [TrainingArguments, GNPTrainingArguments])
@pytest.mark.parametrize(
    "values",
    [
        {"gnp_r": -0.1},
        {"gnp_r": float("nan")},
        {"gnp_alpha": 3},
        {"gnp_warmup_type": "nonsense"},
        {"gnp_interval": 0},
        {"gnp_target_modules": ["nope"]},
    ],
)
def test_wrong_args_set_late_are_refused(tmp_path, args_cls, values):
    trainer = make(tmp_path, args_cls=args_cls, max_steps=2)
    set_on(trainer, **values)
    start = snapshot(trainer.model)
    with pytest.raises(ValueError, match=next(iter(values))):
        trainer.train()
    assert_identical(snapshot(trainer.model), start)


def test_alpha_set_late_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_gnp.engines.support.is_sagemaker_mp_enabled", lambda: True)
    trainer = make(tmp_path, args_cls=GNPTrainingArguments, gnp_alpha=0.0, max_steps=1)
    trainer.args.gnp_alpha = 1.0
    with pytest.raises(NotImplementedError, match="SageMaker"):
        trainer.train()


OF_A_TRIAL = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2}


class Searching(GNPTrainer):
    """Notes gnp arguments at the beginning of each trial."""

    def _hp_search_setup(self, trial):
        super()._hp_search_setup(trial)
        self.values.append(tuple(getattr(self.gnp_args, name) for name in self.names))


def searching(args, *names):
    data = make_data("net")
    datasets = {"train_dataset": data, "eval_dataset": data}
    trainer = Searching(args=args, data_collator=collate, model_init=lambda: Net(), **datasets)
    trainer.names, trainer.values = names, []
    return trainer


def test_hyperparameter_search(tmp_path):
    pytest.importorskip("optuna", reason="a client of the dev extra")
    values = [(0.1, 0.2), (0.2, 1.0)]
    for args_cls in (TrainingArguments, GNPTrainingArguments):
        trainer = searching(make_args(tmp_path, args_cls, **OF_A_TRIAL), "gnp_r", "gnp_alpha", "gnp_metric")

        def space(trial):
            """What Trainer sets is what the space returns, not what it draws."""
            r, alpha = values[trial.number]
            drawn = {"gnp_r": trial.suggest_float("tenfold", 10 * r, 10 * r) / 10}
            return drawn | {"gnp_alpha": trial.suggest_float("gnp_alpha", alpha, alpha), "gnp_metric": "layer"}

        trainer.hyperparameter_search(space, n_trials=2, backend="optuna")
        assert trainer.values == [(r, alpha, "layer") for r, alpha in values]


@pytest.mark.parametrize("args_cls", [TrainingArguments, GNPTrainingArguments])
def test_trial_begins_with_the_users_values(tmp_path, args_cls):
    """transformers keeps the values of the trial before, which a pair of arguments may refuse."""
    pytest.importorskip("optuna", reason="a client of the dev extra")
    trials = [
        {"gnp_metric": "layer", "gnp_r": 0.2},
        {"gnp_r": 0.1},
        {"gnp_warmup_type": "zero", "gnp_warmup_steps": 0.5},
        {"gnp_warmup_type": "none"},
    ]
    default = {"gnp_r": None} if args_cls is GNPTrainingArguments else {}
    args = make_args(tmp_path, args_cls, **OF_A_TRIAL, **default)
    trainer = searching(args, "gnp_r", "gnp_metric", "gnp_warmup_steps")
    trainer.hyperparameter_search(lambda trial: trials[trial.number], n_trials=len(trials), backend="optuna")
    expected = [(0.2, "layer", None), (0.1, "l2", None), (0.05, "layer", 0.5), (0.05, "layer", None)]
    assert trainer.values == expected


def test_args_replaced_between_runs(tmp_path):
    plain = make_args(tmp_path, GNPTrainingArguments, max_steps=1, gnp_alpha=0.0)
    trainer = make(tmp_path, args_cls=GNPTrainingArguments, max_steps=1, gnp_r=0.1, gnp_alpha=1.0)
    penalised, logs = trainer.args, []
    for trainer.args in (penalised, plain, penalised):
        trainer.train()
        logs.append("gnp_r" in trainer.state.log_history[0])
    assert logs == [True, False, True]
    assert (penalised.gnp_r, penalised.gnp_alpha) == (0.1, 1.0)


def test_search_with_other_args(tmp_path):
    pytest.importorskip("optuna", reason="a client of the dev extra")
    later = make_args(tmp_path, gnp_r=0.5, gnp_metric="layer", **OF_A_TRIAL)
    trainer = searching(make_args(tmp_path, **OF_A_TRIAL), "gnp_r", "gnp_metric")
    trainer.args = later
    trainer.hyperparameter_search(lambda trial: {"learning_rate": 0.1}, n_trials=2, backend="optuna")
    assert trainer.values == 2 * [(0.5, "layer")]


def test_no_resume_warning_without_resume(tmp_path, caplog):
    trainer = make(tmp_path, max_steps=1)
    trainer.args.gnp_alpha = 0.5
    with caplog.at_level(logging.WARNING, logger="hf_gnp"):
        trainer.train()
        trainer.args.gnp_alpha = 0.3
        trainer.train()
    assert not [record for record in caplog.records if record.name.startswith("hf_gnp")]


# --- Runs ---


@pytest.mark.parametrize("values", [{"gnp_alpha": 0.0}, {"gnp_alpha": 1.0, "gnp_r": NO_MOVE}])
def test_train_twice(tmp_path, values):
    results = []
    for cls in BOTH:
        trainer = make_trainer(tmp_path, "net", cls, max_steps=3, gradient_accumulation_steps=2, **values)
        runs = [run(trainer), run(trainer)]
        for result in runs:
            result["logs"] = without_gnp(result["logs"])
        results.append(runs)
    assert_identical(*results[::-1])


@pytest.mark.parametrize("values", [{"gnp_alpha": 0.0}, {"gnp_alpha": 1.0, "gnp_r": NO_MOVE}, {"gnp_alpha": 0.8}])
def test_evaluation_within_a_window(tmp_path, values):
    """A callback evaluates between two micro-batches: it changes nothing, and logs what it logs with `Trainer`."""

    class Evaluates(TrainerCallback):
        trainer = None

        def on_substep_end(self, args, state, control, **kwargs):
            if self.trainer is not None:
                self.trainer.evaluate()
                self.trainer.model.train()

    def train(cls, evaluates):
        callback = Evaluates()
        settings = {"max_steps": 3, "gradient_accumulation_steps": 2, "callbacks": [callback], **values}
        trainer = make_trainer(tmp_path, "net", cls, eval_dataset=make_data("net", 8), **settings)
        callback.trainer = trainer if evaluates else None
        result = run(trainer)
        result["losses"] = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
        result["logs"] = without_gnp(result["logs"])
        return result

    evaluated = train(GNPTrainer, True)
    assert len(evaluated["losses"]) == 3
    if values.get("gnp_r") == NO_MOVE or values["gnp_alpha"] == 0:
        assert_identical(evaluated, train(Trainer, True))
    assert_identical(evaluated["weights"], train(GNPTrainer, False)["weights"])


def test_model_is_freed_after_a_run(tmp_path):
    trainer = make(tmp_path, max_steps=2)
    trainer.train()
    model = weakref.ref(trainer.model)
    trainer.model = trainer.model_wrapped = None
    trainer.callback_handler.model = trainer.callback_handler.optimizer = trainer.optimizer = None
    trainer.accelerator.free_memory()
    trainer.callback_handler.lr_scheduler = trainer.lr_scheduler = None
    gc.collect()
    assert model() is None


class LiveTensors(TrainerCallback):
    """How many tensors are alive, and how many bytes they hold, at the end of each step."""

    def __init__(self):
        self.counts = []

    def on_step_end(self, args, state, control, **kwargs):
        gc.collect()
        tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
        self.counts.append((len(tensors), sum(t.untyped_storage().nbytes() for t in tensors)))


def test_long_run_does_not_leak(tmp_path):
    live = LiveTensors()
    settings = {"max_steps": 60, "gradient_accumulation_steps": 2, "optim": "adamw_torch", "logging_steps": 7}
    make(tmp_path, callbacks=[live], num_train_epochs=10, **settings).train()
    # Between two logs a sum of losses is held or not.
    assert live.counts[-1][0] <= live.counts[1][0] + 2
    assert live.counts[-1][1] <= live.counts[1][1] + 64


def test_loss_logged_by_the_user(tmp_path):
    """`compute_loss` that logs a loss and a learning rate of its own, as people do on the main process alone."""

    def logging_loss(trainer, model, inputs):
        trainer.log({"loss": 1.0, "learning_rate": 2.0, "mine": 3.0})
        return model(**inputs)["loss"]

    trainer = trained(tmp_path, "net", with_loss(GNPTrainer, logging_loss), max_steps=2)
    mine = [entry for entry in trainer.state.log_history if "mine" in entry]
    assert [set(entry) for entry in mine] == 2 * [
        {"loss", "learning_rate", "mine", "step"} | ({"epoch"} & set(mine[0]))
    ]
    gnp = [entry for entry in trainer.state.log_history if "gnp_sharpness" in entry]
    assert len(gnp) == 2
    assert all("mine" not in entry for entry in gnp)
    assert logs_of(trainer, "gnp_on")["gnp_on"].count(1.0) == 2


@pytest.mark.parametrize("values", [{}, {"gnp_direction": "momentum", "optim": "adamw_torch"}])
@pytest.mark.parametrize("has_optimizer", [False, True])
@pytest.mark.parametrize("after_train", [False, True])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_training_step_outside_of_train(tmp_path, kind, after_train, has_optimizer, values):
    """Loss and gradient are those of stock `Trainer`, bit for bit: no step follows that could be penalised."""

    def step(cls):
        trainer = make_trainer(tmp_path, kind, cls, max_steps=1, **values)
        if after_train:
            trainer.train()
            trainer.model.load_state_dict(make_model(kind).state_dict())
            trainer.model.zero_grad()
        elif has_optimizer:
            trainer.create_optimizer_and_scheduler(10)
        trainer.current_gradient_accumulation_steps = 1
        inputs = collate(make_data(kind)[:4])
        items = (inputs["labels"] != -100).sum()
        losses = [trainer.training_step(trainer.model, dict(inputs), items) for _ in range(2)]  # gradients add up
        return losses, {name: p.grad.clone() for name, p in trainer.model.named_parameters()}

    assert_identical(step(GNPTrainer), step(Trainer))


class Anneals(TrainerCallback):
    """Sets r before each step, as schedules of SAM's radius do."""

    def on_step_begin(self, args, state, control, **kwargs):
        args.gnp_r = 0.1 * (state.global_step + 1)


def test_arguments_set_by_a_callback(tmp_path):
    """They hold from the next step on."""
    trainer = trained(tmp_path, "vit", max_steps=3, logging_steps=1, callbacks=[Anneals()])
    assert logs_of(trainer, "gnp_r")["gnp_r"] == pytest.approx([0.1, 0.2, 0.3])


def test_wrong_argument_set_by_a_callback(tmp_path):
    class Wrong(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            args.gnp_metric = "bogus"

    trainer = make_trainer(tmp_path, "vit", max_steps=3, callbacks=[Wrong()])
    with pytest.raises(ValueError, match=r"^gnp_metric must be one of"):
        trainer.train()
