"""A draft of a model card: what was trained, and how it went, as README.md beside the model."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forgather.ml.trainer.attributes import Attributes

Words = str | list[str] | None
"""A word, several, or nothing said."""

_RATES = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "epoch", "step")


class CardMixin(Attributes):
    """The part of a trainer that writes a model card."""

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: Words = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: Words = None,
        dataset_tags: Words = None,
        dataset: Words = None,
        dataset_args: Words = None,
    ) -> None:
        """Write ``README.md`` into the output directory, on the first process: a draft, from arguments and logs.

        A model of PEFT adds what it writes of itself.

        Args:
            language: Of the model.
            license: Of the model; nothing is looked up for it.
            tags: Words by which the model is found; ``generated_from_trainer`` is added.
            model_name: The name of the output directory if not given.
            finetuned_from: The model that training began from; the name in the model's config if not given.
            tasks: What the model is for.
            dataset_tags: Names of the data on the Hub.
            dataset: Names of the data for readers; ``dataset_tags`` if not given.
            dataset_args: Which part of each of the data.
        """
        if self.args.process_index != 0:
            return
        given = str(getattr(getattr(self.model, "config", None), "_name_or_path", "") or "")
        begun = finetuned_from or (given if given and not os.path.isdir(given) else None)
        name = model_name or Path(self.args.output_dir).name or begun
        metadata: dict[str, Any] = {
            "library_name": "transformers",
            "language": _listed(language),
            "license": license,
            "base_model": begun,
            "tags": list(dict.fromkeys([*_listed(tags), "generated_from_trainer"])),
            "datasets": _listed(dataset_tags),
            "model-index": [{"name": name, "results": []}],
        }
        data, parts = _listed(dataset) or _listed(dataset_tags), _listed(dataset_args)
        named = ", ".join(data) + (f" ({', '.join(parts)})" if parts else "") if data else "an unknown dataset"
        told = {
            "Trained from": begun or "scratch",
            "Trained on": named,
            "For": ", ".join(_listed(tasks)) or "More information needed",
        }
        text = card(str(name), metadata, told, _settings(self.args), self.state.log_history)
        Path(self.args.output_dir, "README.md").write_text(text, encoding="utf-8")
        update = getattr(self.model, "create_or_update_model_card", None)  # of PEFT
        if callable(update):
            update(str(self.args.output_dir))


def card(
    name: str,
    metadata: Mapping[str, Any],
    told: Mapping[str, str],
    settings: Mapping[str, Any],
    logs: Sequence[Mapping[str, Any]],
) -> str:
    """Write a model card in Markdown.

    Args:
        name: Of the model.
        metadata: What the Hub reads; what is empty is left out.
        told: What is said of the training, by its names.
        settings: Arguments of the training.
        logs: Of the training, its evaluations among them.

    Example:
        >>> print(card("tiny", {"license": "mit"}, {"Trained on": "rows"}, {"seed": 1}, [{"eval_loss": 0.5}]))
        ---
        license: mit
        ---
        <BLANKLINE>
        # tiny
        <BLANKLINE>
        - Trained on: rows
        - eval_loss: 0.5
        <BLANKLINE>
        ## Training
        <BLANKLINE>
        - seed: 1
        <BLANKLINE>
        | step | epoch | eval_loss |
        |---|---|---|
        | - | - | 0.5 |
        <BLANKLINE>
    """
    import yaml

    head = yaml.safe_dump({key: value for key, value in metadata.items() if value}, sort_keys=False, allow_unicode=True)
    evaluations = [log for log in logs if "eval_loss" in log]
    found = {key: _short(value) for key, value in (evaluations or [{}])[-1].items() if key not in _RATES}
    listed = [f"- {key}: {value}" for key, value in {**told, **found}.items()]
    used = [f"- {key}: {value}" for key, value in settings.items()]
    lines = [f"---\n{head}---", "", f"# {name}", "", *listed, "", "## Training", "", *used, "", *_table(evaluations)]
    return "\n".join(lines) + "\n"


def _table(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [name for name in dict.fromkeys(name for log in evaluations for name in log) if name not in _RATES]
    if not names:
        return []
    columns = ["step", "epoch", *names]
    rows = [[_short(log.get(name, "-")) for name in columns] for log in evaluations]
    head, *body = ["| " + " | ".join(row) + " |" for row in (columns, *rows)]
    return [head, "|" + "---|" * len(columns), *body]


def _settings(args: Any) -> dict[str, Any]:
    """Name what a training was made with."""
    names = ["learning_rate", "train_batch_size", "gradient_accumulation_steps", "world_size", "eval_batch_size"]
    names += ["max_steps" if args.max_steps > 0 else "num_train_epochs", "optim", "lr_scheduler_type", "warmup_steps"]
    names += ["weight_decay", "max_grad_norm", "label_smoothing_factor", "mixed_precision", "seed"]
    values = {name: getattr(args, name) for name in names}
    return {name: getattr(value, "value", value) for name, value in values.items()}


def _listed(words: Words) -> list[str]:
    return [] if words is None else [words] if isinstance(words, str) else list(words)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
