"""TrainingArguments against transformers' own: fields, defaults, what is derived, refused, and how it is written."""

import abc
import copy
import dataclasses
import inspect
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import HfArgumentParser
from transformers import Seq2SeqTrainingArguments as TheirSeq2Seq
from transformers import TrainingArguments as Theirs

from forgather.ml.trainer.arguments import Seq2SeqTrainingArguments, TrainingArguments, arguments_from
from forgather.ml.trainer.legacy import OLD, UnknownArgumentError
from forgather.ml.trainer.parallel_arguments import AccelTrainingArguments, PipelineTrainingArguments
from forgather.ml.trainer.refusals import table
from tests.named import named

THEIR_FIELDS = {field.name: field for field in dataclasses.fields(Theirs)}
FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments)}


def default(field: Any) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def comparable(value: Any) -> Any:
    """Enumerations by their words, Accelerate's configuration by its values: the classes are each library's own."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, list):
        return [comparable(one) for one in value]
    return getattr(value, "value", value)


def derived(args: Any) -> dict[str, Any]:
    more = ("mixed_precision", "train_batch_size", "eval_batch_size", "world_size", "process_index", "n_gpu", "device")
    more += ("local_process_index", "should_log", "should_save", "parallel_mode", "ddp_timeout_delta")
    more += ("place_model_on_device",)
    return {name: comparable(getattr(args, name)) for name in (*THEIR_FIELDS, *more)}


def test_the_fields_are_those_of_transformers_in_their_order_and_then_ours() -> None:
    assert list(FIELDS)[: len(THEIR_FIELDS)] == list(THEIR_FIELDS)
    assert len(THEIR_FIELDS) == 114


@pytest.mark.parametrize("name", THEIR_FIELDS)
def test_a_default_is_that_of_transformers(name: str) -> None:
    assert default(FIELDS[name]) == default(THEIR_FIELDS[name])
    assert type(default(FIELDS[name])) is type(default(THEIR_FIELDS[name]))


GIVEN: list[dict[str, Any]] = [
    {},
    {"output_dir": "~/runs"},
    {"eval_strategy": "steps"},
    {"eval_strategy": "steps", "logging_steps": 0.1},
    {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True},
    {"eval_strategy": "epoch", "save_strategy": "best", "load_best_model_at_end": True},
    {"eval_strategy": "steps", "eval_steps": 0.1, "save_steps": 0.3, "load_best_model_at_end": True},
    {"eval_strategy": "steps", "eval_steps": 10, "save_steps": 30, "load_best_model_at_end": True},
    {"metric_for_best_model": "accuracy"},
    {"metric_for_best_model": "eval_my_loss"},
    {"metric_for_best_model": "f1", "greater_is_better": False},
    {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
    {"lr_scheduler_type": "greedy", "eval_strategy": "epoch"},
    {"lr_scheduler_kwargs": '{"num_cycles": "2", "power": "0.5", "flag": "true", "text": "a"}'},
    {"logging_steps": 5.0, "save_steps": 7.0},
    {"logging_strategy": "no", "logging_steps": 0},
    {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    {"bf16": True, "use_cpu": True},
    {"bf16_full_eval": True, "use_cpu": True},
    {"torch_compile": True, "use_cpu": True},
    {"torch_compile_mode": "default", "use_cpu": True},
    {"torch_compile_backend": "eager", "use_cpu": True},
    {"use_cpu": True},
    {"report_to": "tensorboard"},
    {"report_to": ["tensorboard"]},
    {"report_to": ["none"]},
    {"report_to": "all"},
    {"include_num_input_tokens_seen": True},
    {"include_num_input_tokens_seen": "non_padding"},
    {"debug": "underflow_overflow"},
    {"disable_tqdm": True},
    {"accelerator_config": {"split_batches": True}},
    {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 3},
    {"full_determinism": True, "seed": 7, "data_seed": 3},
    {"hub_model_id": "a/b", "hub_strategy": "end", "hub_token": "secret"},
    {"warmup_steps": 0.1},
    {"warmup_steps": 10},
]


@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_what_is_derived_is_derived_as_there(given: dict[str, Any]) -> None:
    given = {"output_dir": "x"} | given
    ours, theirs = TrainingArguments(**copy.deepcopy(given)), Theirs(**copy.deepcopy(given))
    assert derived(ours) == derived(theirs)
    written = ours.to_dict()
    assert {name: written[name] for name in THEIR_FIELDS} == theirs.to_dict()
    assert json.loads(ours.to_json_string()) == json.loads(json.dumps(written))
    sanitized = theirs.to_sanitized_dict()
    assert {name: value for name, value in ours.to_sanitized_dict().items() if name in sanitized} == sanitized
    assert [ours.get_warmup_steps(n) for n in (0, 9, 10, 11)] == [theirs.get_warmup_steps(n) for n in (0, 9, 10, 11)]


REFUSED_BY_BOTH: list[dict[str, Any]] = [
    {"eval_strategy": "steps", "logging_steps": 0},
    {"logging_steps": 0},
    {"logging_steps": 2.5},
    {"eval_strategy": "steps", "eval_steps": 2.5},
    {"save_steps": 2.5},
    {"load_best_model_at_end": True},
    {"load_best_model_at_end": True, "eval_strategy": "epoch"},
    {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 10, "save_steps": 15},
    {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 0.1, "save_steps": 10},
    {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 0.2, "save_steps": 0.3},
    {"fp16": True, "bf16": True, "use_cpu": True},
    {"fp16_full_eval": True, "bf16_full_eval": True, "use_cpu": True},
    {"lr_scheduler_type": "reduce_lr_on_plateau"},
    {"lr_scheduler_type": "greedy"},
    {"dataloader_prefetch_factor": 2},
    {"warmup_steps": -1},
    {"torch_empty_cache_steps": 0},
    {"torch_empty_cache_steps": 1.5},
    {"eval_strategy": "sometimes"},
    {"save_strategy": "sometimes"},
    {"logging_strategy": "best"},
    {"hub_strategy": "never"},
    {"lr_scheduler_type": "sine"},
    {"optim": "adamw_hf"},
    {"debug": "everything"},
    {"tf32": True},
    {"bf16": True},
]


@pytest.mark.parametrize("given", REFUSED_BY_BOTH, ids=str)
def test_what_transformers_refuses_is_refused_in_its_words(given: dict[str, Any]) -> None:
    if {"tf32", "bf16"} & given.keys() and len(given) == 1 and torch.accelerator.is_available():
        pytest.skip("this accelerator may have it")
    with pytest.raises(ValueError, match=r"\w") as theirs:
        Theirs("x", **given)
    with pytest.raises(ValueError, match=r"\w") as ours:
        TrainingArguments("x", **given)
    words = set(str(theirs.value).split())
    assert len(words & set(str(ours.value).split())) > 0.6 * len(words)


UNHONOURED: list[tuple[dict[str, Any], str]] = [
    ({"optim": "lion_8bit"}, "optim='lion_8bit' is not supported: it needs another package: pass the optimizer itself"),
    ({"skip_memory_metrics": False}, "PeakMemory"),
    ({"set_dataset_epoch": False}, "set_dataset_epoch"),
    ({"preserve_n_best": 2}, "preserve_n_best=2"),
    ({"save_dataset_state": False}, "save_dataset_state"),
    ({"optim_target_modules": ["attn"]}, "optim_target_modules"),
    ({"use_liger_kernel": True}, "use_liger_kernel"),
    ({"liger_kernel_config": {"rope": True}}, "liger_kernel_config"),
    ({"push_to_hub": True}, "push_to_hub=True is not supported: push what was saved"),
    ({"fsdp": True}, "fsdp"),
    ({"fsdp": "full_shard"}, "fsdp"),
    ({"deepspeed": "zero.json"}, "deepspeed"),
    ({"parallelism_config": object()}, "parallelism_config"),
    ({"dataloader_in_order": False}, "dataloader_in_order"),
    ({"train_sampling_strategy": "batch_rebalance"}, "train_sampling_strategy"),
    ({"debug": "tpu_metrics_debug"}, "debug.*TPUs are not supported"),
    ({"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}}, "gradient_accumulation_kwargs"),
    ({"accelerator_config": {"split_batch": True}}, "accelerator_config has no"),
    ({"report_to": "tensorbord"}, "report_to='tensorbord'.*did you mean 'tensorboard'"),
    ({"train_sampling_strategy": "shuffled"}, "train_sampling_strategy='shuffled' is not one of"),
    ({"include_for_metrics": ["outputs"]}, "include_for_metrics has"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0: expected at least 1"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0"),
    ({"label_smoothing_factor": 1.5}, "label_smoothing_factor=1.5"),
    ({"construct_model_on": "moon"}, "construct_model_on='moon' is not one of"),
    ({"activation_memory_budget": 0.5}, "set torch_compile=True"),
    ({"fuse_optim_with_backward": True}, "max_grad_norm=1.0 is not possible: set max_grad_norm=0"),
    (
        {"fuse_optim_with_backward": True, "max_grad_norm": 0, "gradient_accumulation_steps": 2},
        "gradient_accumulation_steps=2 is not possible",
    ),
    ({"default_dtype": "float99"}, "default_dtype='float99'"),
    ({"sdpa_backend": "fast"}, "sdpa_backend has"),
    ({"preserve_n_best": 0}, "preserve_n_best=0"),
]


@pytest.mark.parametrize(("given", "message"), UNHONOURED, ids=[named(given) for given, _ in UNHONOURED])
def test_what_is_not_honoured_is_refused_with_a_reason(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingArguments("x", **given)


@pytest.mark.parametrize("kind", [TrainingArguments, AccelTrainingArguments])
def test_a_mean_that_is_not_over_all_processes_is_refused_where_there_are_several(
    kind: type[TrainingArguments], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not kind("x", average_tokens_across_devices=False).average_tokens_across_devices
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="average_tokens_across_devices=False is not supported: on several"):
        kind("x", average_tokens_across_devices=False)


def test_what_is_said_of_an_argument_is_what_it_does() -> None:
    told = table(TrainingArguments)
    assert told["torch_compile"] == "Compile the model by torch.compile."
    for name in ("skip_memory_metrics", "preserve_n_best"):  # nothing is promised of a value that is refused
        assert "False adds" not in told[name]
        assert "Any value but the default is refused" in told[name]


def test_what_is_changed_afterwards_is_refused_when_looked_at_again() -> None:
    from forgather.ml.trainer.refusals import refuse_unhonoured

    args = TrainingArguments("x").set_push_to_hub("a/b")
    with pytest.raises(ValueError, match="push_to_hub=True is not supported"):
        refuse_unhonoured(args)


# What version 4 had, and what it is now.
TRANSLATED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"evaluation_strategy": "epoch"}, {"eval_strategy": "epoch", "do_eval": True}),
    ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
    ({"warmup_ratio": 0.1, "warmup_steps": 5}, {"warmup_steps": 5}),
    ({"warmup_ratio": 0.0}, {"warmup_steps": 0}),
    ({"no_cuda": True}, {"use_cpu": True}),
    ({"logging_dir": "logs"}, {"logging_dir": "logs"}),
    ({"overwrite_output_dir": True}, {"overwrite_output_dir": True}),
    ({"save_safetensors": True}, {}),
    ({"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}),
    ({"group_by_length": False}, {"train_sampling_strategy": "random"}),
    ({"include_inputs_for_metrics": True}, {"include_for_metrics": ["inputs"]}),
    ({"include_tokens_per_second": True}, {"include_num_input_tokens_seen": "all"}),
    ({"per_gpu_train_batch_size": 3}, {"per_device_train_batch_size": 3}),
    ({"per_gpu_eval_batch_size": 3}, {"per_device_eval_batch_size": 3}),
    ({"push_to_hub_model_id": "a"}, {"hub_model_id": "a"}),
    ({"adafactor": True}, {"optim": "adafactor"}),
    ({"torchdynamo": "eager"}, {"torch_compile": True, "torch_compile_backend": "eager"}),
    ({"dispatch_batches": False, "split_batches": True}, {}),
    ({"half_precision_backend": "auto"}, {}),
    ({"use_mps_device": False}, {}),
    ({"jit_mode_eval": False}, {}),
    ({"past_index": -1}, {}),
    ({"ray_scope": "last"}, {}),
    ({"tpu_num_cores": None}, {}),
    ({"use_legacy_prediction_loop": False}, {}),
    ({"fp16_opt_level": "O1"}, {}),
]


@pytest.mark.parametrize(("old", "new"), TRANSLATED, ids=[str(old) for old, _ in TRANSLATED])
def test_an_old_argument_is_accepted_with_a_warning_that_names_it(old: dict[str, Any], new: dict[str, Any]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        args = TrainingArguments("x", **old)
    assert {name: comparable(getattr(args, name)) for name in new} == new
    told = [str(one.message) for one in caught if one.category is FutureWarning]
    assert [text.split()[0] for text in told] == [name for name in old if name in OLD]
    assert {one.filename for one in caught} == {__file__}


@pytest.mark.parametrize(
    ("old", "message"),
    [
        ({"save_safetensors": False}, "save_safetensors=False is not supported: weights are saved as safetensors"),
        ({"half_precision_backend": "apex"}, "torch's autocast is used"),
        ({"jit_mode_eval": True}, "torch_compile=True"),
        ({"past_index": 2}, "past_index"),
        ({"tpu_num_cores": 8}, "TPUs"),
        ({"evaluation_strategy": "epoch", "eval_strategy": "steps"}, "are one argument: give eval_strategy alone"),
        ({"warmup_ratio": 1.5}, "from 0 to 1"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_old_argument_that_cannot_be_honoured_is_refused(old: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingArguments("x", **old)


def test_every_old_argument_is_gone_from_transformers() -> None:
    assert not OLD.keys() & THEIR_FIELDS.keys()


def test_gradient_checkpointing_is_the_older_name_with_the_same_warning() -> None:
    for kind in (Theirs, TrainingArguments):
        with pytest.warns(FutureWarning, match="Use `activation_checkpointing` instead"):
            args = kind("x", gradient_checkpointing=True)
        assert (args.activation_checkpointing, args.gradient_checkpointing) == (True, True)
        again = dataclasses.replace(args, activation_checkpointing=False)
        assert (again.activation_checkpointing, again.gradient_checkpointing) == (False, False)


@pytest.mark.parametrize(
    "make", [lambda **given: TrainingArguments("x", **given), lambda **given: arguments_from(given)]
)
def test_an_unknown_argument_is_refused_with_the_nearest_name(make: Any) -> None:
    for kind in (TypeError, ValueError):
        with pytest.raises(kind, match="no argument 'learning_rat'; did you mean 'learning_rate'"):
            make(learning_rat=1e-4)


@dataclasses.dataclass
class Mine(TrainingArguments):
    """A user's subclass: a field more, an old name as a field of its own, another default."""

    temperature: float = dataclasses.field(default=1.0, metadata={"help": "Mine."})
    warmup_ratio: float = 0.5
    learning_rate: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.temperature *= 2


def test_a_subclass_has_fields_and_defaults_of_its_own() -> None:
    args = Mine("x", temperature=3.0)
    assert (args.output_dir, args.temperature, args.learning_rate, args.warmup_ratio) == ("x", 6.0, 1.0, 0.5)
    assert args.to_dict()["temperature"] == 6.0
    assert dataclasses.asdict(args)["temperature"] == 6.0
    with pytest.warns(FutureWarning, match="eval_strategy"):
        assert Mine("x", evaluation_strategy="epoch").eval_strategy == "epoch"  # type: ignore[call-arg]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Mine("x", warmup_ratio=0.2).warmup_steps == 0


@pytest.mark.parametrize("kind", [TrainingArguments, Mine, Seq2SeqTrainingArguments])
def test_transformers_parser_reads_it(kind: Any, tmp_path: Path) -> None:
    words = (
        "--output_dir y --eval_strategy steps --report_to tensorboard --activation_checkpointing --logging_steps 0.1"
    )
    words += ' --lr_scheduler_kwargs {"num_cycles":2} --label_names a b --no_dataloader_pin_memory --seed 3 --debug'
    (args,) = HfArgumentParser(kind).parse_args_into_dataclasses([*words.split(), "underflow_overflow"])
    assert (args.output_dir, args.eval_strategy, args.report_to) == ("y", "steps", ["tensorboard"])
    assert (args.activation_checkpointing, args.eval_steps, args.label_names) == (True, 0.1, ["a", "b"])
    assert (args.lr_scheduler_kwargs, args.dataloader_pin_memory, args.seed) == ({"num_cycles": 2}, False, 3)
    assert "--learning_rate" in HfArgumentParser(kind).format_help()
    (read,) = HfArgumentParser(kind).parse_dict({"output_dir": "z", "max_steps": 4})
    assert (read.output_dir, read.max_steps) == ("z", 4)
    (tmp_path / "args.json").write_text(json.dumps({"output_dir": "z"}))
    (read,) = HfArgumentParser(kind).parse_json_file(str(tmp_path / "args.json"))
    assert read.output_dir == "z"


def test_its_signature_is_that_of_its_fields() -> None:
    assert list(inspect.signature(TrainingArguments).parameters) == list(FIELDS)
    assert list(inspect.signature(Mine).parameters) == [*FIELDS, "temperature", "warmup_ratio"]


def test_abstract_classes_can_be_mixed_in() -> None:
    class Named(abc.ABC):
        @abc.abstractmethod
        def name(self) -> str: ...

    @dataclasses.dataclass
    class Both(TrainingArguments, Named):
        def name(self) -> str:
            return str(self.output_dir)

    assert Both("x").name() == "x"


def test_it_is_a_plain_mutable_dataclass() -> None:
    args = TrainingArguments("x", lr_scheduler_type="cosine", hub_token="secret")
    args.learning_rate = 1.0
    assert dataclasses.replace(args, seed=1).learning_rate == 1.0
    assert args == copy.deepcopy(args)
    assert args == pickle.loads(pickle.dumps(args))
    assert args != TrainingArguments("x")
    assert "secret" not in str(args) + repr(args) + args.to_json_string()
    assert "learning_rate=1.0,\n" in str(args)
    assert set(dataclasses.asdict(args)) == set(FIELDS)


def test_a_data_type_survives_being_written() -> None:
    args = TrainingArguments("x", lr_scheduler_kwargs={"inner": {"dtype": torch.float32}})
    assert json.loads(args.to_json_string())["lr_scheduler_kwargs"] == {"inner": {"dtype": "float32"}}


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("set_training", {"learning_rate": 1e-3, "batch_size": 3, "max_steps": 5, "activation_checkpointing": True}),
        ("set_evaluate", {"strategy": "steps", "steps": 7, "batch_size": 2, "delay": 1, "loss_only": True}),
        ("set_testing", {"batch_size": 3, "loss_only": True}),
        ("set_save", {"strategy": "epoch", "total_limit": 2}),
        ("set_save", {"strategy": "best"}),
        ("set_logging", {"strategy": "steps", "steps": 7, "report_to": ["tensorboard"], "first_step": True}),
        ("set_push_to_hub", {"model_id": "a/b", "strategy": "end", "token": "t"}),
        ("set_optimizer", {"name": "sgd", "learning_rate": 1e-2, "beta1": 0.5}),
        ("set_lr_scheduler", {"name": "cosine", "max_steps": 9, "warmup_steps": 0.5}),
        ("set_dataloader", {"train_batch_size": 3, "eval_batch_size": 4, "num_workers": 1, "sampler_seed": 7}),
    ],
)
def test_a_group_is_set_as_there(method: str, given: dict[str, Any]) -> None:
    ours, theirs = TrainingArguments("x"), Theirs("x")
    assert getattr(ours, method)(**given) is ours
    getattr(theirs, method)(**given)
    assert derived(ours) == derived(theirs)
    assert inspect.signature(getattr(ours, method)).parameters.keys() == (
        inspect.signature(getattr(theirs, method)).parameters.keys()
    )


@pytest.mark.parametrize("method", ["set_evaluate", "set_save", "set_logging"])
def test_an_interval_of_no_steps_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match="requires a positive value"):
        getattr(TrainingArguments("x"), method)(strategy="steps", steps=0)


def test_what_follows_a_nan_is_said_however_arguments_are_made() -> None:
    command = ["--output_dir", "x", "--on_nonfinite", "skip"]
    (parsed,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(command)
    assert parsed.on_nonfinite == "skip"
    assert dataclasses.replace(parsed, seed=1).on_nonfinite == "skip"
    assert TrainingArguments("x").on_nonfinite == "raise"
    with pytest.raises(ValueError, match="on_nonfinite='stop' is not one of"):
        TrainingArguments("x", on_nonfinite="stop")  # type: ignore[arg-type]  # what is meant


def test_arguments_come_from_nothing_a_dict_ours_and_theirs() -> None:
    assert arguments_from(None).output_dir == "tmp_trainer"
    assert arguments_from({"output_dir": "y", "max_steps": 3}).max_steps == 3
    mine = TrainingArguments("x")
    assert arguments_from(mine) is mine
    for given in GIVEN:
        theirs = Theirs(**{"output_dir": "x"} | copy.deepcopy(given))
        assert derived(arguments_from(theirs)) == derived(theirs)
    with pytest.raises(ValueError, match="expected a TrainingArguments, a dict"):
        arguments_from("runs/a")
    with pytest.raises(UnknownArgumentError, match="did you mean 'max_steps'"):
        arguments_from({"max_step": 3})


def test_what_users_add_to_transformers_arguments_comes_along() -> None:
    @dataclasses.dataclass
    class Extended(Theirs):
        temperature: float = 1.0

    assert arguments_from(Extended("x", temperature=2.0)).temperature == 2.0  # type: ignore[attr-defined]


def test_arguments_of_transformers_that_are_not_honoured_are_refused() -> None:
    with pytest.raises(ValueError, match="push_to_hub=True is not supported"):
        arguments_from(Theirs("x", push_to_hub=True))


def test_the_arguments_of_sequence_to_sequence_have_their_fields_too() -> None:
    names = [field.name for field in dataclasses.fields(TheirSeq2Seq)]
    assert set(names) <= {field.name for field in dataclasses.fields(Seq2SeqTrainingArguments)}
    config = transformers.GenerationConfig(max_length=7)
    args = Seq2SeqTrainingArguments("x", predict_with_generate=True, generation_config=config)
    assert args.to_dict()["generation_config"] == config.to_dict()
    assert (args.generation_max_length, args.generation_num_beams) == (None, None)
    with pytest.raises(ValueError, match="sortish_sampler"):
        Seq2SeqTrainingArguments("x", sortish_sampler=True)


@pytest.mark.parametrize("level", ["passive", "detail", "debug", "info", "warning", "error", "critical"])
def test_the_level_of_loggers_is_that_of_transformers(level: str) -> None:
    ours, theirs = TrainingArguments("x", log_level=level), Theirs("x", log_level=level)
    assert ours.get_process_log_level() == theirs.get_process_log_level()


def test_bars_are_off_where_warnings_are(caplog: pytest.LogCaptureFixture) -> None:
    before = transformers.logging.get_verbosity()
    try:
        transformers.logging.set_verbosity_error()
        assert TrainingArguments("x").disable_tqdm is Theirs("x").disable_tqdm is True
    finally:
        transformers.logging.set_verbosity(before)


def test_a_launched_process_knows_which_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    args = TrainingArguments("x")
    assert (args.world_size, args.process_index, args.local_process_index) == (4, 3, 1)
    assert (args.should_log, args.should_save, args.parallel_mode.value) == (False, False, "distributed")
    assert args.get_process_log_level() == 30
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert (args.should_log, args.should_save) == (True, False)
    assert TrainingArguments("x", save_on_each_node=True).should_save


def test_making_arguments_touches_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    TrainingArguments("runs", logging_dir=None)
    with TrainingArguments("runs").main_process_first(desc="nothing"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_arguments_of_accelerate() -> None:
    args = AccelTrainingArguments("x", accelerator_args='{"mixed_precision": "bf16", "cpu": true}')
    assert args.accelerator_args == {"mixed_precision": "bf16", "cpu": True}
    assert (args.bf16, args.use_cpu, args.mixed_precision) == (True, True, "bf16")
    assert args.for_accelerator() == args.accelerator_args
    waits = AccelTrainingArguments("x", use_cpu=True, ddp_timeout=60, ddp_backend="gloo").for_accelerator()
    (opened,) = waits.pop("kwargs_handlers")
    assert waits == {"cpu": True}
    assert (opened.backend, opened.timeout.total_seconds()) == ("gloo", 60.0)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"push_to_hub": True}, "push_to_hub"),
        ({"fsdp": "full_shard"}, "each process holds the whole model"),
        ({"ddp_bucket_cap_mb": 25}, "there are no buckets"),
        ({"ddp_broadcast_buffers": False}, "buffers become those of the first process"),
        ({"reduction": "mean"}, "reduction='mean' is not one of"),
        ({"accelerator_args": 3}, "expected a dict, or JSON"),
        ({"accelerator_args": {"mixed_precision": "fp16"}, "bf16": True, "use_cpu": True}, "leave one of them out"),
    ],
)
def test_what_is_refused_of_the_arguments_of_accelerate(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        AccelTrainingArguments("x", **given)


def test_what_several_processes_cannot_do_is_refused() -> None:
    for given, message in (
        ({"auto_find_batch_size": True}, "where memory runs out on one"),
        ({"accelerator_config": {"split_batches": True}}, "give per_device_train_batch_size=4 instead"),
    ):
        args = AccelTrainingArguments("x", **given)
        args.check_processes(1)
        with pytest.raises(ValueError, match=message):
            args.check_processes(2)


def test_the_arguments_of_pipelines(monkeypatch: pytest.MonkeyPatch) -> None:
    args = PipelineTrainingArguments("x", split_spec={"layer.4": "end"}, stages_per_rank=2, pipeline_chunks=2)  # type: ignore[call-arg]
    assert (args.n_microbatches, args.pipeline_schedule) == (2, "gpipe")
    monkeypatch.setenv("WORLD_SIZE", "3")
    args = PipelineTrainingArguments("x", split_spec='{"a": "end", "b": "beginning"}', pipeline_schedule="1F1B")
    assert args.split_spec == {"a": "end", "b": "beginning"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"split_spec": {"a": "end"}, "stages_per_rank": 1}, "makes 2 stages of 1 cuts, but stages_per_rank=1 on 1"),
        ({"split_spec": {"a": "middle"}, "stages_per_rank": 2}, "at its 'beginning' or 'end'"),
        ({"split_spec": "a"}, "expected a dict"),
        ({"n_microbatches": 3}, "per_device_train_batch_size=8 cannot be cut into n_microbatches=3"),
        ({"n_microbatches": 0}, "n_microbatches=0"),
        ({"pipeline_schedule": "zigzag"}, "pipeline_schedule='zigzag' is not one of gpipe"),
    ],
    ids=str,
)
def test_stages_that_do_not_fit_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PipelineTrainingArguments("x", **given)


def test_forgathers_own_spellings_are_taken_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        args = TrainingArguments(  # type: ignore[call-arg]
            "x", best_model_metric="f1", best_model_greater_is_better=True, device="cpu", mixed_precision="bf16"
        )
    assert (args.metric_for_best_model, args.greater_is_better, args.use_cpu, args.bf16) == ("f1", True, True, True)
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"):
        TrainingArguments("x", device="cuda:3")  # type: ignore[call-arg]


def test_one_table_says_of_every_field_what_it_does() -> None:
    rows = table(TrainingArguments)
    assert list(rows) == list(FIELDS)
    assert [name for name, text in rows.items() if not text.endswith(".")] == []
    assert set(TrainingArguments.refused) <= set(rows)
    assert "push what was saved" in rows["push_to_hub"]
