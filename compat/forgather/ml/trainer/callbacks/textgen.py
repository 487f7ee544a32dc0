"""Samples of what a language model writes while it is trained."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from forgather.ml.trainer.callbacks.base import TrainerCallback
from forgather.ml.trainer.trainer_types import TrainerControl, TrainerState


class TextgenCallback(TrainerCallback):
    """Let the model continue prompts after evaluations, and write what it says.

    The random numbers that it draws are not taken from the run: the generators are put back.

    Args:
        summary_writer: A ``SummaryWriter``; None writes to the standard output.
        prompts: Texts, or the path of a YAML file with a list of them.
        generation_config: What ``model.generate`` gets besides the prompt: a ``GenerationConfig``, or a mapping.
        generation_steps: Updates that must have passed since the last time; None for none.
        max_new_tokens: Tokens that are added to a prompt.
        seed: Of what is drawn, so that samples differ by the model alone.
    """

    def __init__(
        self,
        summary_writer: Any = None,
        prompts: Sequence[str] | str | Path = (),
        generation_config: Any = None,
        generation_steps: int | None = None,
        max_new_tokens: int = 200,
        seed: int = 0,
    ) -> None:
        self.summary_writer = summary_writer
        self.prompts = _prompts(prompts)
        self.generation_config = generation_config
        self.generation_steps = generation_steps
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self._last: int | None = None

    def on_evaluate(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Generate, if enough updates have passed.

        Raises:
            ValueError: The trainer has no ``processing_class``, or the model cannot generate.
        """
        due = self._last is None or state.global_step - self._last >= (self.generation_steps or 0)
        if not (state.is_world_process_zero and due):
            return
        if processing_class is None or not hasattr(model, "generate"):
            raise ValueError(
                f"TextgenCallback needs a model with generate(), got {type(model).__name__}, and the trainer's "
                f"processing_class, got {type(processing_class).__name__}: pass Trainer(processing_class=tokenizer)"
            )
        self._last = state.global_step
        for number, prompt in enumerate(self.prompts):
            self._write(number, prompt, self._generated(model, processing_class, prompt), state.global_step)

    def _generated(self, model: Any, tokenizer: Any, prompt: str) -> str:
        inputs = tokenizer(prompt, return_tensors="pt").to(next(model.parameters()).device)
        options = {"max_new_tokens": self.max_new_tokens}
        if isinstance(self.generation_config, Mapping):
            options |= self.generation_config
        elif self.generation_config is not None:
            options["generation_config"] = self.generation_config
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(self.seed)
                written = model.generate(**inputs, **options)
        finally:
            for module in training:
                module.training = True
        return str(tokenizer.decode(written[0], skip_special_tokens=True))

    def _write(self, number: int, prompt: str, text: str, step: int) -> None:
        if self.summary_writer is None:
            sys.stdout.write(f"step {step}, prompt {number}: {text}\n")
        else:
            self.summary_writer.add_text(f"textgen/{number}", text, step)
            self.summary_writer.flush()


def _prompts(given: Sequence[str] | str | Path) -> list[str]:
    if not isinstance(given, str | Path):
        return list(given)
    import yaml

    read = yaml.safe_load(Path(given).read_text(encoding="utf-8"))
    if not isinstance(read, list) or not all(isinstance(one, str) for one in read):
        raise ValueError(
            f"prompts={str(given)!r}: expected a YAML file with a list of texts, it has {type(read).__name__}"
        )
    return read
