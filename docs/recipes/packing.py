"""Pack documents of unequal length into rows of one length: the same loss as of padded ones, in less time."""

import time

import toolz
import torch
import transformers

import forgather_fn as ff

config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, use_cache=False
)
plan = ff.Plan(
    model=lambda: transformers.LlamaForCausalLM(config), loss=ff.losses.causal_lm, optimizer=ff.adamw(), schedule=3e-3
)
draw = torch.Generator().manual_seed(0)
lengths = torch.randint(4, 64, (256,), generator=draw).tolist()
documents = [(torch.arange(length) * (1 + i % 3) + i).remainder(64) for i, length in enumerate(lengths)]


def padded(samples: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids, labels = (torch.nn.utils.rnn.pad_sequence(samples, True, value) for value in (0, -100))
    return {"input_ids": ids, "labels": labels, "attention_mask": (labels != -100).long()}


rows = ff.data.best_fit(documents, length=128)  # whole documents, whose positions start anew: none sees another
streams = {
    "padded": ff.batches(documents, batch_size=32, collate=padded),
    "packed": ff.batches(rows, batch_size=len(rows) // 8),
}
program = ff.single(plan)
for name, stream in streams.items():
    state, start = program.init(seed=0), time.process_time()
    loss = program.evaluate(state, stream)["loss"]
    final = toolz.pipe(program.steps(state, stream), ff.until(steps=16), ff.last)
    print(f"{name}: loss {loss:.4f}, then {program.evaluate(final, stream)['loss']:.3f}")
    print(f"    {int(final.tokens) / (time.process_time() - start):,.0f} tokens a second")
