"""The trainer of sequence-to-sequence models: predictions may be generated."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forgather.ml.trainer.arguments import Seq2SeqTrainingArguments
from forgather.ml.trainer.trainer import Trainer
from forgather.ml.trainer.trainer_types import PredictionOutput

GENERATION = ("max_length", "max_new_tokens", "num_beams")


class Seq2SeqTrainer(Trainer):
    """A :class:`~forgather.ml.trainer.trainer.Trainer` that generates with ``predict_with_generate=True``.

    Then ``compute_metrics`` gets generated tokens instead of logits, padded to one length.
    """

    _arguments_class = Seq2SeqTrainingArguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gen_kwargs: dict[str, Any] = {}
        given = getattr(self.args, "generation_config", None)
        if given is not None:
            model: Any = self.model
            model.generation_config = self.load_generation_config(given)

    @staticmethod
    def load_generation_config(gen_config_arg: Any) -> Any:
        """Give a generation config: a copy of the one given, or the one that lies at a path.

        Raises:
            ValueError: It contradicts itself, so that it could not be saved after training.
        """
        from transformers import GenerationConfig  # who names one has it

        if isinstance(gen_config_arg, GenerationConfig):
            config = copy.deepcopy(gen_config_arg)
        else:
            path = Path(gen_config_arg)
            folder, name = (path.parent, path.name) if path.is_file() else (gen_config_arg, None)
            config = GenerationConfig.from_pretrained(folder, name)
        try:
            config.validate(strict=True)
        except ValueError as error:
            raise ValueError(f"{error}\n\nFix these issues to train your model.") from None
        return config

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **gen_kwargs: Any,
    ) -> dict[str, float]:
        """Measure the model; further arguments go to ``generate``."""
        self._gen_kwargs = self._generation(gen_kwargs)
        return super().evaluate(eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        **gen_kwargs: Any,
    ) -> PredictionOutput:
        """Predict; further arguments go to ``generate``."""
        self._gen_kwargs = self._generation(gen_kwargs)
        return super().predict(test_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    def _generation(self, given: dict[str, Any]) -> dict[str, Any]:
        """Add what the arguments say of generation, where the call does not."""
        found, args = dict(given), self.args
        if found.get("max_length") is None and found.get("max_new_tokens") is None:
            found["max_length"] = getattr(args, "generation_max_length", None)
        if found.get("num_beams") is None:
            found["num_beams"] = getattr(args, "generation_num_beams", None)
        return {name: value for name, value in found.items() if value is not None or name not in GENERATION}

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Tensor | None, Any, Any]:
        """Generate, where that was asked for, and give the loss beside what was generated."""
        if not getattr(self.args, "predict_with_generate", False) or prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        inputs = self._prepare_inputs(inputs)
        live: Any = self.model
        generated = live.generate(**_for_generation(inputs), **(gen_kwargs or self._gen_kwargs))
        config = live.generation_config
        if getattr(config, "_from_model_config", False):
            config._from_model_config = False
        if hasattr(config, "_get_default_generation_params"):
            config.update(**config._get_default_generation_params(), defaults_only=True)
        labels = inputs.get("labels")
        loss: Tensor | None = None
        if labels is not None:
            loss, _, _ = super().prediction_step(model, dict(inputs), True, ignore_keys=ignore_keys)
        if self.args.prediction_loss_only:
            return loss, None, None
        return loss, self._padded(generated, config), None if labels is None else self._padded(labels, config)

    def _padded(self, tokens: Tensor, config: Any) -> Tensor:
        if config.max_length is not None and tokens.shape[-1] < config.max_length:
            return self._pad_tensors_to_max_len(tokens, config.max_length)
        if config.max_new_tokens is not None and tokens.shape[-1] < config.max_new_tokens + 1:
            return self._pad_tensors_to_max_len(tokens, config.max_new_tokens + 1)
        return tokens

    def _pad_tensors_to_max_len(self, tensor: Tensor, max_length: int) -> Tensor:
        processing = self.processing_class
        if processing is not None and hasattr(processing, "pad_token_id"):
            padding = processing.pad_token_id if processing.pad_token_id is not None else processing.eos_token_id
        else:
            padding = getattr(getattr(self.model, "config", None), "pad_token_id", None)
            if padding is None:
                raise ValueError("Pad_token_id must be set in the configuration of the model, in order to pad tensors")
        return torch.nn.functional.pad(tensor, (0, max_length - tensor.shape[-1]), value=padding)


def _for_generation(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what was made of the labels, from which generation would go on."""
    labels, decoded = inputs.get("labels"), inputs.get("decoder_input_ids")
    if labels is not None and decoded is not None and labels.shape == decoded.shape:
        return {n: v for n, v in inputs.items() if n not in ("decoder_input_ids", "decoder_attention_mask")}
    return dict(inputs)
