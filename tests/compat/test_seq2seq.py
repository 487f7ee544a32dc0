"""Sequence-to-sequence: generated predictions, as transformers gives them."""

import numpy as np
import pytest
import torch
import transformers

import forgather.ml as ours

BOTH = (ours, transformers)
pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`")


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=23, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_decoder_layers=1, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def data(count):
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "input_ids": torch.randint(2, 23, (6,), generator=generator),
            "labels": torch.randint(2, 23, (4,), generator=generator),
        }
        for _ in range(count)
    ]


def trainer(library, folder, **options):
    args = library.Seq2SeqTrainingArguments(
        str(folder), report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", max_steps=4,
        logging_steps=1, per_device_eval_batch_size=3, **{"predict_with_generate": True, **options},
    )  # fmt: skip
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions)
        return {"tokens": float(prediction.predictions.mean())}

    made = library.Seq2SeqTrainer(
        model=t5(), args=args, train_dataset=data(12), eval_dataset=data(6), compute_metrics=metrics
    )
    made.pop_callback(library.PrinterCallback)
    return made


@pytest.mark.parametrize("options", [{}, {"generation_max_length": 8}, {"generation_num_beams": 2}], ids=str)
def test_generated_predictions_are_those_of_transformers(options, tmp_path):
    found = []
    for library in BOTH:
        made = trainer(library, tmp_path, **options)
        made.train()
        losses = [log["loss"] for log in made.state.log_history if "loss" in log]
        found.append((losses, made.evaluate(), made.predict(data(5), max_length=7), made.predict(data(5))))
    (losses, metrics, cut, output), (their_losses, their_metrics, their_cut, their_output) = found
    assert losses == pytest.approx(their_losses, rel=1e-5)
    assert set(metrics) == set(their_metrics)
    assert metrics["eval_loss"] == pytest.approx(their_metrics["eval_loss"], rel=1e-5)
    assert metrics["eval_tokens"] == their_metrics["eval_tokens"]
    np.testing.assert_equal(cut.predictions, their_cut.predictions)
    np.testing.assert_equal(output.predictions, their_output.predictions)
    np.testing.assert_equal(output.label_ids, their_output.label_ids)


def test_without_generation_it_is_the_trainer(tmp_path):
    found = [trainer(library, tmp_path, predict_with_generate=False) for library in BOTH]
    for made in found:
        made.compute_metrics = None
    one, other = (made.evaluate() for made in found)
    assert one["eval_loss"] == pytest.approx(other["eval_loss"], rel=1e-5)


def test_a_generation_config_that_contradicts_itself_is_refused(tmp_path):
    config = transformers.GenerationConfig(max_length=9, num_beams=2)
    made = trainer(ours, tmp_path, generation_config=config)
    assert made.model.generation_config.max_length == 9
    assert made.model.generation_config is not config
    with pytest.raises(ValueError, match="Fix these issues to train your model"):
        ours.Seq2SeqTrainer.load_generation_config(transformers.GenerationConfig(num_beams=1, early_stopping=True))
