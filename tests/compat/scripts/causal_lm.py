"""Train a small causal language model on text, as the example scripts of transformers do."""

import inspect
import math
import statistics
import sys
from dataclasses import dataclass, field
from itertools import chain

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    PreTrainedTokenizerFast,
)

from transformers import Trainer, TrainingArguments, set_seed  # isort: skip


@dataclass
class ModelArguments:
    n_embd: int = field(default=32, metadata={"help": "The width of the model."})
    n_layer: int = field(default=2, metadata={"help": "How many blocks it has."})


@dataclass
class DataArguments:
    block_size: int = field(default=32, metadata={"help": "Tokens in a sequence."})
    validation_split: float = field(default=0.1, metadata={"help": "The share that is evaluated on."})


def main(argv):
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses(argv)
    set_seed(training_args.seed)

    text = inspect.getsource(statistics)
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel()
    words.train_from_iterator([text], trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<pad>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>")

    lines = [tokenizer(line)["input_ids"] for line in text.splitlines()[:400] if line.strip()]
    tokens = list(chain.from_iterable(lines))
    size = data_args.block_size
    blocks = [{"input_ids": tokens[i : i + size]} for i in range(0, len(tokens) - size, size)]
    held_out = int(len(blocks) * data_args.validation_split)

    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=size,
        n_embd=model_args.n_embd,
        n_layer=model_args.n_layer,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=blocks[held_out:],
        eval_dataset=blocks[:held_out],
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )

    results = {}
    if training_args.do_train:
        train_result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        metrics = train_result.metrics
        metrics["train_samples"] = len(blocks) - held_out
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()
        results["history"] = trainer.state.log_history
    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["perplexity"] = math.exp(metrics["eval_loss"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        results["eval"] = metrics
    reloaded = GPT2LMHeadModel.from_pretrained(training_args.output_dir)
    batch = torch.tensor([blocks[0]["input_ids"]])
    with torch.no_grad():
        results["logits"] = reloaded(batch).logits
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
