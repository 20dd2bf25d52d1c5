"""What a config may name: the list, expressions, overrides."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from conftest import REPOSITORY
from monai.bundle import ConfigParser, ReferenceResolver

from pipeline.config import allowed
from pipeline.config.command_line import CommandParser, read_allowed
from pipeline.config.compose import compose_located
from pipeline.config.keys import KEYS, walk
from pipeline.config.parser import Parser
from pipeline.config.validate import check_config
from pipeline.errors import InputError
from pipeline.lifecycle.workflow import make_parser
from pipeline.run import main

AMP = "configs/amp.json"


@pytest.fixture(autouse=True)
def in_the_repository(at_the_root):
    """Configs are named as the user names them."""


def overrides_of(words: list[str]) -> dict:
    return CommandParser("", None, keys=KEYS).parse(words).overrides


def refused(tmp_path, overlay: dict, capfd) -> str:
    """What `pipeline.run` says to an overlay file, which it must refuse."""
    file = tmp_path / "overlay.json"
    file.write_text(json.dumps(overlay))
    assert main([AMP, str(file), "--output_dir", str(tmp_path / "r")]) == 2
    assert not (tmp_path / "r").exists()
    return capfd.readouterr().err


# --- the list

PLAN = {
    "_target_": "pipeline.data.plan.Plan", "spacing": [1, 1, 1], "crop_empty_borders": False,
    "normalization": "zscore", "roi_size": [16, 16, 8], "strides": [[2, 2, 1]],
    "class_names": ["background", "a"], "in_channels": 1, "num_classes": 2, "batch_size": 2,
}  # fmt: skip
SIZES = {
    "spatial_dims": 3, "in_channels": "$@plan.in_channels", "out_channels": "$@plan.num_classes",
}  # fmt: skip
HANDLERS, METRIC = "validate::handlers", "validate::key_metric"
AFTER, NETWORK = "transforms_after", "network_def"
ONE_HOT = {"softmax": True, "to_onehot_y": True}
DATA = {"_target_": "Dataset", "data": []}
SAVED = {"save_dir": "x", "save_dict": {"network": "@network"}}
# where a user puts each listed class of other packages, with its arguments; [] adds it to a list
DECAY = {
    "_target_": "torch.optim.lr_scheduler.ExponentialLR", "optimizer": "@optimizer", "gamma": 0.9,
}  # fmt: skip
USES: dict[str, tuple[str, Any]] = {
    "ignite.handlers.EMAHandler": (HANDLERS, [{"model": "@network", "momentum": 0.01}]),
    "ignite.metrics.Average": (METRIC, {"loss": {}}),
    "monai.data.DataLoader": ("train::dataloader", {"dataset": DATA, "batch_size": 2}),
    "monai.data.Dataset": ("train::dataset", {"data": []}),
    "monai.engines.SupervisedEvaluator": ("validate::evaluator", {
        "device": "cpu", "val_data_loader": {"_target_": "DataLoader", "dataset": DATA},
        "network": "@network", "inferer": "@validate#inferer"}),
    "monai.handlers.CheckpointLoader": (HANDLERS, [
        {"load_path": "x", "load_dict": {"a": "@network"}, "map_location": "$@precision.device"}]),
    "monai.handlers.CheckpointSaver": (HANDLERS, [{**SAVED, "final_filename": "last.pt"}]),
    "monai.handlers.ConfusionMatrix": (METRIC, {"x": {"metric_name": ["precision"]}}),
    "monai.handlers.GarbageCollector": (HANDLERS, [{"trigger_event": "epoch"}]),
    "monai.handlers.LrScheduleHandler": (HANDLERS, [{"lr_scheduler": "@lr_scheduler"}]),
    "monai.handlers.MeanDice": (METRIC, {"mean_dice": {"include_background": False}}),
    "monai.handlers.MetricsSaver": (HANDLERS, [{"save_dir": "x", "metrics": ["mean_dice"]}]),
    "monai.handlers.StatsHandler": (HANDLERS, [{"key_var_format": "{}: {:.4f} "}]),
    "monai.handlers.TensorBoardImageHandler": (HANDLERS, [{"log_dir": "{tmp}/a"}]),
    "monai.handlers.TensorBoardStatsHandler": (HANDLERS, [{"log_dir": "{tmp}/b"}]),
    "monai.handlers.ValidationHandler": ("train::handlers", [
        {"validator": {"_target_": "SupervisedEvaluator", "device": "cpu", "network": "@network",
                       "val_data_loader": {"_target_": "DataLoader", "dataset": DATA}},
         "interval": "@val_interval"}]),
    "monai.inferers.SimpleInferer": ("train::inferer", {}),
    "monai.inferers.SliceInferer": (
        "validate::inferer", {"roi_size": [48, 48], "spatial_dim": 2, "sw_batch_size": 4}),
    "monai.inferers.SlidingWindowInferer": (
        "validate::inferer", {"roi_size": "$@plan.roi_size", "overlap": "@overlap"}),
    "monai.losses.DiceCELoss": ("loss_function", {**ONE_HOT, "lambda_ce": 2}),
    "monai.losses.DiceLoss": ("loss_function", ONE_HOT),
    "monai.networks.nets.DynUNet": (NETWORK, {
        **SIZES, "kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]}),
    "monai.networks.nets.SegResNet": (NETWORK, SIZES),
    "monai.networks.nets.UNet": (NETWORK, {
        **SIZES, "channels": [8, 16, 32], "strides": [2, 2], "num_res_units": 1,
        "norm": ["INSTANCE", {"affine": True}], "act": "LEAKYRELU"}),
    "monai.transforms.CenterSpatialCropd": (AFTER, [{"keys": ["image"], "roi_size": [8, 8, 8]}]),
    "monai.transforms.Compose": (AFTER, [{"transforms": []}]),
    "monai.transforms.DataStatsd": (AFTER, [{"keys": "image"}]),
    "monai.transforms.EnsureTyped": (AFTER, [{"keys": ["image", "label"]}]),
    "monai.transforms.Flipd": (AFTER, [{"keys": ["image", "label"], "spatial_axis": 0}]),
    "monai.transforms.Identityd": (AFTER, [{"keys": "image"}]),
    "monai.transforms.OneOf": (AFTER, [{"transforms": [{"_target_": "Identityd", "keys": "a"}]}]),
    "monai.transforms.RandFlipd": (AFTER, [{"keys": "image", "prob": 0.5}]),
    "monai.transforms.RandGaussianNoised": (AFTER, [{"keys": "image", "prob": 0.1, "std": 0.1}]),
    "monai.transforms.Resized": (AFTER, [{"keys": "image", "spatial_size": [16, 16, 16]}]),
    "monai.transforms.Rotate90d": (AFTER, [{"keys": "image"}]),
    "monai.transforms.SaveImaged": (
        "validate::postprocessing", {"keys": "pred", "output_dir": "x"}),
    "monai.transforms.ScaleIntensityd": (AFTER, [{"keys": "image", "minv": 0, "maxv": 1.0}]),
    "torch.optim.AdamW": ("optimizer", {"params": "$@network.parameters()", "lr": 1e-3}),
    "torch.optim.SGD": ("optimizer", {
        "params": "$@network.parameters()", "lr": "$@plan.learning_rate", "momentum": 0.99,
        "nesterov": True}),
    **{
        f"torch.optim.lr_scheduler.{name}": (
            "lr_scheduler", {"optimizer": "@optimizer", **arguments})
        for name, arguments in {
            "CosineAnnealingLR": {"T_max": 9},
            "ExponentialLR": {"gamma": 0.9},
            "LinearLR": {"total_iters": 9},
            "MultiStepLR": {"milestones": [3, 9]},
            "OneCycleLR": {"max_lr": 0.1, "total_steps": 9},
            "PolynomialLR": {"total_iters": 9},
            "StepLR": {"step_size": 9},
            "SequentialLR": {"schedulers": [DECAY, DECAY], "milestones": [3]},
        }.items()
    },
    "torch.optim.lr_scheduler.ChainedScheduler": ("lr_scheduler", {"schedulers": [DECAY, DECAY]}),
    "torch.utils.data.DataLoader": ("validate::dataloader", {"dataset": DATA, "batch_size": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", USES)
def test_listed_class_works_where_a_user_puts_it(tmp_path, name):
    place, arguments = USES[name]
    arguments = json.loads(json.dumps(arguments).replace("{tmp}", str(tmp_path)))
    node: Any = [{"_target_": name, **one} for one in arguments if isinstance(arguments, list)]
    if place == METRIC:
        node = {key: {"_target_": name, **value} for key, value in arguments.items()}
    elif isinstance(arguments, dict):
        node = {"_target_": name, **arguments}
    (tmp_path / "mine.json").write_text(json.dumps({"plan": PLAN, place: node}))
    composed = compose_located([AMP, str(tmp_path / "mine.json")], {})
    check_config(composed, training=True)
    made = Parser(composed.source).get_parsed_content(place)
    made = made[0] if isinstance(made, list) else made
    made = next(iter(made.values())) if place == METRIC else made
    assert type(made) is allowed.find(name)


def test_list_is_what_shipped_configs_and_that_test_use():
    used = {
        value
        for file in (REPOSITORY / "configs").glob("*.json")
        for path, value in walk(json.loads(file.read_text()))
        if path and path[-1].endswith("_target_")
    }
    assert {allowed.BARE.get(name, name) for name in used}.union(USES) == {*allowed.DOTTED}


@pytest.mark.parametrize(
    "name",
    [
        "os.system", "torch.os.system", "builtins.eval", "builtins.exec", "eval", "subprocess.run",
        "monai.bundle.run", "torch.load", "torch.optim.lr_scheduler.LambdaLR", "LoadImaged",
        "Lambdad", "monai.losses.os.DiceLoss", "monai.losses..DiceLoss",
        "monai.losses.dice.DiceLoss", "DiceLoss ", "networks.dense_unet.nn",
        "pipeline.lifecycle.lifecycle.shutil.rmtree", "monai.utils.module.instantiate", "@name",
        "$@x.y", "%x", 7, None, ["os.system"], "", ".", "pathlib.Path.unlink", "pipeline.run.main",
        "poison.PoisonedAugment",
    ],
)  # fmt: skip
def test_other_targets_are_refused_in_files(tmp_path, capfd, name):
    error = refused(tmp_path, {"network_def#_target_": name}, capfd)
    assert "overlay.json:1: network_def#_target_: expected a class or function of the list" in error
    assert f"got '{name}'" in error


def test_refused_target_is_not_imported(tmp_path, capfd, monkeypatch):
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil.json").write_text('{"loss_function": {"_target_": "evil_module.Loss"}}')
    words = ["--loss_function#smooth", "2", "--loss_function#anything", "1"]
    assert main([AMP, str(tmp_path / "evil.json"), *words]) == 2
    assert "imported" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--allow", "poison.BreakWeights"], ["poison.BreakWeights"]),
        (["--allow=a.b,poison.BreakWeights"], ["a.b", "poison.BreakWeights"]),
        (["--allow", "poison", "--allow", "a"], ["poison", "a"]),
    ],
)
def test_allow_admits_a_class_or_a_package_for_this_command(tmp_path, words, names):
    overlay = {"+train#handlers": [{"_target_": "poison.BreakWeights", "step": 3}]}
    (tmp_path / "mine.json").write_text(json.dumps(overlay))
    given = CommandParser("", None, keys=KEYS).parse(["--seed", "1", *words, "--report", "false"])
    assert (given.allow, given.overrides) == (names, {"seed": 1, "report": False})
    allow = given.allow
    source = compose_located([AMP, str(tmp_path / "mine.json")], {}).source
    allowed.check_names(source, allow)
    with pytest.raises(InputError, match=r"--allow poison\.BreakWeights"):
        allowed.check_names(source)


def test_allowed_package_is_what_is_defined_in_it():
    assert allowed.is_allowed("poison.PoisonedAugment", ["poison"])
    assert not allowed.is_allowed("poison.torch.load", ["poison"])
    assert not allowed.is_allowed("poison.torch", ["poison"])
    assert not allowed.is_allowed("poisons.BreakWeights", ["poison"])


@pytest.mark.parametrize("name", ["", "a b", "os.system()", "a..b", "*"])
def test_allow_takes_names_only(name):
    with pytest.raises(InputError, match="expected a name such as"):
        read_allowed([name])


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer#_mode_": "debug"}, {"optimizer#_mode_": "$@x"}, {"optimizer#_debug_": True},
        {"optimizer#_disabled_": "$@x"}, {"optimizer#_requires_": "$import os"},
        {"optimizer#_requires_": ["$__import__('os')"]}, {"optimizer#__path": "os.system"},
        {"validate#postprocessing": {"_target_": "SaveImaged", "keys": "p", "writer": "os.system"}},
        {"validate#postprocessing": {
            "_target_": "monai.transforms.SaveImaged", "keys": "p", "writer": "os.system"}},
        {"train#trainer#compile": True}, {"train#trainer#compile_kwargs": {"mode": "x"}},
    ],
)  # fmt: skip
def test_special_keys_are_no_way_in(tmp_path, capfd, changes):
    assert refused(tmp_path, changes, capfd)


# --- expressions

ATTACKS = [
    "$__import__('os').system('true')", "$torch.os.system('true')", "$import os", "$np.load('x')",
    "$1", "$'a'", "$", "$ @x", "$(lambda: 0)()", "$lambda: @x", "$[@x for _ in (1,)]", "${@x}",
    "$(@x,)", "$(@x)", "$@x.__class__", "$@x.forward.__globals__", "$@x._private", "$@x.a._b",
    "$@x.rmdir()", "$@x.run_dir.unlink()", "$@x.run_dir.rename", "$@x.os.system",
    "$@x.system('true')", "$@x()", "$@x.run()()", "$@x.run().a", "$@x.a.run()",
    "$@x.run(@x.place())", "$@x.run(*@y)", "$@x.run(**@y)", "$@x.run(__import__('os'))",
    "$@x.run(lambda: 0)", "$@x.run([1])", "$@x.run(a)", "$@x.run(_a=1)", "$@x.run(y := 1)",
    "$@x.run(f'{1}')", "$@x.run('@x')", "$@x.run(b'a')", "$@x.run(...)", "$@x[0]", "$@x + @y",
    "$-@x", "$not @x", "$@x or @y", "$@x if @y else @z", "$@x, @y", "$@x; @y", "$@x\n.run()\n@y",
    "$await @x", "$@x := 1", "$@x.run(__local_refs['y'])", "$__local_refs['x']",
    "$@x.\uff3f\uff3fclass__", "$@x.__cl\u1d43ss__", "$\uff20x.run()", "$@", "$@.run()",
    "$@x.run(@)", "$@x.run() # @y", "$@x.run(" + "(" * 300 + "@x" + ")" * 300 + ")",
    "$@x" + ".a" * 20000 + ".__b", "$@x.run(None\x00)", "$@x.append(1)", "$@x.run(@y.__dict__)",
    "$@x.run(-1)", "%configs/amp.json", "%seed", "%/etc/hosts.json#a", "%##x", "%", "@######b",
]  # fmt: skip


@pytest.mark.parametrize("text", ATTACKS)
def test_expression_or_macro_is_refused_wherever_it_stands(text):
    x = {"_target_": "pipeline.lifecycle.lifecycle.Lifecycle"}  # which must be there
    for source in (text, {"x": text}, {"x": [[text]]}, {"_meta_": {"a": text}}):
        (path,) = allowed.find_faults({"k": source, "x": x})
        assert path[:1] == ("k",)


@pytest.mark.parametrize(
    "text",
    [
        "$@x", "$@x.a", "$@x#y.a", "$@x::0.a", "$@x.run()", "$@x#y.place(@z)", "$@##x.run()",
        "$@x.leave(@a, @b#c.d, 1, 'two', None, True, k=2.5)", "$@train#trainer.named_parameters()",
        "@x", "@x#y", "plain", "100 %", "a@b.c", "^([^_]+)_\\d+$", "C:\\$x",
    ],
)  # fmt: skip
def test_expression_of_the_grammar_is_taken(text):
    assert not allowed.find_faults({"a": {"b": {"c": text}}})


def test_expression_is_judged_as_monai_resolves_it():
    """A relative id puts the keys above it into the text that is evaluated."""
    evil = "x, __import__('os').system('true'), "
    source = {evil: {"a": {"b": "$@##y.run()"}}}
    resolved = ConfigParser.resolve_relative_ids(f"{evil}::a::b", "$@##y.run()")
    assert "__import__" in ReferenceResolver.update_refs_pattern(resolved, {"x": None})
    assert [*allowed.find_faults(source)] == [(evil, "a", "b")]


# --- overrides


@pytest.mark.parametrize(
    "words",
    [
        ("--learning_rate", "$__import__('os').system('true')"), ("--learning_rate=$@seed",),
        ("--roi_size", '["$__import__(\'os\')", 1, 1]'),
        ("--augmentation", '{"a": {"b": "@seed"}}'),
        ("--augmentation", '{"a": [{"_target_": "os.system", "command": "true"}]}'),
        ("--augmentation", '{"\\u005ftarget_": "os.system"}'), ("--device", '"\\u0024@seed"'),
        ("--loss_function#_target_", "os.system"), ("--loss_function::_target_", "DiceLoss"),
        ("--loss_function#_mode_", "debug"), ("--seed", "%configs/amp.json"), ("--seed", "@fold"),
        ("--seed", " $@fold"), ("--initialize", '["$import os"]'),
        ("--transforms_after", '[{"_target_": "Identityd", "keys": "image"}]'), ("--seed", "%#x"),
    ],
)  # fmt: skip
def test_override_that_is_more_than_a_value_is_refused(words, capfd):
    assert main([AMP, *words]) == 2
    error = capfd.readouterr().err
    assert f"{words[0].split('=')[0]}: expected a JSON value or a plain string" in error
    assert error.count("\n") == 1


# --- what MONAI reads beside the config


def test_logging_conf_and_modules_beside_the_config_are_not_used(tmp_path, dataset, monkeypatch):

    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "amp.json").write_text((REPOSITORY / AMP).read_text())
    (folder / "metadata.json").write_text("{}")
    logs = (REPOSITORY / "configs/logging.conf").read_text()
    written = tmp_path / "written.txt"
    logs = logs.replace("StreamHandler", "FileHandler").replace("sys.stdout", f"'{written}'")
    (folder / "logging.conf").write_text(logs)
    make_parser(compose_located([str(folder / "amp.json")], overrides_of(["--seed", "1"])))
    assert not written.exists()
    assert str(tmp_path) not in " ".join(sys.path)


def test_override_may_be_any_text_that_monai_leaves_alone():
    words = ["--output_dir", "runs/a_target_b", "--group_pattern", r"^([^@%$]+)_\d+$"]
    assert overrides_of(words) == {
        "output_dir": "runs/a_target_b", "group_pattern": r"^([^@%$]+)_\d+$",
    }  # fmt: skip
