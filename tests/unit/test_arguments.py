"""The `gnp_*` arguments: their ranges, their texts, how they are parsed and copied."""

import copy
import dataclasses
import inspect
import json
import math
import subprocess
import sys
import textwrap

import pytest
from runs import make_args
from transformers import HfArgumentParser, TrainingArguments

from hf_gnp import GNPArguments, GNPTrainingArguments
from hf_gnp.arguments import update_arguments


GNP_FIELDS = dataclasses.fields(GNPArguments)


NO_NUMBERS = (-0.1, math.nan, math.inf, -math.inf, "large", "", [0.1], True, 10**400)
REFUSED = [(name, value) for name in ("gnp_r", "gnp_alpha") for value in NO_NUMBERS]
# The others have defaults that follow.
REFUSED += [(name, None) for name in ("gnp_interval", "gnp_probability", "gnp_start", "gnp_end")]
REFUSED += [("gnp_target_modules", value) for value in (True, 1, 0.5, [1], [None], {"a": 1}, b"norm", len)]


@pytest.mark.parametrize("name, value", REFUSED)
def test_refused_value(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        make_args(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gnp_alpha": 1.01}, "^gnp_alpha .* at most 1, .* 1.01"),
        ({"gnp_r": 0.0}, "^gnp_r is 0"),
        ({"gnp_r": 0.0, "gnp_alpha": 0.5}, "^gnp_r is 0"),
    ],
)
def test_values_that_do_not_go_together(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **values)


@pytest.mark.parametrize(
    ("values", "r", "alpha"),
    [
        ({}, 0.05, 0.8),
        ({"gnp_alpha": 0}, 0.05, 0.0),
        ({"gnp_alpha": 0, "gnp_r": 0}, 0.0, 0.0),
        ({"gnp_alpha": 1, "gnp_r": 2}, 2.0, 1.0),
        ({"gnp_r": "5e-2", "gnp_alpha": "1e-1"}, 0.05, 0.1),  # as YAML reads numbers without a point
    ],
)
def test_valid_values(tmp_path, values, r, alpha):
    args = make_args(tmp_path, **values)
    assert (args.gnp_r, args.gnp_alpha) == (r, alpha)
    assert args.gnp_values() == {"gnp_r": r, "gnp_alpha": alpha}


@pytest.mark.parametrize(
    "values, r, metric",
    [
        ({}, 0.05, "layer"),
        ({"gnp_alpha": 1}, 0.05, "layer"),
        ({"gnp_r": 0.05}, 0.05, "l2"),  # the paper's: published values of r are for it
        ({"gnp_metric": "l2"}, 0.05, "l2"),
        ({"gnp_metric": "layer", "gnp_r": 0.2}, 0.2, "layer"),
    ],
)
def test_default_metric_follows_r(tmp_path, values, r, metric):
    args = GNPTrainingArguments(output_dir=str(tmp_path), **values)
    assert (args.gnp_r, args.gnp_metric) == (r, metric)
    args.check_gnp_values()  # as each `train` does
    assert (args.gnp_r, args.gnp_metric) == (r, metric)


LATE = [({"gnp_r": 0.05}, "l2"), ({"gnp_r": 0.3}, "l2"), ({"gnp_metric": "layer", "gnp_r": 0.3}, "layer")]
LATE += [({"gnp_r": 0.3, "gnp_metric": "layer"}, "layer"), ({"gnp_alpha": 1.0}, "layer"), ({"gnp_r": None}, "layer")]


@pytest.mark.parametrize("is_set", [True, False])
@pytest.mark.parametrize("values, metric", LATE)
def test_late_values_have_the_metric_of_early_ones(tmp_path, values, metric, is_set):
    """Also an r that equals the default."""
    args = GNPTrainingArguments(output_dir=str(tmp_path))
    other = copy.copy(args)
    for _ in range(2):
        if is_set:
            for name, value in values.items():
                setattr(args, name, value)
        update_arguments(args, args if is_set else values)
        assert args.gnp_metric == metric
        assert args.gnp_r == (values.get("gnp_r") or 0.05)
    other.check_gnp_values()
    assert (other.gnp_r, other.gnp_metric) == (0.05, "layer")


def test_a_refused_value_leaves_defaults_defaults(tmp_path):
    args = GNPTrainingArguments(output_dir=str(tmp_path))
    args.gnp_interval = 0
    with pytest.raises(ValueError, match="gnp_interval"):
        args.check_gnp_values()
    args.gnp_interval, args.gnp_r = 1, 0.3
    args.check_gnp_values()
    assert (args.gnp_r, args.gnp_metric) == (0.3, "l2")


def test_arguments_of_an_older_release(tmp_path):
    """Those of a training_args.bin have no record of what was left out."""
    args = GNPTrainingArguments(output_dir=str(tmp_path), gnp_metric="l2")
    del vars(args)["_gnp_defaults"]
    args.check_gnp_values()
    assert (args.gnp_r, args.gnp_alpha, args.gnp_metric) == (0.05, 0.8, "l2")


def test_default_alpha_follows_the_direction(tmp_path):
    """Unless α was set. A hyperparameter search sets the direction after construction."""
    args = make_args(tmp_path)
    args.gnp_direction = "momentum"
    args.check_gnp_values()
    assert args.gnp_alpha == 1.0
    args.gnp_direction = "gradient"
    args.check_gnp_values()
    assert args.gnp_alpha == 0.8
    args.gnp_direction, args.gnp_alpha = "momentum", 0.7
    with pytest.raises(ValueError, match=r"gnp_direction=momentum .*gnp_alpha is 1 .*0\.7"):
        args.check_gnp_values()


@pytest.mark.parametrize("field", GNP_FIELDS, ids=lambda field: field.name)
def test_field_is_documented(field):
    assert field.name.startswith("gnp_")
    assert len(field.metadata["help"]) > 20
    for cls in (GNPArguments, GNPTrainingArguments):
        assert f"\n        {field.name} (`" in cls.__doc__


def test_arguments_are_in_groups():
    """In the docstring under titles, and in the order in which --help lists them."""
    lines = GNPArguments.__doc__.splitlines()
    titles = [line.strip().removeprefix("Args: ") for line in lines if line.strip().startswith("Args: ")]
    assert titles == ["Strength", "Schedule", "Perturbation", "Precision"]
    documented = [line.split()[0] for line in lines if line.startswith("        gnp_")]
    assert documented == [field.name for field in GNP_FIELDS]


def test_help_on_the_command_line():
    text = "".join(HfArgumentParser(GNPTrainingArguments).format_help().split())
    for field in GNP_FIELDS:
        assert f"--{field.name}" in text
        assert field.metadata["help"].replace(" ", "") in text  # lines are broken at hyphens too


GIVEN = {"gnp_r": 0.1, "gnp_alpha": 0.5, "learning_rate": 0.25}


def parse_flags(parser: HfArgumentParser, path) -> GNPTrainingArguments:
    flags = [text for name, value in GIVEN.items() for text in (f"--{name}", str(value))]
    return parser.parse_args_into_dataclasses(["--output_dir", str(path), *flags])[0]


def parse_yaml(parser: HfArgumentParser, path) -> GNPTrainingArguments:
    file = path / "args.yaml"
    file.write_text("".join(f"{name}: {value}\n" for name, value in {"output_dir": path, **GIVEN}.items()))
    return parser.parse_yaml_file(str(file))[0]


def parse_json(parser: HfArgumentParser, path) -> GNPTrainingArguments:
    file = path / "args.json"
    file.write_text(json.dumps({"output_dir": str(path), **GIVEN}))
    return parser.parse_json_file(str(file))[0]


@pytest.mark.parametrize("parse", [parse_flags, parse_yaml, parse_json])
def test_parser(tmp_path, parse):
    args = parse(HfArgumentParser(GNPTrainingArguments), tmp_path)
    assert isinstance(args, GNPTrainingArguments)
    assert (args.gnp_r, args.gnp_alpha, args.learning_rate) == (0.1, 0.5, 0.25)


@pytest.mark.parametrize("values", [{"gnp_alpha": 0.3}, {}])
def test_copies_keep_the_values(tmp_path, values):
    args = make_args(tmp_path, gnp_r=0.1, **values)
    replaced = dataclasses.replace(args, learning_rate=0.5)
    rebuilt = GNPTrainingArguments(**{f.name: args.to_dict()[f.name] for f in dataclasses.fields(args) if f.init})
    for again in (replaced, rebuilt):
        assert again.gnp_values() == args.gnp_values() == {"gnp_r": 0.1, "gnp_alpha": args.gnp_alpha}
    assert (args.learning_rate, replaced.learning_rate, rebuilt.learning_rate) == (1e-2, 0.5, 1e-2)


# --- Imports ---

IMPORT = """
import sys

blocked = {blocked!r}
sys.modules.update(dict.fromkeys(blocked))  # None: importing it raises
import hf_gnp

assert all(hasattr(hf_gnp, name) for name in hf_gnp.__all__)
imported = {{"deepspeed", "trl", "sentence_transformers"}} & {{name for name, module in sys.modules.items() if module}}
assert not imported, imported
assert hf_gnp.GNPSeq2SeqTrainer.__module__ == "hf_gnp.seq2seq"
print(*hf_gnp.__all__)
"""


@pytest.mark.parametrize("blocked", [[], ["deepspeed", "datasets", "peft", "tensorboard", "sklearn"]])
def test_import_needs_no_extra(blocked):
    """Neither are the optional packages needed, nor are they imported where they are installed."""
    script = textwrap.dedent(IMPORT.format(blocked=blocked))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    names = result.stdout.split()
    assert {"GNPArguments", "GNPMixin", "GNPTrainer", "GNPTrainingArguments"} <= set(names)


def test_mixin_has_all_fields():
    """The mix-in carries all gnp fields, and the trainer's arguments add none of their own."""
    own = {field.name for field in dataclasses.fields(GNPTrainingArguments)}
    assert own - {field.name for field in dataclasses.fields(TrainingArguments)} == {f.name for f in GNP_FIELDS}
    assert next(iter(inspect.signature(GNPTrainingArguments).parameters)) == "output_dir"


@pytest.mark.parametrize("kind", [tuple, set])
def test_target_modules_become_a_list(tmp_path, kind):
    args = make_args(tmp_path, gnp_target_modules=kind(["b", "a"]))
    assert args.gnp_target_modules == ["a", "b"] and '"gnp_target_modules"' in args.to_json_string()
